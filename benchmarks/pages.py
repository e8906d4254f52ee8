"""Writes ``docs/results``: a page for each of the results in ``benchmarks/results``, and their index.

    python benchmarks/pages.py

A page has the table that a person needs first, and folded away the long form that the benchmark itself has written.
Those of the quality studies are made by ``studies/page.py``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import pandas

from provenance import RESULTS, ROOT
from studies.page import (
    LOFT,
    findings,
    folded,
    page,
    read_study,
    release_of,
    shown,
    table_of,
    versions_of,
    write_quality,
)

ALTERNATING = "LoFT alternating"
PAGES_FOLDER = ROOT / "docs" / "results"
# One of them has another name in what release 0.1 has measured.
STATE_KINDS = ("momentum", "second moments", "pending or before", "pending or previous", "bases", "kept rows")


def stored(name: str) -> dict[str, Any]:
    """A results file; of JSON lines, one a run, what the last one says, and all of them as ``runs``."""
    if (lines := RESULTS / f"{name}.jsonl").exists():
        runs = [json.loads(line) for line in lines.read_text().splitlines()]
        return {**runs[-1], "runs": runs}
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
    (file,) = (each.name for each in RESULTS.glob(f"{name}.json*"))
    data = {"data": f"[{file}](../../benchmarks/results/{file})"}
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


def share_of(taken: dict[str, float]) -> str:
    """LoFT's part of a training step, of which these are the seconds."""
    return f"{taken[LOFT] / (taken['forward and backward'] + taken[LOFT]):.1%}"


def step_time() -> str:
    """A step's time beside the floor."""
    found = stored("step_time")
    rows: list[dict[str, Any]] = []
    for run in found["training"]:
        taken = run["seconds"]
        row = {"r": run["rank"], LOFT: milliseconds(taken[LOFT]), "share of a training step": share_of(taken)}
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
        findings(RESULTS, "step_time"),
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


def grpo() -> str:
    """Rewards, norms and denominators of reinforcement learning at rank 1."""
    found = stored("grpo")
    runs = pandas.DataFrame(found["runs"])
    runs["earned"] = runs["reward"].map(fmean)
    runs["end"] = [rewards[-1] for rewards in runs["reward"]]
    case, first = ["method", "eps"], runs[runs["seed"] == 0].sort_values("lr")
    rewards, gradients, curves = [], [], []
    for (method, eps, lr), cell in runs.groupby([*case, "lr"]):
        if len(cell) == 1:
            continue
        swept = first[(first["method"] == method) & (first["eps"] == eps)]
        best = swept["earned"].idxmax() in cell.index
        edge = best and len(swept) > 1 and lr in (swept["lr"].min(), swept["lr"].max())
        row = {"optimizer": method, "eps": f"{eps:g}", "learning rate": f"{lr:g}{' *' * edge}"}
        rewards.append({**row, "all steps": shown(cell["earned"]), "last step": shown(cell["end"])})
        clipped_by, own = (float(cell[kind].explode().astype(float).median()) for kind in ("grad_norm", "factors_norm"))
        divisors = pandas.DataFrame(list(cell["denominators"])).median()
        kept = divisors["0.5"] / (divisors["0.5"] + eps)
        spread = {f"denominators, {float(part):.0%}": f"{value:.1e}" for part, value in divisors.items()}
        norms = {"norm that is clipped": f"{clipped_by:.2g}", "norm of the factors' gradients": f"{own:.2g}"}
        gradients.append({**row, **norms, **spread, "eps leaves": f"{kept:.2g}"})
        means = pandas.DataFrame(cell["reward"].tolist()).mean()
        curves.append({**row, **{f"{step}": f"{value:.2f}" for step, value in enumerate(means, start=1)}})
    sweep = [
        {"optimizer": method, "eps": f"{eps:g}", "learning rate": f"{lr:g}", "all steps": f"{earned:.3f}"}
        for method, eps, lr, earned in first[[*case, "lr", "earned"]].itertuples(index=False)
    ]
    return page(
        "# Does eps explain a bad run at rank 1?",
        measured("grpo"),
        f"SmolLM2-135M-Instruct learns by TRL's GRPO to answer in digits, {found['steps']} steps at r = 1.\n"
        "The reward is the share of an answer's characters that are digits. Means of the seeds with 95% intervals:",
        table_of(rewards),
        "Each case is at the best of its swept rates, by the reward of all steps with seed 0.\n"
        "So that eps alone differs, LoFT is at other rates too.\n"
        "The comparison at the lowest rate, and eps above 0.0001, were added when the first results were known.\n"
        "`*` says that the best rate lies at the edge of its sweep: a wider one may do better.",
        "Gradients of a hundredth of the length are like eps multiplied by a hundred: 0.01 stands for 0.0001.\n"
        "Such gradients would not be clipped, and ours are, so they would fare somewhat better.",
        "[What it says of a public run](../reproducing-the-paper.md#does-eps-explain-the-public-run).",
        "## What the denominators are",
        "Medians over seeds, of norms over steps too. A norm is zero where all answers earn the same:",
        table_of(gradients),
        "LoFT clips by its own norm. LoRA clips by that of the factors' gradients, which is shown again after that.",
        "A denominator is the `sqrt(v)` that AdamW adds eps to, at the end of a run.\n"
        "LoRA's are of the factors' numbers, LoFT's of the full matrices'. Shown are 10%, 50% and 90% quantiles.\n"
        "`eps leaves` is the part of a step that is left where the denominator is the middle one.",
        folded("Reward of every step", "Means over seeds.", table_of(curves)),
        folded("The sweep", "Reward of all steps with seed 0.", table_of(sweep)),
        source_of("grpo", runs=len(runs), commits=", ".join(sorted({commit[:12] for commit in runs["commit"]}))),
    )


def reliability() -> str:
    """What faults have cost."""
    found = stored("reliability")
    runs, settings = faulty_of(found), found["settings"]
    jobs = {kind: [job for run in each for job in run["jobs"]] for kind, each in runs.items()}
    every = [job for each in jobs.values() for job in each]
    faults = []
    for kind, happens in FAULTS.items():
        row = {f"on {name}": sum(job["fault"] == kind for job in each) for name, each in jobs.items()}
        ends = [job["seconds to end"] for job in every if job["fault"] == kind] or [math.nan]
        ended = {"seconds until all have ended": f"{median(ends):.1f}, at most {max(ends):.1f}"}
        faults.append({"fault": kind, "what happens": happens, **row, **ended})
    cells = {name: losses_of(each) for name, each in runs.items()}
    rows = [
        {"": key, **{f"on {name}": cell[key] for name, cell in cells.items()}} for key in next(iter(cells.values()))
    ]
    hung = [
        f"{job['fault']} of rank {job['victim']} {'after' if 'last' in job else 'before'} the job's first step"
        for job in every
        if job["hung"]
    ]
    late = sum(job["fault"] == LATE for job in every)
    elsewhere = [run for run in found["runs"][1:] if not run["faults"]]
    unfaulted = [
        {
            "unbroken run": run["name"].partition(", ")[2],
            "furthest loss of a step": f"{run['furthest loss']:.1g}",
            "furthest weights": f"{run['furthest weights']:.1g}",
        }
        for run in elsewhere
    ]
    ranks, stages = ({job[key] for job in jobs["other ranks"]} for key in ("ranks", "stage"))
    first = found["runs"][0]["jobs"][0]
    return page(
        "# Is anything lost when a job is killed?",
        measured("reliability"),
        f"Faults came for {settings['minutes']} minutes, to a small Llama that `launch/train.py` trains in float32.\n"
        f"A run has {settings['steps']} steps, saves every {settings['save']} and keeps one checkpoint. "
        "After a fault the same command goes on.\n"
        f"What happens, to which rank and after which step is drawn from seed {settings['seed']}.\n"
        "Every rank is on a host of its own, a network namespace.",
        table_of(faults),
        "The seconds are the median and the most, from the fault until no rank runs. "
        f"A collective may wait for {settings['timeout']} s.\n"
        "Ranks end by themselves or by the fault. One that has not after 180 s is ended, as is a stopped one after its "
        "peers.\n"
        f"Jobs that ended at a time-out without a fault, on a machine too busy: {late}.\n"
        f"Jobs of which a rank had to be ended: {len(hung)}.",
        "\n".join(f"- {job}" for job in hung),
        JOINING if hung else "",
        "## What was lost",
        table_of(rows),
        "Steps since the last checkpoint are done again.\n"
        "A step is lost if it was saved and a restart goes on from before it.\n"
        "It was saved if a later step had begun, or if all ranks had answered SIGTERM.\n"
        "After every job the newest whole checkpoint is read and checked against its digests.",
        f"The unbroken run is on {first['ranks']} ranks at ZeRO {first['stage']}, as are the runs on the same ranks.\n"
        "The others change at every second restart. "
        f"They were on {min(ranks)} to {max(ranks)} ranks, at ZeRO {min(stages)} to {max(stages)}.\n"
        "Other ranks sum in another order. How far that carries a run without any fault:",
        table_of(unfaulted),
        "![Losses under faults and unbroken](../pictures/reliability.png)",
        source_of("reliability", settings=settings),
    )


LATE = "time-out, not injected"
JOINING = "Before its first step a job joins its process group. These ran before twice `--ddp_timeout` bounded that."
FAULTS = {
    "SIGKILL": "one rank dies",
    "SIGKILL of all ranks": "all die at once",
    "SIGKILL in a save": "one rank dies within 0.2 s of a save's begin",
    "SIGTERM": "one rank is told to end; all save",
    "SIGSTOP": "one rank stops and does not die",
    "cut network": "one rank's host loses its cable",
}


def faulty_of(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs under faults, by whether they stayed on their ranks."""
    kinds = ("same ranks", "other ranks")
    return {kind: [run for run in found["runs"] if run["name"].startswith(kind)] for kind in kinds}


def losses_of(runs: list[dict[str, Any]]) -> dict[str, str]:
    """What runs have lost, in words and numbers."""
    jobs = [job for run in runs for job in run["jobs"]]
    torn = 0
    for run in runs:
        for before, job in zip([{"torn": 0, "whole": 0}, *run["jobs"]], run["jobs"], strict=False):
            torn += bool(job["torn"]) and not (before["torn"] and before["whole"] == job["whole"])

    def total(key: str) -> int:
        return sum(run[key] for run in runs)

    return {
        "runs to their last step": str(len(runs)),
        "minutes of training": f"{total('seconds') / 60:.0f}",
        "faults": str(sum(job["fault"] in FAULTS for job in jobs)),
        "restarts elsewhere": str(
            sum(
                (a["ranks"], a["stage"]) != (b["ranks"], b["stage"])
                for run in runs
                for a, b in itertools.pairwise(run["jobs"])
            )
        ),
        "checkpoints left unfinished": str(torn),
        "steps done again": str(total("steps done again")),
        "of these on the same ranks and stage": str(total("on the same ranks and stage")),
        "of those with another loss": str(total("of these with another loss")),
        "steps lost": str(total("steps lost")),
        "steps missing in the curve": str(total("steps missing")),
        "bytes of checkpoints checked": f"{total('bytes checked'):,}",
        "bytes lost": str(total("bytes damaged")),
        "ranks that did not end": str(total("ranks hung")),
        "furthest loss of a step": f"{max(run['furthest loss'] for run in runs):.1g}",
        "furthest final weights": f"{max(run['furthest weights'] for run in runs):.1g}",
        "bytes of the final adapter that differ": (
            f"{total('bytes that differ')} of {total('bytes')}" if runs[0]["name"].startswith("same") else ""
        ),
    }


PAGES: dict[str, Callable[[], str]] = {
    "full_rank": full_rank,
    "step_time": step_time,
    "scaling": scaling,
    "traffic": traffic,
    "main_job": main_job,
    "resume": resume,
    "precision": precision,
    "grpo": grpo,
    "reliability": reliability,
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
