"""Prints what the README has by command: what was learned, what it costs, and, as a picture, what it needs.

python benchmarks/readme.py results
python benchmarks/readme.py cost
python benchmarks/readme.py step
python benchmarks/readme.py badges >docs/pictures/badges.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import metadata

import torch
from packaging.requirements import Requirement
from pages import FUSED, OFFICIAL, milliseconds, share_of, stored

from loft_ds.plan import GPUS, INTERCONNECTS, Job, memory, plan, shapes_of
from loft_ds.plan.hardware import USABLE
from loft_ds.plan.memory import STATE
from provenance import RESULTS
from studies.page import FULL, LOFT, LORA, MEASURES, OLD, chosen_of, read_study, table_of, values_of

TASKS = {
    "classification": "MiniLM on Reuters R8",
    "language": "SmolLM2-135M on Shakespeare",
    "tunes": "SmolLM2-135M on Irish tunes",
}
RANKS = (1, 2, 16)
MODELS, ADAPTERS, GPU, WIRE = ("Mistral-7B", "Llama-3-70B"), (16, 64), "H100", "ndr400"


def results() -> str:
    """Test loss of three tasks, each at the best of its swept rates: mean of the seeds with 95% intervals."""
    rows = []
    for name, task in TASKS.items():
        frame = read_study(RESULTS / "quality" / f"{name}.jsonl")
        chosen = chosen_of(frame)
        measure = next(name for name in MEASURES if name in frame)
        values = values_of(chosen, measure, (LOFT, OLD, LORA, FULL))
        loft = LOFT if LOFT in values else OLD
        for method in (loft, LORA):
            cells = {f"r = {rank}": values[method].get(rank, "not measured") for rank in RANKS}
            title = f"{LOFT} (release 0.1)" if method == OLD else method
            task_once, full_once = (task, values[FULL][0]) if method == loft else ("", "")
            rows.append({"test loss": task_once, "": title, **cells, "full fine-tuning": full_once})
    return table_of(rows)


def cost() -> str:
    """Planned memory and time on one node of 8 GPUs."""
    rows = []
    usable = USABLE * GPUS[GPU].memory
    for model in MODELS:
        shapes = shapes_of(model)
        for rank in ADAPTERS:
            state = sum(float(memory(shapes, Job(rank=rank))[kind].sum()) for kind in (*STATE, "bases"))
            lora = 2 * 4 * sum(factor.numel for factor in shapes.factors(rank))  # two float32 moments
            plans = {
                stage: plan(shapes, Job(rank=rank, world=8, stage=stage), GPUS[GPU], INTERCONNECTS[WIRE])
                for stage in (2, 3)
            }
            held = {
                f"a GPU's memory, ZeRO {stage}": f"{each.peak / 1e9:.0f} GB"
                + (" (too much)" if each.peak > usable else "")
                for stage, each in plans.items()
            }
            share = f"{plans[3].optimizer_share:.0%}"
            states = {"state of LoFT": f"{state / 1e9:.1f} GB", "of LoRA": f"{lora / 1e9:.1f} GB"}
            row = {f"8 x {GPU}, planned": model, "r": str(rank), **states, **held}
            rows.append({**row, "LoFT's part of a step, ZeRO 3": share})
    return table_of(rows)


def step() -> str:
    """Measured time of a step of SmolLM2-135M's pairs."""
    rows = []
    for run in stored("step_time")["training"]:
        taken = run["seconds"]
        times = {LOFT: taken[LOFT], "the authors' code": taken[OFFICIAL], "LoRA's AdamW": taken[FUSED]}
        shown = {name: f"{milliseconds(each)} ms" for name, each in times.items()}
        rows.append(
            {"a step, measured": f"r = {run['rank']}", **shown, "LoFT's part of a training step": share_of(taken)}
        )
    return table_of(rows)


def badges() -> str:
    """What a machine must have and the license, as the package's metadata say them: an SVG."""
    package = metadata("loft_ds")
    required = [Requirement(line) for line in package.get_all("Requires-Dist") or []]
    least = {"python": package["Requires-Python"], **{each.name: str(each.specifier) for each in required}}
    said = {name: f"{least[name.lower()].removeprefix('>=')} or newer" for name in ("Python", "torch", "DeepSpeed")}
    x, parts = 0, []
    for words in ({**said, "license": package["License-Expression"]}).items():
        for text, colour in zip(words, ("#444", "#0072b2"), strict=True):
            long = 7 * len(text)  # whatever the font, and 5 on each side
            parts.append(f'<rect x="{x}" width="{long + 10}" height="20" fill="{colour}"/>')
            parts.append(f'<text x="{x + 5}" y="14" textLength="{long}">{text}</text>')
            x += long + 10
        x += 6
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{x - 6}" height="20" fill="#fff" font-size="12"'
    return "\n".join([f'{head} font-family="sans-serif">', *parts, "</svg>"])


PRINTED: dict[str, Callable[[], str]] = {"results": results, "cost": cost, "step": step, "badges": badges}


def main() -> None:
    """Print one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=PRINTED)
    torch.set_num_threads(1)  # a plan is many small operations, in which threads would only wait for each other
    print(PRINTED[parser.parse_args().what]())


if __name__ == "__main__":
    main()
