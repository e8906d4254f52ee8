"""Writes ``docs/results``: a page for each of the results in ``benchmarks/results``, and their index.

    python benchmarks/pages.py

A page has the table that a person needs first, and folded away the long form that the benchmark itself has written.
Those of the quality studies are made by ``studies/page.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pandas

from provenance import RESULTS, ROOT
from studies.page import LOFT, folded, page, read_study, release_of, table_of, versions_of, write_quality

ALTERNATING = "LoFT alternating"
PAGES_FOLDER = ROOT / "docs" / "results"
# One of them has another name in what release 0.1 has measured.
STATE_KINDS = ("momentum", "second moments", "pending or before", "pending or previous", "bases", "kept rows")


def stored(name: str) -> dict[str, Any]:
    """A results file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def facts_of(name: str) -> dict[str, str]:
    """How a results file came about."""
    found = stored(name)
    if name == "main_job":  # each of its runs says so
        found = {**found["runs"][0], "command": "python benchmarks/main_job.py", "device": found["machine"]}
    found = found.get("environment", found)
    facts = {"command": f"`{found['command']}`", **{key: found[key] for key in ("date", "commit", "device")}}
    return {**facts, "release": release_of(found["date"]), "versions": versions_of(found["versions"])}


def measured(name: str) -> str:
    """Which release was measured, and where."""
    facts = facts_of(name)
    return f"Measured with release {facts['release']} on {facts['device']}."


def source_of(name: str, **more: Any) -> str:
    """Where a file's numbers come from."""
    data = {"data": f"[{name}.json](../../benchmarks/results/{name}.json)"}
    lines = (f"- {key}: {value}" for key, value in {**data, **facts_of(name), **more}.items())
    return "\n".join(["## Where it comes from", "", *lines])


def long_form(name: str, begin: str = "\n\n") -> str:
    """What the benchmark has written; without its picture and where it comes from, which stand on the page."""
    text = (RESULTS / f"{name}.md").read_text()
    kept = [line for line in text[text.index(begin) :].splitlines() if not re.match(r"!\[|- \w+: ", line)]
    text = re.sub(r"\]\((?!http)([^)]+)\)", r"](../../benchmarks/results/\1)", "\n".join(kept).strip())
    return folded("Everything that was measured", re.sub("^## ", "### ", text, flags=re.MULTILINE))


def full_rank() -> str:
    """Distances from AdamW."""
    found = stored("full_rank")
    rows: dict[str, dict[str, str]] = {}
    for row in found["rows"]:
        value = row["median"]
        far = value is None or value > 1e3
        cells = rows.setdefault(row["method"], {"relative distance": row["method"]})
        cells[f"n = {row['n']}, {row['steps']} steps"] = "diverged" if far else f"{value:.1e}"
    return page(
        "# Is it AdamW in the full-rank limit?",
        "Where m = n = r the factors reach every matrix, so LoFT has to be AdamW.",
        table_of(list(rows.values())),
        "A value is the distance of `W` from that of `torch.optim.AdamW`, over its length, on the same gradients.\n"
        f"It is the median of {found['seeds']} seeds. 0 is right, up to rounding.",
        "![Distance over the steps](../pictures/full_rank.png)",
        source_of("full_rank", picture="[its data](../pictures/full_rank.json)", settings=found["settings"]),
    )


def milliseconds(seconds: float | None) -> str:
    """To three digits."""
    if seconds is None:
        return "not run"
    return f"{1e3 * seconds:.0f}" if seconds > 0.1 else f"{1e3 * seconds:.3g}"


OFFICIAL, FUSED, CPU_ADAM = "authors' LoFT", "AdamW fused", "DeepSpeedCPUAdam"
NAMES = {
    OFFICIAL: "the authors' code",
    FUSED: "LoRA's AdamW",
    CPU_ADAM: "by DeepSpeedCPUAdam",
    ALTERNATING: "alternating",
}


def step_time() -> str:
    """A step's time beside the floor."""
    found = stored("step_time")
    rows: list[dict[str, Any]] = []
    for run in found["training"]:
        taken = run["seconds"]
        share = taken[LOFT] / (taken["forward and backward"] + taken[LOFT])
        row = {"r": run["rank"], LOFT: milliseconds(taken[LOFT]), "share of a training step": f"{share:.1%}"}
        others = {NAMES[m]: milliseconds(taken[m]) for m in (OFFICIAL, FUSED, CPU_ADAM) if m in taken}
        rows.append({**row, "floor / LoFT": f"{run['floor_seconds'] / taken[LOFT]:.0%}", **others})
    cells: list[dict[str, Any]] = []
    for cell in found["cells"]:
        methods = cell["methods"]
        row = {"layer": "{}, {} x {}".format(cell["model"], *cell["shape"]), "r": cell["rank"]}
        for method, result in methods.items():
            row[NAMES.get(method, method)] = milliseconds(result.get("seconds"))
        loft, official = (methods.get(method, {}).get("seconds") for method in (LOFT, OFFICIAL))
        row |= {"floor": milliseconds(cell["floor_seconds"])}
        cells.append(row | {"authors' / LoFT": f"{official / loft:.1f}" if loft and official else ""})
    memory = [
        {
            "layer": "{}, {} x {}".format(cell["model"], *cell["shape"]),
            "r": cell["rank"],
            **{
                NAMES.get(method, method): f"{result['extra_bytes'] / 2**20:.1f}"
                for method, result in cell["methods"].items()
                if "extra_bytes" in result
            },
        }
        for cell in found["cells"]
    ]
    where = "on a GPU" if found["cuda"] else "CPU time of one thread"
    return page(
        "# What does a step cost?",
        measured("step_time") + ("" if found["cuda"] else " On a GPU nothing has been measured."),
        f"Milliseconds of one step of SmolLM2-135M's 210 pairs, {where}, the median:",
        table_of(rows),
        f"A training step is forward and backward of {found['training'][0]['tokens']} tokens, and LoFT's own.\n"
        "The floor is what the machine needs for a step's arithmetic or bytes. Rates are those of large products and\n"
        "copies in the same run. `LoFT` moves both factors up to r = 16, and one of them above.",
        "![Step time over the rank](../pictures/step_time.png)",
        folded("Every layer that was measured", "Milliseconds.\n\n" + table_of(cells)),
        folded("Extra memory", "MiB besides the state.\n\n" + table_of(memory)),
        source_of("step_time", **{"authors' commit": found["environment"]["official_commit"]}),
    )


def scaling() -> str:
    """State over ranks."""
    found = stored("scaling")
    rows: dict[int, dict[str, Any]] = {}
    for row in found["rows"]:
        if row["scaling"] == "strong":
            ranks = f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}"
            rows.setdefault(row["stage"], {"ZeRO": row["stage"]})[ranks] = f"{state_of(row):.3f}"
    furthest = max(abs(state_of(row) / state_of(row["law"]) - 1) for row in found["rows"])
    return page(
        "# Do memory and work fall with the ranks?",
        measured("scaling"),
        "MB of LoFT's state on the fullest rank, for a small Llama at r = 16:",
        table_of(list(rows.values())),
        f"What `loft_ds.plan` says of them differs by {furthest:.1%} at most.",
        "![State, arithmetic and traffic over the ranks](../pictures/scaling.png)",
        "Of arithmetic the plan counts more than the matrix products that are measured.\n"
        "All ranks share the same cores, so seconds do not say how a step scales.",
        long_form("scaling"),
        source_of("scaling", settings=found["settings"]),
    )


def state_of(row: dict[str, float]) -> float:
    """MB of LoFT's state in a row of scaling.json."""
    return sum(row.get(f"{kind} kB", 0.0) for kind in STATE_KINDS) / 1e3


def traffic() -> str:
    """Bytes over ranks."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in stored("traffic")["rows"]:
        key = row["model"], row["r"], row["stage"]
        cells = rows.setdefault(key, dict(zip(("model", "r", "ZeRO"), key, strict=True)))
        cells[f"{row['ranks']} ranks"] = f"{row['received MB']:.3g}"
    return page(
        "# What travels between ranks?",
        "MB that LoFT's step brings to the rank that receives most, counted from the plans that the ranks carry out:",
        table_of(list(rows.values())),
        "It is the mean of a step in which `B` leads and of one in which `A` does.\n"
        "DeepSpeed's own collectives come on top, as with any optimizer.",
        "![The exchanges of one step](../pictures/exchanges.png)",
        long_form("traffic"),
        source_of("traffic"),
    )


def main_job() -> str:
    """Losses of the main job at every stage."""
    found = stored("main_job")
    names = {"loft": LOFT, "lora": "LoRA with AdamW"}
    runs = sorted(found["runs"], key=lambda run: (run["optimizer"], run["config"]))
    first = runs[0]
    rows = []
    for run in runs:
        apart = max(abs(a - b) for a, b in zip(run["loss"], first["loss"], strict=True))
        rows.append(
            {
                "run": f"{names[run['optimizer']]}, ZeRO {run['config'][-1]}",
                "learning rate": f"{run['learning_rate']:g}",
                "held-out loss": f"{run['eval_loss_after']:.4f}",
                "furthest loss of a step from ZeRO 0's": f"{apart:.1g}" if run["optimizer"] == "loft" else "",
                "seconds": f"{run['train_runtime_seconds']:.0f}",
            }
        )
    sweep = [
        {
            "method": names[name],
            "learning rate": f"{one['learning_rate']:g}",
            "held-out": f"{one['eval_loss_after']:.4f}",
        }
        for name, each in found["sweep"].items()
        for one in each
    ]
    return page(
        "# Does every stage train alike?",
        measured("main_job"),
        f"Model: {first['model']}. Text: {first['text']}. {first['steps']} steps on {first['world_size']} ranks, "
        f"r = {first['lora_rank']}, {first['dtype']}. "
        f"Before training the held-out loss is {first['eval_loss_before']:.4f}.",
        table_of(rows),
        "![Losses of the main job](../pictures/main_job.png)",
        folded("The sweep", "Of each method at ZeRO 2.", table_of(sweep)),
        source_of("main_job"),
    )


def resume() -> str:
    """Losses of a run that went on on other ranks."""
    found = stored("resume")
    unbroken, broken = found["runs"]
    apart = [abs(a - b) for a, b in zip(broken["losses"], unbroken["losses"], strict=True)]
    rows, first = [], 0
    for part in broken["parts"]:
        last = first + part["steps"]
        row = {"steps": f"{first + 1} to {last}", "ranks": part["ranks"], "ZeRO": part["stage"]}
        rows.append({**row, "furthest loss of a step": f"{max(apart[first:last]):.1g}"})
        first = last
    (whole,) = unbroken["parts"]
    return page(
        "# Does a run go on on other ranks?",
        measured("resume"),
        "A small Llama in float32. After each part it saves, and new processes go on from there:",
        table_of(rows),
        "The last column is the distance from the same run unbroken, "
        f"on {whole['ranks']} ranks at ZeRO {whole['stage']}.",
        "![Losses of the broken and the unbroken run](../pictures/resume.png)",
        source_of("resume", settings=found["settings"]),
    )


def precision() -> str:
    """What is lost with fewer bits, and what is won."""
    found = stored("precision")
    ends = [
        {
            "kept or multiplied in": row["kind"],
            "beta2": f"{row['beta2']:g}",
            "r": row["r"],
            "distance of W from float64's": f"{row['distance']:.1e}",
            "loss": f"{row['loss']:.4f}",
        }
        for row in found["trajectories"]
    ]
    (steps,) = {tuple(row["errors"]) for row in found["quotients"]}
    quotients = [
        {"r": row["r"], "denominators": row["precision"], **{f"step {s}": f"{row['errors'][s]:.0e}" for s in steps}}
        for row in found["quotients"]
    ]
    limit = [{"denominators": row["precision"], "distance": f"{row['distance']:.1e}"} for row in found["full_rank"]]
    times = [
        {"r": row["r"], **{name: f"{s / row['seconds']['ieee']:.2f}" for name, s in row["seconds"].items()}}
        for row in found["times"]
    ]
    settings = found["settings"]
    (rows, columns), (m, n) = settings["timed shape"], settings["W"]
    return page(
        "# What does less precision do?",
        measured("precision"),
        f"One layer `W` ({m}, {n}) learns a random matrix for {settings['steps']} steps. "
        f"Medians of {settings['seeds']} seeds:",
        table_of(ends),
        "The loss does not notice. The trajectory notices bfloat16 storage. Denominators of fewer bits add less to it\n"
        "than float32 is off anyway, for the first steps are in full precision.",
        "## Why the first steps are spared",
        "How far a step is from float64's of the same state, if nothing is spared:",
        table_of(quotients),
        "Of few gradients a denominator is a sum that cancels.",
        "## In the full-rank limit",
        f"Distance of `W` from AdamW's after {found['full_rank'][0]['steps']} steps, m = n = r = "
        f"{found['full_rank'][0]['n']}, float32:",
        table_of(limit),
        'This is why `denominator_precision` is `"ieee"` by default.',
        "## What it saves",
        f"Time of `projected_update`, of {rows} rows and {columns} of the partner, over that in full precision:",
        table_of(times),
        "A precision that the machine lacks is not in the table. bfloat16 storage halves LoFT's largest state.",
        source_of("precision", settings=settings),
    )


PAGES: dict[str, Callable[[], str]] = {
    "full_rank": full_rank,
    "step_time": step_time,
    "scaling": scaling,
    "traffic": traffic,
    "main_job": main_job,
    "resume": resume,
    "precision": precision,
}


def index() -> str:
    """What was measured, on what, by which command."""
    studies = pandas.concat(read_study(file) for file in sorted((RESULTS / "quality").glob("*.jsonl")))
    facts = {
        "quality": {
            "command": "`python benchmarks/quality.py STUDY`",
            "date": studies["date"].max(),
            "device": "; ".join(sorted(set(studies["device"]))),
            "release": " and ".join(sorted(set(studies["date"].map(release_of)))),
        }
    }
    rows = []
    for name, found in {**facts, **{name: facts_of(name) for name in PAGES}}.items():
        title = (PAGES_FOLDER / f"{name}.md").read_text().splitlines()[0].removeprefix("# ")
        rows.append(
            {
                "question": f"[{title}]({name}.md)",
                "measured on": found["device"],
                "release": found["release"],
                "last on": found["date"][:10],
                "by": re.sub(" --[^`]*", "", found["command"]),
            }
        )
    return page("# Results", "What was measured, on what, and by which command:", table_of(rows))


def main() -> None:
    """Write all of them."""
    write_quality(RESULTS / "quality", PAGES_FOLDER)
    for name, write in PAGES.items():
        (PAGES_FOLDER / f"{name}.md").write_text(write())
    (PAGES_FOLDER / "index.md").write_text(index())


if __name__ == "__main__":
    main()
