"""``python -m loft_ds.plan MODEL --rank 64 --nodes 8 --gpus-per-node 8 --stage 3``: will it fit, and how long is a step."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .hardware import GPUS, INTERCONNECTS, USABLE, Gpu
from .model import OFFLOADED, Job, Plan, peak, plan
from .shapes import BUILTIN, Shapes, shapes_of

GB = 1e9


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loft_ds.plan", description=__doc__.split(":")[1].strip())
    parser.add_argument("model", help=f"a config.json or its folder, a hub name, or one of {', '.join(BUILTIN)}")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--stage", type=int, choices=range(4), default=3, help="of ZeRO (default 3)")
    parser.add_argument("--offload", nargs="+", choices=sorted(OFFLOADED), default=[], help="to CPU memory")
    parser.add_argument("--second-moment-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the weights")
    parser.add_argument("--tokens", type=int, default=4096, help="of one GPU in a step (default 4096)")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--interconnect", choices=INTERCONNECTS, default="ndr400", help="of a GPU to other nodes")
    parser.add_argument("--sweep", type=Path, metavar="PNG", help="draw memory and step time over 1 to 4096 ranks")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    options = parser.parse_args(arguments)
    if min(options.nodes, options.gpus_per_node, options.rank, options.tokens) < 1:
        parser.error("--nodes, --gpus-per-node, --rank and --tokens must be positive")
    if "param" in options.offload and options.stage != 3:
        parser.error("--offload param: DeepSpeed offloads parameters at stage 3 only")
    if "optimizer" in options.offload and options.stage == 0:
        parser.error("--offload optimizer: DeepSpeed offloads the optimizer at stages 1 to 3")
    return options


def job_of(options: argparse.Namespace) -> Job:
    return Job(
        rank=options.rank,
        world=options.nodes * options.gpus_per_node,
        stage=options.stage,
        precision=2 if options.precision == "bf16" else 4,
        second_moment=2 if options.second_moment_dtype == "bfloat16" else 4,
        offload=frozenset(options.offload),
        tokens=options.tokens,
        per_node=options.gpus_per_node,
    )


def smallest_stage(shapes: Shapes, job: Job, gpu: Gpu) -> int | None:
    """The first stage at which the job fits; None if it fits at none."""
    possible = range(3 if "param" in job.offload else 1 if "optimizer" in job.offload else 0, 4)
    return next((s for s in possible if peak(shapes, replace(job, stage=s)) <= USABLE * gpu.memory), None)


def largest_rank(shapes: Shapes, job: Job, gpu: Gpu) -> int:
    """The largest rank of the adapters that fits; 0 if none does."""
    low, high = 0, shapes.largest_rank
    while low < high:
        middle = (low + high + 1) // 2
        if peak(shapes, replace(job, rank=middle)) <= USABLE * gpu.memory:
            low = middle
        else:
            high = middle - 1
    return low


def summary(shapes: Shapes, found: Plan, gpu_name: str, interconnect: str) -> str:
    """What the command prints."""
    job, gpu = found.job, GPUS[gpu_name]
    stage, rank = smallest_stage(shapes, job, gpu), largest_rank(shapes, job, gpu)

    def table(title: str, kinds: dict[str, float], unit: float, name: str) -> list[str]:
        return [title, *(f"  {kind:<22}{value / unit:12.3f} {name}" for kind, value in kinds.items())]

    traffic = found.traffic
    received = {kind: getattr(traffic, kind) for kind in ("gradients", "values", "updates", "partners", "products")}
    fits = found.peak <= USABLE * gpu.memory
    return "\n".join(
        [
            f"{shapes.name}: {shapes.parameters / GB:.2f} billion frozen weights, {len(shapes.layers)} adapted matrices "
            f"at rank {job.rank}, {job.world} ranks on {math.ceil(job.world / job.per_node)} nodes, ZeRO {job.stage}",
            "",
            *table("Memory of a GPU, the fullest:", found.memory, GB, "GB"),
            *table("and for a time within a step (an estimate; with checkpointing):", found.work, GB, "GB"),
            f"  {'together':<22}{found.peak / GB:12.3f} GB of {USABLE * gpu.memory / GB:.0f} usable on {gpu_name}: "
            + ("fits" if fits else "DOES NOT FIT"),
            *(table("In CPU memory, each rank:", found.on_cpu, GB, "GB") if found.on_cpu else []),
            f"Largest share of the state over the mean one: {found.imbalance:.4f}",
            f"Smallest stage that fits: {'none' if stage is None else stage}",
            f"Largest rank that fits at stage {job.stage}: {rank or 'none'}",
            f"Checkpoint: {found.checkpoint / GB:.3f} GB",
            "",
            *table("Received by a rank in a step, for LoFT:", received, 1e6, "MB"),
            f"  {'together':<22}{traffic.total / 1e6:12.3f} MB in {traffic.collectives:g} collectives; the least that "
            f"its rows demand is {traffic.least / 1e6:.3f} MB",
            *table("and by DeepSpeed:", found.deepspeed, 1e6, "MB"),
            "",
            *table(f"Seconds of a step of {job.tokens} tokens on {gpu_name} and {interconnect}, from", found.seconds, 1, "s"),
            f"  The optimizer's share is {100 * found.optimizer_share:.2f}% where nothing overlaps. Peak rates are the "
            "makers', their efficiency is assumed (loft_ds/plan/hardware.py): not measured.",
        ]
    )


def sweep(shapes: Shapes, job: Job, gpu_name: str, wire: float) -> list[dict[str, Any]]:
    """Memory and time of a step at every stage over 1, 2, 4, ... 4096 ranks."""
    rows = []
    for stage in range(4):
        for power in range(13):
            if set(job.offload) & {"optimizer", "param"} and stage < 3:
                continue
            found = plan(shapes, replace(job, stage=stage, world=2**power), GPUS[gpu_name], wire)
            rows.append(
                {"stage": stage, "ranks": 2**power, "GB": found.peak / GB, "seconds": sum(found.seconds.values())}
                | {"share": found.optimizer_share}
            )
    return rows


def draw(rows: list[dict[str, Any]], title: str, usable: float, path: Path) -> None:
    """Both curves of a sweep, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for stage in sorted({row["stage"] for row in rows}):
        own = [row for row in rows if row["stage"] == stage]
        ranks = [row["ranks"] for row in own]
        memory.loglog(ranks, [row["GB"] for row in own], "o-", base=2, label=f"stage {stage}")
        seconds.loglog(ranks, [row["seconds"] for row in own], "o-", base=2, label=f"stage {stage}")
    memory.axhline(usable / GB, color="gray", linestyle=":", label="usable")
    memory.set(xlabel="ranks", ylabel="GB of a GPU")
    seconds.set(xlabel="ranks", ylabel="seconds of a step (planned)")
    for axes in (memory, seconds):
        axes.set_yscale("log", base=10)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(arguments)
    wire = INTERCONNECTS[options.interconnect]
    try:
        shapes = shapes_of(options.model)
        job = job_of(options)
        shapes.factors(job.rank)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if options.sweep:
        rows = sweep(shapes, job, options.gpu, wire)
        title = f"{shapes.name}, rank {job.rank}, {options.gpu}, {options.interconnect}"
        draw(rows, title, USABLE * GPUS[options.gpu].memory, options.sweep)
        print(json.dumps(rows) if options.json else "\n".join(
            f"stage {r['stage']} {r['ranks']:5} ranks {r['GB']:10.2f} GB {r['seconds']:10.3f} s "
            f"optimizer {100 * r['share']:5.1f}%" for r in rows
        ))
        return
    found = plan(shapes, job, GPUS[options.gpu], wire)
    if options.json:
        print(json.dumps({**asdict(found), "job": {**asdict(job), "offload": sorted(job.offload)}, "peak": found.peak}))
    else:
        print(summary(shapes, found, options.gpu, options.interconnect))


if __name__ == "__main__":
    main()
