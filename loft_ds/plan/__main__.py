"""Will it fit, and how long is a step: ``python -m loft_ds.plan MODEL --rank 64 --nodes 8 --stage 3``."""

from __future__ import annotations

import argparse
import bisect
import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .division import Job
from .hardware import GPUS, INTERCONNECTS, USABLE, Gpu
from .memory import OFFLOADED, peak
from .plan import Plan, plan
from .shapes import BUILTIN, Shapes, shapes_of

GB = 1e9


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loft_ds.plan", description=__doc__.split(":")[0])
    parser.add_argument("model", help=f"a config.json or its folder, a hub name, or one of {', '.join(BUILTIN)}")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--stage", type=int, choices=range(4), default=3, help="of ZeRO (default 3)")
    parser.add_argument("--offload", nargs="+", choices=sorted(OFFLOADED), default=[], help="to CPU memory")
    parser.add_argument("--second-moment-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the weights")
    quantised = parser.add_mutually_exclusive_group()
    quantised.add_argument("--load-in-4bit", action="store_true", help="the frozen linear layers, by bitsandbytes")
    quantised.add_argument("--load-in-8bit", action="store_true", help="the same in 8 bits")
    parser.add_argument("--double-quant", action="store_true", help="of --load-in-4bit: its scales as well")
    parser.add_argument("--tokens", type=int, default=4096, help="of one GPU in a step (default 4096)")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--interconnect", choices=INTERCONNECTS, default="ndr400", help="of a GPU to other nodes")
    parser.add_argument("--sweep", type=Path, metavar="PNG", help="draw memory and step time over 1 to 4096 ranks")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    options = parser.parse_args(arguments)
    if min(options.nodes, options.gpus_per_node, options.rank, options.tokens) < 1:
        parser.error("--nodes, --gpus-per-node, --rank and --tokens must be positive")
    if options.double_quant and not options.load_in_4bit:
        parser.error("--double-quant is of --load-in-4bit, which is not given")
    possible = stages(options.offload)
    if options.stage not in possible:
        parser.error(f"--offload {' '.join(options.offload)}: DeepSpeed does it from stage {possible.start} on")
    return options


def stages(offload: Collection[str]) -> range:
    """The stages of ZeRO at which DeepSpeed offloads these."""
    return range(3 if "param" in offload else 1 if "optimizer" in offload else 0, 4)


def job_of(options: argparse.Namespace) -> Job:
    """What the command line asks for."""
    return Job(
        rank=options.rank,
        world=options.nodes * options.gpus_per_node,
        stage=options.stage,
        precision=2 if options.precision == "bf16" else 4,
        quantised=quantised_of(options),
        second_moment=2 if options.second_moment_dtype == "bfloat16" else 4,
        offload=frozenset(options.offload),
        tokens=options.tokens,
        per_node=options.gpus_per_node,
    )


def quantised_of(options: argparse.Namespace) -> str:
    """How the frozen weights are quantised, as :class:`Job` has it."""
    if options.load_in_8bit:
        return "8bit"
    return ("4bit-double" if options.double_quant else "4bit") if options.load_in_4bit else ""


def smallest_stage(shapes: Shapes, job: Job, gpu: Gpu) -> int | None:
    """The first stage at which the job fits; None if it fits at none."""
    return next((s for s in stages(job.offload) if peak(shapes, replace(job, stage=s)) <= USABLE * gpu.memory), None)


def largest_rank(shapes: Shapes, job: Job, gpu: Gpu) -> int:
    """The largest rank of the adapters that fits; 0 if none does."""

    def too_large(rank: int) -> bool:
        return peak(shapes, replace(job, rank=rank)) > USABLE * gpu.memory

    ranks = range(1, shapes.largest_rank + 1)
    if not too_large(ranks[-1]):  # so it is on many GPUs, and then it is found at once
        return ranks[-1]
    return bisect.bisect(ranks, False, key=too_large)


def summary(shapes: Shapes, found: Plan, gpu_name: str, interconnect: str) -> str:
    """What the command prints."""
    job, gpu = found.job, GPUS[gpu_name]
    stage, rank = smallest_stage(shapes, job, gpu), largest_rank(shapes, job, gpu)

    def table(title: str, kinds: dict[str, float], unit: float, name: str) -> list[str]:
        return [title, *(f"  {kind:<22}{value / unit:12.3f} {name}" for kind, value in kinds.items())]

    matrices, left = (sum(layer.experts for layer in layers) for layers in (shapes.layers, shapes.small(job.rank)))
    traffic, nodes = found.traffic, math.ceil(job.world / job.per_node)
    received = {kind: getattr(traffic, kind) for kind in ("gradients", "updates", "partners", "products")}
    fits = found.peak <= USABLE * gpu.memory
    return "\n".join(
        [
            f"{shapes.name}: {shapes.parameters / GB:.2f} billion frozen weights, {matrices} adapted "
            f"matrices at rank {job.rank}, {job.world} ranks on {nodes} node{'' if nodes == 1 else 's'}, "
            f"ZeRO {job.stage}" + (f", frozen linear layers in {job.quantised}" if job.quantised else ""),
            *([f"{left} matrices have fewer inputs or outputs than that: LoFT leaves them to AdamW"] if left else []),
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
            *table(
                f"Seconds of a step of {job.tokens} tokens on {gpu_name} and {interconnect}, from",
                found.seconds,
                1,
                "s",
            ),
            f"  The optimizer's share is {100 * found.optimizer_share:.2f}% where nothing overlaps. Peak rates are the "
            "makers', their efficiency is assumed (loft_ds/plan/hardware.py): not measured.",
        ]
    )


def sweep(shapes: Shapes, job: Job, gpu_name: str, wire: float) -> list[dict[str, Any]]:
    """Memory and time of a step at every possible stage over 1, 2, 4, ... 4096 ranks."""
    rows = []
    for stage in stages(job.offload):
        for power in range(13):
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
    torch.set_num_threads(1)  # many small operations, in which threads would only wait for each other
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
        print(
            json.dumps(rows)
            if options.json
            else "\n".join(
                f"stage {r['stage']} {r['ranks']:5} ranks {r['GB']:10.2f} GB {r['seconds']:10.3f} s "
                f"optimizer {100 * r['share']:5.1f}%"
                for r in rows
            )
        )
        return
    found = plan(shapes, job, GPUS[options.gpu], wire)
    if options.json:
        print(json.dumps({**asdict(found), "job": {**asdict(job), "offload": sorted(job.offload)}, "peak": found.peak}))
    else:
        print(summary(shapes, found, options.gpu, options.interconnect))


if __name__ == "__main__":
    main()
