"""The page of the quality studies: tables and plots of the JSON lines, and nothing that is not in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas
from scipy import stats

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LORA, BOUND, FULL = "LoRA", "full, adapted matrices alone", "full"
# What is shown of a study, where it was measured: column, heading, whether the gap to full fine-tuning is shown too.
MEASURES = {
    "loss": ("squared error", True),
    "test_loss": ("test loss", True),
    "test_macro_f1": ("test macro-F1", False),
    "other_text_loss": ("loss on another text (forgetting)", False),
}
# LoFT's best rate at most ranks: what one rate for all of them gives, beside each rank's own.
ONE_RATE = 3e-4
SNAPSHOT_TITLE = "Distance from full fine-tuning's weights"


def write_page(folder: Path, scores: dict[str, str]) -> None:
    """Write ``quality.md`` beside the folder and a plot a study into it.

    Args:
        folder: where the JSON lines lie.
        scores: by study, the measure that learning rates were chosen by.
    """
    text = ["# Does it learn better?", "", _how(), ""]
    for name, score in scores.items():
        file = folder / f"{name}.jsonl"
        if file.exists():
            text += [f"## {name}", "", *_study(pandas.read_json(file, lines=True), score, folder, name)]
        else:
            text += [f"## {name}", "", f"Not run yet: `python benchmarks/quality.py {name}`.", ""]
    captured = folder / "captured.jsonl"
    if captured.exists():
        text += ["## captured", "", *_captured(pandas.read_json(captured, lines=True))]
    notes = folder / "findings.md"
    if notes.exists():
        text += [notes.read_text().strip(), ""]
    (folder.parent / "quality.md").write_text("\n".join(text))


def _captured(frame: pandas.DataFrame) -> Iterator[str]:
    """How much of the full gradient LoFT's factors can follow."""
    one = frame.iloc[-1]
    shares = pandas.json_normalize(frame["share"].tolist())
    frame = pandas.concat([frame.drop(columns="share"), shares], axis=1)
    frame["shape"] = ["({}, {})".format(*shape) for shape in frame["shape"]]
    yield (
        f"The part of the full gradient's squared norm that lies in reach of LoFT's factors at "
        f"{one['lr']:g}, on the batch of the next step, the mean over the matrices of a shape, and in the first table "
        f"over shapes, after 0 to {one['steps']} steps of "
        f"{one['task']}, seed {one['seed']}: of `B` alone, of `A` alone, of both (what LoFT follows jointly); and what "
        f"the best `A` of that rank would let `B` reach. {one['device']}; {frame['date'].max()}; commits "
        f"{', '.join(sorted({commit[:12] for commit in frame['commit']}))}. Command: `{one['command']}`."
    )
    reach = frame.melt(["method", "rank", "step", "shape"], list(shares.columns), "reach", "share")
    for title, index, part in (
        ("of", ["method", "rank", "reach"], reach),
        ("both, in", ["method", "rank", "shape"], reach[reach["reach"] == "both"]),
    ):
        table = part.pivot_table("share", index, "step", sort=False)
        table.index.names = ["method", "rank", title]
        table.columns = [f"step {step}" for step in table.columns]
        yield from ("", str(table.reset_index().to_markdown(index=False, floatfmt=".3f")), "")


def _how() -> str:
    return (
        "Made from `quality/*.jsonl` by `python benchmarks/quality.py page`. In a study every method has a sweep of "
        "equally many learning rates, a factor of about three apart, the same steps, batches, warm-up (10%), linear "
        "decay and clipping at 1.0, of the norm that a method has of its own (LoFT, LoRA-RITE) or of the trained "
        "parameters' gradients; the rate is chosen on validation data with seed 0 (the factorisation has none, and "
        "goes by the loss it reports), and trained with the others. A "
        "value is the mean over seeds, with the half width of its 95% confidence interval (Student's t) after the ±; "
        "one seed alone has none. `*`: the best rate lies at the edge of its sweep, so a wider one may do better."
    )


def _study(frame: pandas.DataFrame, score: str, folder: Path, name: str) -> Iterator[str]:
    frame["rank"] = frame["rank"].fillna(0).astype(int)
    chosen = _chosen(frame, score)
    one = frame.iloc[-1]
    versions = ", ".join(f"{package} {version}" for package, version in one["versions"].items() if version)
    commits = sorted({str(commit)[:12] for commit in frame["commit"]})
    devices = "; ".join(f"{count} on {device}" for device, count in frame["device"].value_counts().items())
    yield (
        f"{len(frame)} trainings of {one['steps']} steps, {frame['seconds'].sum() / 3600:.1f} hours: {devices}; "
        f"{frame['date'].min()} to {frame['date'].max()}; commits {', '.join(commits)}; {versions}. "
        f"Command: `python benchmarks/quality.py {name}`, also by columns (`--methods`)."
    )
    yield ""
    for measure, (heading, has_gap) in MEASURES.items():
        if measure in frame:
            yield from (f"**{heading[0].upper()}{heading[1:]}** at the chosen rate", "", _table(chosen, measure), "")
            if has_gap:
                one_rate = _at_one_rate(frame, measure)
                for title, table in (
                    (f"LoFT at {ONE_RATE:g} at every rank", one_rate),
                    ("Part of the gap between LoRA and full fine-tuning that is closed", _gap(chosen, measure)),
                    ("How far below LoRA of the same rank, seed by seed", _differences(chosen, measure)),
                ):
                    if table is not None:
                        yield from (f"**{title}** ({heading})", "", table, "")
    yield from ("**The sweep** (seed 0): " + score.replace("_", " "), "", _sweep(frame, score), "")
    if "compared" in frame and frame["compared"].notna().any():
        yield from (f"**{SNAPSHOT_TITLE}**, at the chosen rate", "", *_distances(chosen), "")
    if "held_out" in frame and frame["held_out"].notna().any():
        yield from ("**Held-out loss over the steps**, at the chosen rate", "", _curves(chosen), "")
    plot = folder / f"{name}.png"
    _draw(frame, chosen, score, plot)
    yield from (f"![{name}]({folder.name}/{plot.name})", "")


def _chosen(frame: pandas.DataFrame, score: str) -> pandas.DataFrame:
    """All seeds of each method and rank at the learning rate that does best with seed 0."""
    parts = []
    for _, cell in frame.groupby(["method", "rank"], sort=False):
        swept = cell[cell["seed"] == 0].dropna(subset=[score])
        if len(swept):
            best = swept.loc[swept[score].idxmin(), "lr"]
            edge = cell["lr"].nunique() > 1 and best in (cell["lr"].min(), cell["lr"].max())
            parts.append(cell[cell["lr"] == best].assign(edge=edge))
    return pandas.concat(parts)


def _mean(values: pandas.Series) -> str:
    values = values.dropna()
    if not len(values):
        return "diverged"
    if len(values) == 1:
        return f"{values.iloc[0]:.3g}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return f"{values.mean():.3g} ± {half:.2g}"


def _rank_name(rank: int) -> str:
    return f"r = {rank}" if rank else "all weights"


def _table(chosen: pandas.DataFrame, measure: str) -> str:
    rows: dict[str, dict[str, str]] = {}
    for (method, rank), cell in chosen.groupby(["method", "rank"], sort=False):
        mark = " *" if cell["edge"].iloc[0] else ""
        rows.setdefault(method, {})[_rank_name(rank)] = f"{_mean(cell[measure])} at {cell['lr'].iloc[0]:g}{mark}"
    ranks = [_rank_name(rank) for rank in sorted(chosen["rank"].unique())]
    table = pandas.DataFrame.from_dict(rows, orient="index").reindex(columns=ranks).fillna("")
    return str(table.to_markdown(disable_numparse=True))


def _at_one_rate(frame: pandas.DataFrame, measure: str) -> str | None:
    same = (frame["lr"] / ONE_RATE - 1).abs() < 1e-9  # pandas reads 3e-4 as its neighbour
    cells = frame[(frame["method"] == "LoFT") & same].groupby("rank")
    return _by_method({"LoFT": {_rank_name(rank): _mean(cell[measure]) for rank, cell in cells}} if len(cells) else {})


def _gap(chosen: pandas.DataFrame, measure: str) -> str | None:
    """(LoRA - method) / (LoRA - full) of the means; the better of the two full fine-tunings is the end of the scale."""
    means = chosen.groupby(["method", "rank"], sort=False)[measure].mean()
    full = min((means[name, 0] for name in (FULL, BOUND) if (name, 0) in means), default=None)
    rows: dict[str, dict[str, str]] = {}
    for (method, rank), value in means.items():
        if rank and method != LORA and (LORA, rank) in means and full is not None and means[LORA, rank] > full:
            part = (means[LORA, rank] - value) / (means[LORA, rank] - full)
            rows.setdefault(method, {})[_rank_name(rank)] = f"{part:.0%}"
    return _by_method(rows)


def _differences(chosen: pandas.DataFrame, measure: str) -> str | None:
    """LoRA less method, of equal rank and seed: the same head, data and order, so less noisy than their means."""
    values = chosen.set_index(["method", "rank", "seed"])[measure].sort_index()
    rows: dict[str, dict[str, str]] = {}
    for method, rank in dict.fromkeys(zip(chosen["method"], chosen["rank"], strict=True)):
        if rank and method != LORA and (LORA, rank) in values.index.droplevel("seed"):
            rows.setdefault(method, {})[_rank_name(rank)] = _mean(values[LORA, rank] - values[method, rank])
    return _by_method(rows)


def _by_method(rows: dict[str, dict[str, str]]) -> str | None:
    if not rows:
        return None
    table = pandas.DataFrame.from_dict(rows, orient="index").fillna("")
    ranks = sorted(table.columns, key=lambda name: int(name.removeprefix("r = ")))
    return str(table[ranks].to_markdown(disable_numparse=True))


def _sweep(frame: pandas.DataFrame, score: str) -> str:
    first = frame[frame["seed"] == 0].copy()
    first["case"] = [f"{m}, {_rank_name(r)}" for m, r in zip(first["method"], first["rank"], strict=True)]
    table = first.pivot_table(index="case", columns="lr", values=score, sort=False, dropna=False)
    table = table.reindex(columns=sorted(table.columns))
    tried = first.groupby(["case", "lr"]).size()

    def show(case: str, lr: float) -> str:
        value = table.loc[case, lr]
        return f"{value:.3g}" if pandas.notna(value) else "diverged" if (case, lr) in tried else ""

    shown = pandas.DataFrame({f"{lr:g}": {case: show(case, lr) for case in table.index} for lr in table.columns})
    return str(shown.to_markdown(disable_numparse=True))


def _distances(chosen: pandas.DataFrame) -> Iterator[str]:
    """Cosine and relative distance at each snapshot, means over seeds."""
    rows = [
        {"method": record["method"], "rank": _rank_name(record["rank"]), "step": step, **values}
        for record in json.loads(chosen.to_json(orient="records"))
        for step, values in (record["compared"] or {}).items()
    ]
    frame = pandas.DataFrame(rows)
    frame["method"] = frame["method"].where(frame["step"].str.isdigit(), "the nearest change of this rank")
    last = frame[frame["step"].str.isdigit()]["step"].astype(int).max()
    frame["step"] = frame["step"].where(frame["step"].str.isdigit(), str(last)).astype(int)
    means = frame.groupby(["rank", "method", "step"], sort=False)[["distance", "cosine", "length"]].mean()
    table = means.unstack("step")
    table.columns = [f"{kind}, step {step}" for kind, step in table.columns]
    yield (
        "Of the change of all adapted matrices since the start, against that of AdamW on these matrices themselves at "
        "one learning rate on the same data: the distance over the reference's length, the cosine of the angle, and "
        "the length over the reference's."
    )
    yield from ("", str(table.reset_index().fillna("").to_markdown(index=False, floatfmt=".2f")))


def _curves(chosen: pandas.DataFrame) -> str:
    """The loss on the test text after some steps and at the end, means over seeds."""
    rows = [
        {"method": record["method"], "rank": _rank_name(record["rank"]), **record["held_out"], record["steps"]: final}
        for record in json.loads(chosen.to_json(orient="records"))
        if (final := record["test_loss"]) is not None
    ]
    means = pandas.DataFrame(rows).groupby(["rank", "method"], sort=False).mean()
    means.columns = [f"step {step}" for step in means.columns]
    return str(means.reset_index().to_markdown(index=False, floatfmt=".3f"))


def _draw(frame: pandas.DataFrame, chosen: pandas.DataFrame, score: str, path: Path) -> None:
    """The sweep on the left, the measure over ranks on the right."""
    measure = next(name for name in MEASURES if name in frame)
    main = [m for m in (FULL, BOUND, "LoFT", "LoFT as published", LORA) if m in set(frame["method"])]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    colours = dict(zip(main, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for (method, rank), cell in frame[frame["seed"] == 0].groupby(["method", "rank"], sort=False):
        if method in main:
            cell = cell.sort_values("lr")
            style = {0: "-", 1: ":", 2: "--", 16: "-"}.get(rank, "-.")
            left.plot(
                cell["lr"], cell[score], style, marker="o", color=colours[method], label=f"{method}, {_rank_name(rank)}"
            )
    left.set(xscale="log", xlabel="learning rate", ylabel=score.replace("_", " "), title="sweep, seed 0")
    left.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.01, 0.5))  # off the data
    for method in main:
        cells = chosen[chosen["method"] == method].groupby("rank")[measure]
        means, errors = cells.mean(), cells.sem().fillna(0)
        if list(means.index) == [0]:
            right.axhline(means.iloc[0], color=colours[method], linestyle="--", label=method)
        else:
            right.errorbar(means.index, means, yerr=errors, marker="o", color=colours[method], label=method)
    right.set(xscale="log", xlabel="rank", ylabel=MEASURES[measure][0], title="at the chosen rate, mean and its error")
    ranks = sorted(set(chosen["rank"]) - {0})
    right.set_xticks(ranks, [str(rank) for rank in ranks])
    right.minorticks_off()
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
