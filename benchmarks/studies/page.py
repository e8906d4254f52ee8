"""The pages of the quality studies: tables of the JSON lines, findings written by hand, and nothing else.

A study's page has the table that a person needs first, then what it says (``STUDY.findings.md`` beside the data), and
folded away all the rest. Links are relative, as they hold on a forge and on a site whose root is ``docs/``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas
from scipy import stats

LOFT, OLD, PUBLISHED, ALTERNATE = "LoFT", "LoFT 0.1", "LoFT as published", "LoFT, alternate"
LORA, BOUND, FULL = "LoRA", "full, adapted matrices alone", "full"
LEFT_IN = "LoFT, gradient start left in"
RIVALS = ("LoRA-Muon", "PSI-LoRA", "ScaLoRA")  # of 2026
MAIN = (LOFT, LEFT_IN, OLD, ALTERNATE, PUBLISHED, *RIVALS, LORA, BOUND, FULL)
AGAINST = (LORA, LOFT, OLD)
# What is shown of a study, where it was measured. The first of them is that of its first table.
MEASURES = {
    "loss": "squared error",
    "test_loss": "test loss",
    "test_macro_f1": "test macro-F1",
    "other_text_loss": "loss on another text (forgetting)",
}
STUDIES = {
    "classification": (
        "MiniLM on Reuters R8, 100 steps",
        "News in eight classes: a MiniLM encoder with a new head, which learns at 3e-3; steps of 16 x 32 tokens.",
    ),
    "language": (
        "SmolLM2-135M on Shakespeare, 40 steps",
        "Steps of 4 x 64 tokens, 10,000 in all. The test text is a work that is not trained on.",
    ),
    "tunes": (
        "SmolLM2-135M on Irish tunes in ABC notation, 100 steps",
        "Steps of 4 x 128 tokens, 51,200 in all, in bfloat16's autocast. English is far from them.",
    ),
    "longer": ("MiniLM on Reuters R8, 300 steps", "As with 100 steps, and a sweep of three learning rates."),
    "head": ("MiniLM on Reuters R8, a faster head", "As with the head at 3e-3, but at 1e-2."),
    "reviews": (
        "MiniLM on film reviews, 100 steps",
        "Fresh or rotten. No film of the test set is in the training set. The head learns at 3e-3.",
    ),
    "factorisation": (
        "The paper's matrix factorisation",
        "A random matrix (1024, 512) of rank 8 by adapters of that rank, 100 steps.",
    ),
    "captured": (
        "How much of the gradient the factors reach",
        "The part of the full gradient's squared norm that lies in reach of LoFT's factors, on R8.",
    ),
}
# What one rate for all ranks gives LoFT, beside each rank's own.
ONE_RATE = 3e-4
ONE_RATE_NAME = "LoFT, 3e-4 at every rank"
# The step of release 0.2, which is never longer than AdamW's: commit f50ec35. What was measured before is of 0.1.
SECOND_RELEASE = "2026-11-29 01:41"
# Methods whose records stay and whose code does not, by what their names contain; and the last commit that has it.
GONE = {OLD: "9fee522", "steps clipped": "9fee522", "chained": "9bee310"}


# --- what the data say


def read_study(file: Path) -> pandas.DataFrame:
    """The trainings of a study; rank 0 stands for all weights."""
    frame = pandas.read_json(file, lines=True, convert_dates=False)
    return frame.assign(rank=frame["rank"].fillna(0).astype(int))


def release_of(date: str) -> str:
    """The release that was measured on a date."""
    return "0.1" if date < SECOND_RELEASE else "0.2"


def score_of(frame: pandas.DataFrame) -> str:
    """What learning rates are chosen by: see :class:`.tasks.Task`."""
    return "validation_loss" if "validation_loss" in frame else "loss"


def chosen_of(frame: pandas.DataFrame) -> pandas.DataFrame:
    """All seeds of each method and rank at the learning rate that does best with seed 0."""
    parts, score = [], score_of(frame)
    for _, cell in frame.groupby(["method", "rank"], sort=False):
        swept = cell[cell["seed"] == 0].dropna(subset=[score])
        if len(swept):
            best = swept.loc[swept[score].idxmin(), "lr"]
            edge = cell["lr"].nunique() > 1 and best in (cell["lr"].min(), cell["lr"].max())
            parts.append(cell[cell["lr"] == best].assign(edge=edge))
    return pandas.concat(parts)


def interval(values: pandas.Series) -> tuple[float, float]:
    """Mean and half the width of its 95% confidence interval (Student's t), which one value alone has none of."""
    values = values.dropna()
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.sem() if len(values) > 1 else float("nan")


def shown(values: pandas.Series) -> str:
    """The interval in words, to as many digits as it is worth."""
    mean, half = interval(values)
    if pandas.isna(mean):
        return "diverged"
    large = max(abs(mean), half if half > 0 else 0.0) >= 0.001
    mean_text = f"{round(mean, 3) + 0.0:.3f}" if large else f"{mean:.3g}"
    if pandas.isna(half):
        return mean_text
    return f"{mean_text} ± {half:.3f}" if large else f"{mean_text} ± {half:.2g}"


def rank_name(rank: int) -> str:
    """The heading of a column."""
    return f"r = {rank}" if rank else "all weights"


# --- tables of a study


def by_rank(cells: dict[str, dict[int, str]]) -> str:
    """Methods by ranks."""
    ranks = sorted({rank for row in cells.values() for rank in row}, key=lambda rank: (rank == 0, rank))
    table = pandas.DataFrame.from_dict(cells, orient="index").reindex(columns=ranks).fillna("")
    table.columns = [rank_name(rank) for rank in ranks]
    return str(table.to_markdown(disable_numparse=True))


def values_of(chosen: pandas.DataFrame, measure: str, methods: Iterable[str]) -> dict[str, dict[int, str]]:
    """Each method's measure at its chosen rate, by rank; ``*`` where that is the edge of the sweep."""
    rows: dict[str, dict[int, str]] = {}
    for method in methods:
        for rank, cell in chosen[chosen["method"] == method].groupby("rank"):
            rows.setdefault(method, {})[rank] = shown(cell[measure]) + (" *" if cell["edge"].iloc[0] else "")
    return rows


def at_one_rate(frame: pandas.DataFrame, measure: str) -> dict[int, str]:
    """LoFT at ``ONE_RATE`` at every rank, as far as it was trained so with more than one seed."""
    same = (frame["lr"] / ONE_RATE - 1).abs() < 1e-9  # pandas reads 3e-4 as its neighbour
    cells = frame[(frame["method"] == LOFT) & same].groupby("rank")[measure]
    return {rank: shown(cell) for rank, cell in cells if len(cell) > 1}


def gaps(chosen: pandas.DataFrame, measure: str) -> dict[str, dict[int, str]]:
    """(LoRA - method) / (LoRA - full) of the means; the better of the two full fine-tunings is the end of the scale."""
    means = chosen.groupby(["method", "rank"], sort=False)[measure].mean()
    full = min((means[name, 0] for name in (FULL, BOUND) if (name, 0) in means), default=None)
    rows: dict[str, dict[int, str]] = {}
    for (method, rank), value in means.items():
        if rank and method != LORA and (LORA, rank) in means and full is not None and means[LORA, rank] > full:
            rows.setdefault(method, {})[rank] = f"{(means[LORA, rank] - value) / (means[LORA, rank] - full):.0%}"
    return rows


def below(chosen: pandas.DataFrame, measure: str, other: str) -> dict[str, dict[int, str]]:
    """The other method less each, of equal rank and seed: the same head, data and order, so less noisy than means."""
    values = chosen.set_index(["method", "rank", "seed"])[measure].sort_index()
    cells = values.index.droplevel("seed").unique()
    rows: dict[str, dict[int, str]] = {}
    for method, rank in dict.fromkeys(zip(chosen["method"], chosen["rank"], strict=True)):
        if rank and method != other and (other, rank) in cells:
            rows.setdefault(method, {})[rank] = shown(values[other, rank] - values[method, rank])
    return rows


def sweep_of(frame: pandas.DataFrame) -> str:
    """The score of every rate tried with seed 0, the chosen one in bold."""
    first, score = frame[frame["seed"] == 0].copy(), score_of(frame)
    first["case"] = [f"{m}, {rank_name(r)}" for m, r in zip(first["method"], first["rank"], strict=True)]
    table = first.pivot_table(index="case", columns="lr", values=score, sort=False, dropna=False)
    tried = first.groupby(["case", "lr"]).size()

    def show(case: str, lr: float) -> str:
        value = table.loc[case, lr]
        if pandas.isna(value):
            return "diverged" if (case, lr) in tried else ""
        return f"**{value:.3g}**" if value == table.loc[case].min() else f"{value:.3g}"

    rates = sorted(table.columns)
    return str(
        pandas.DataFrame({f"{lr:g}": {case: show(case, lr) for case in table.index} for lr in rates}).to_markdown(
            disable_numparse=True
        )
    )


def distances(chosen: pandas.DataFrame) -> str:
    """Cosine and relative distance to full fine-tuning's weights at each snapshot, means over seeds."""
    rows = [
        {"method": record["method"], "rank": rank_name(record["rank"]), "step": step, **values}
        for record in json.loads(chosen.to_json(orient="records"))
        for step, values in (record["compared"] or {}).items()
    ]
    frame = pandas.DataFrame(rows)
    frame["method"] = frame["method"].where(frame["step"].str.isdigit(), "the nearest change of this rank")
    last = frame[frame["step"].str.isdigit()]["step"].astype(int).max()
    frame["step"] = frame["step"].where(frame["step"].str.isdigit(), str(last)).astype(int)
    table = frame.groupby(["rank", "method", "step"], sort=False)[["distance", "cosine", "length"]].mean()
    table = table.unstack("step")
    table.columns = [f"{kind}, step {step}" for kind, step in table.columns]
    return str(table.reset_index().fillna("").to_markdown(index=False, floatfmt=".2f"))


def curves(chosen: pandas.DataFrame) -> str:
    """The loss on the test text after some steps, means over seeds."""
    rows = [
        {"method": record["method"], "rank": rank_name(record["rank"]), **record["held_out"]}
        for record in json.loads(chosen.to_json(orient="records"))
        if record["held_out"]
    ]
    table = pandas.DataFrame(rows).groupby(["rank", "method"], sort=False).mean()
    table.columns = [f"step {step}" for step in table.columns]
    return str(table.reset_index().to_markdown(index=False, floatfmt=".3f"))


def arrivals(chosen: pandas.DataFrame, measure: str) -> str:
    """Which part of the tokens a method needs to come to full fine-tuning's last loss, and full fine-tuning to its own.

    Seed by seed, between two looks along a straight line; the mean, and of how many seeds where others never come.
    """
    lines = {(r["method"], r["rank"], r["seed"]): r for r in json.loads(chosen.to_json(orient="records"))}
    goals = {seed: line for (method, _, seed), line in lines.items() if method == FULL}
    rows = []
    for method, rank in dict.fromkeys((method, rank) for method, rank, _ in lines if method != FULL):
        pairs = [(lines[method, rank, seed], goal) for seed, goal in goals.items() if (method, rank, seed) in lines]
        there = [part_until(own, measure, goal[measure]) for own, goal in pairs]
        back = [part_until(goal, measure, own[measure]) for own, goal in pairs]
        case = {"method": method, "rank": rank_name(rank)}
        rows.append(case | {"comes to full's last loss after": _mean(there), "full comes to its after": _mean(back)})
    return table_of(rows)


def part_until(line: dict[str, Any], measure: str, goal: float) -> float | None:
    """The part of a training after which its loss on held-out data is first no higher than a goal; None for never."""
    looks = sorted((int(step) / line["steps"], loss) for step, loss in line["held_out"].items())
    looks.append((1.0, line[measure]))
    if looks[0][1] <= goal:
        return looks[0][0]
    for (before, high), (after, low) in itertools.pairwise(looks):
        if low <= goal:
            return before + (after - before) * (high - goal) / (high - low)
    return None


def _mean(parts: list[float | None]) -> str:
    come = [part for part in parts if part is not None]
    if not come:
        return "never"
    mean = f"{sum(come) / len(come):.0%}"
    return mean if len(come) == len(parts) else f"{mean}, {len(come)} of {len(parts)} seeds"


# --- text


def page(*paragraphs: str) -> str:
    """The text of a file; empty paragraphs are left out."""
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def folded(title: str, *paragraphs: str) -> str:
    """What few readers need."""
    inside = page(*paragraphs).strip()
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{inside}\n\n</details>' if inside else ""


def table_of(rows: list[dict[str, str]] | pandas.DataFrame) -> str:
    """A table without an index."""
    return str(pandas.DataFrame(rows).fillna("").to_markdown(index=False, disable_numparse=True))


def capital(text: str) -> str:
    return text[0].upper() + text[1:].replace("_", " ")


def versions_of(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items() if version)


# --- pages of studies

DISTANCE = (
    "Of the change of all adapted matrices since the start, against that of AdamW on these matrices themselves at one "
    "learning rate on the same data: the distance over the reference's length, the cosine of the angle, and the length "
    "over the reference's."
)


def study_page(name: str, data: Path) -> str:
    """The page of one study."""
    frame = read_study(data / f"{name}.jsonl")
    chosen = chosen_of(frame)
    measure, *others = (name for name in MEASURES if name in frame)
    methods = list(dict.fromkeys(chosen["method"]))
    main = [method for method in MAIN if method in methods]
    first = values_of(chosen, measure, main)
    if one := at_one_rate(frame, measure):
        first = {LOFT: first.pop(LOFT), ONE_RATE_NAME: one, **first}
    tables = {
        f"{capital(MEASURES[measure])} of the other methods": values_of(
            chosen, measure, [method for method in methods if method not in main]
        ),
        "Part of the gap between LoRA and full fine-tuning that is closed": gaps(chosen, measure),
    }
    for place, other in enumerate(AGAINST):  # no difference twice
        table = below(chosen, measure, other)
        tables[f"How far below {other} of the same rank, seed by seed"] = {
            method: row for method, row in table.items() if method not in AGAINST[:place]
        }
    tables |= {capital(MEASURES[other]): values_of(chosen, other, methods) for other in others}
    rest = [part for title, table in tables.items() if table for part in (f"**{title}**", by_rank(table))]
    if "held_out" in frame:
        rest += ["**Test loss on the way**", curves(chosen)]
    if "compared" in frame:
        rest += ["**Distance from full fine-tuning's weights**", DISTANCE, distances(chosen)]
    title, what = STUDIES[name]
    return page(
        f"# {title}",
        f"{what} The table has the {MEASURES[measure]}: [how it is made](../quality.md).",
        by_rank(first),
        f"Of the tokens that full fine-tuning has:\n\n{arrivals(chosen, measure)}" if name == "tunes" else "",
        findings(data, name),
        f"![Sweep, and {MEASURES[measure]} over ranks](../../pictures/quality_{name}.png)",
        folded("Other methods, differences, further measures", *rest),
        folded("The sweep", f"{capital(score_of(frame))} of seed 0; the chosen rate is bold.", sweep_of(frame)),
        source_of(frame, name),
    )


def captured_page(data: Path) -> str:
    """How much of the full gradient LoFT's factors can follow."""
    frame = read_study(data / "captured.jsonl")
    shares = pandas.json_normalize(frame["share"].tolist())
    frame = pandas.concat([frame.drop(columns="share"), shares], axis=1)
    frame["shape"] = ["({}, {})".format(*shape) for shape in frame["shape"]]
    long = frame.melt(["method", "rank", "step", "shape"], list(shares.columns), "reach", "share")

    def table(part: pandas.DataFrame, *index: str) -> str:
        pivot = part.pivot_table("share", ["method", "rank", *index], "step", sort=False)
        pivot.columns = [f"step {step}" for step in pivot.columns]
        return str(pivot.reset_index().to_markdown(index=False, floatfmt=".3f"))

    title, what = STUDIES["captured"]
    rate, seed = frame["lr"].iloc[0], frame["seed"].iloc[0]
    both = long[long["reach"] == "both"]
    return page(
        f"# {title}",
        what,
        f"It is measured at {rate:g} with seed {seed}, on the batch of the next step. "
        "A value is the mean over the matrices of a shape, and over shapes.",
        table(both),
        findings(data, "captured"),
        folded(
            "In reach of one factor",
            "`B` alone, `A` alone, and what the best `A` of that rank would let `B` reach.",
            table(long[long["reach"] != "both"], "reach"),
        ),
        folded("By shape", table(both, "shape")),
        source_of(frame, "captured"),
    )


def findings(data: Path, name: str) -> str:
    """What was written by hand beside the data."""
    file = data / f"{name}.findings.md"
    return f"## What it says\n\n{file.read_text().strip()}" if file.exists() else ""


def source_of(frame: pandas.DataFrame, name: str) -> str:
    """Where a study's lines come from."""
    gone = {mark: commit for mark, commit in GONE.items() if frame["method"].str.contains(mark, regex=False).any()}
    lines = {
        "data": f"[{name}.jsonl](../../../benchmarks/results/quality/{name}.jsonl)",
        "command": f"`python benchmarks/quality.py {name}`",
        "trainings": f"{trainings(frame)} of {frame['steps'].max()} steps, {hours(frame):.1f} hours",
        "devices": "; ".join(f"{count} lines on {device}" for device, count in frame["device"].value_counts().items()),
        "dates": f"{frame['date'].min()} to {frame['date'].max()}",
        "commits": ", ".join(sorted({str(commit)[:12] for commit in frame["commit"]})),
        "versions": " or ".join(dict.fromkeys(map(versions_of, frame["versions"]))),
        "code in the git history alone": ", ".join(f"`{mark}` at `{commit}`" for mark, commit in gone.items()),
    }
    shown = [f"- {key}: {value}" for key, value in lines.items() if value]
    return "\n".join(["## Where it comes from", "", *shown])


def trainings(frame: pandas.DataFrame) -> int:
    """How many there are; one may have several lines."""
    return int(frame.groupby(["method", "rank", "lr", "seed"]).ngroups)


def hours(frame: pandas.DataFrame) -> float:
    return float(frame.drop_duplicates(["method", "rank", "lr", "seed"])["seconds"].sum() / 3600)


HOW = """Every method of a study has a sweep of equally many learning rates, a factor of about three apart.
All have the same steps, batches, warm-up (10%) and linear decay.
Gradients are clipped at 1.0: by a method's own norm where it has one (LoFT, LoRA-RITE, PSI-LoRA), else by that of the
trained parameters' gradients.
The rate is chosen with seed 0 on validation data, and trained with the other seeds.
The factorisation has no validation data, and goes by the loss that it reports.

A value is the mean over seeds. After the ± stands half the width of its 95% confidence interval (Student's t).
One seed alone has none. `*` says that the best rate lies at the edge of its sweep: a wider one may do better.

`LoFT 0.1` is the step of release 0.1, which moves both factors as they are.
Rank 64 has its `LoFT` from 0.1 too: its factors alternate, and 0.2 has not changed that.

Records of what lost stay, and its code does not. The end of a page names such methods by a part of their names.
Beside it stands the last commit that has their code, in `benchmarks/studies/` and `loft_ds/`.
The methods have no `0.1` in their names there."""


def quality_page(data: Path) -> str:
    """The index of the studies."""
    rows = []
    for name, (title, _) in STUDIES.items():
        file = data / f"{name}.jsonl"
        if not file.exists():
            rows.append({"study": title, "trainings": f"none yet: `python benchmarks/quality.py {name}`"})
            continue
        frame = read_study(file)
        new = frame[(frame["method"] == LOFT) & (frame["date"].map(release_of) == "0.2")]
        rows.append(
            {
                "study": f"[{title}](quality/{name}.md)",
                "trainings": str(trainings(frame)),
                "hours": f"{hours(frame):.1f}",
                "seeds": str(frame["seed"].nunique()),
                "ranks": ranks_in(frame),
                "of these with LoFT 0.2": ranks_in(new) or "none",
            }
        )
    return page("# Does it learn better?", table_of(rows), "## How it is measured", HOW)


def ranks_in(frame: pandas.DataFrame) -> str:
    return ", ".join(str(rank) for rank in sorted(set(frame["rank"]) - {0}))


def write_quality(data: Path, pages: Path) -> None:
    """Write ``quality.md``, and in ``quality/`` a page a study.

    Args:
        data: where the JSON lines lie, and what was written by hand beside them.
        pages: where the Markdown goes.
    """
    (pages / "quality").mkdir(parents=True, exist_ok=True)
    (pages / "quality.md").write_text(quality_page(data))
    for name in STUDIES:
        if (data / f"{name}.jsonl").exists():
            text = captured_page(data) if name == "captured" else study_page(name, data)
            (pages / "quality" / f"{name}.md").write_text(text)
