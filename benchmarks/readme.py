"""Prints the tables that the README has: what was learned, and what it costs.

python benchmarks/readme.py results
python benchmarks/readme.py cost
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from loft_ds.plan import GPUS, INTERCONNECTS, Job, memory, plan, shapes_of
from loft_ds.plan.hardware import USABLE
from loft_ds.plan.memory import STATE
from provenance import RESULTS
from studies.page import FULL, LOFT, LORA, MEASURES, OLD, chosen_of, read_study, table_of, values_of

TASKS = {
    "classification": "MiniLM on Reuters R8",
    "language": "SmolLM2-135M on Shakespeare",
    "reviews": "MiniLM on film reviews",
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


TABLES: dict[str, Callable[[], str]] = {"results": results, "cost": cost}


def main() -> None:
    """Print one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    torch.set_num_threads(1)  # a plan is many small operations, in which threads would only wait for each other
    print(TABLES[parser.parse_args().table]())


if __name__ == "__main__":
    main()
