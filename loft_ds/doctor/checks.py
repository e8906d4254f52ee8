"""What is looked at once all ranks are well: settings, disk, the shared folder, the network, memory. LoFT's own step is
in ``step.py``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ..plan.hardware import USABLE
from ..ranks import all_gather, first_rank, rank_and_world
from .findings import GB, Finding, compare, errors_of, where
from .job import stage_of

# A checkpoint is written beside the one before; the Trainer keeps all of them unless told otherwise.
LEAST_CHECKPOINTS, FEW_CHECKPOINTS = 2, 5


def check_settings(options: argparse.Namespace, everyone: Sequence[dict[str, Any]], nodes: Sequence[str]) -> Finding:
    """Whether all ranks read the same DeepSpeed JSON, and one that is right."""
    check = "DeepSpeed JSON"
    if wrong := errors_of([each["wrong"] for each in everyone], nodes):
        return Finding(check, wrong, False)
    if options.deepspeed is None:
        return Finding(check, "none given: ZeRO 2 is tried", None)
    sums = {rank: f"{options.deepspeed}, sha256 {each['digest']}" for rank, each in enumerate(everyone)}
    same = compare(check, sums, nodes)
    return Finding(check, f"ZeRO {stage_of(everyone[0]['settings'])}: {same.found}", same.well)


def check_disk(options: argparse.Namespace, everyone: Sequence[dict[str, Any]], nodes: Sequence[str]) -> Finding:
    """The room for checkpoints where the job will write."""
    free = [each["disk"] for each in everyone]
    least = min(range(len(free)), key=free.__getitem__)
    found = f"{free[least] / GB:.1f} GB free at {options.output_dir}, least on {where([least], nodes)}"
    planned = everyone[least]["planned"]
    if planned is None:
        return Finding("disk", found, free[least] > 0)
    room = free[least] // planned["checkpoint"]
    found += f": room for {room} checkpoints of {planned['checkpoint'] / GB:.3f} GB"
    return Finding("disk", found, False if room < LEAST_CHECKPOINTS else None if room < FEW_CHECKPOINTS else True)


def check_shared_folder(options: argparse.Namespace, nodes: Sequence[str]) -> Finding:
    """Whether all ranks see in the output folder what one of them writes there, as checkpoints need it."""
    folder = Path(options.output_dir)
    token = folder / ".doctor"
    said = None
    if first_rank():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.write_text("seen by all ranks?")
        except OSError as error:
            said = f"rank 0 on {nodes[0]} cannot write into {folder}: {error.strerror}"
    said = all_gather(said)[0]
    seen = all_gather(os.access(token, os.R_OK))  # which never raises
    if first_rank() and seen[0]:
        token.unlink()
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if said is None and blind:
        said = f"{folder} is not the same folder on {where(blind, nodes)}: checkpoints need one that all ranks see"
    return Finding("output folder", said or f"{folder}: all ranks see the same", said is None)


def check_all_reduce(megabytes: int, nodes: Sequence[str]) -> Finding:
    """An all-reduce between all ranks: is it right, and how fast."""
    device, (rank, world) = torch.device(get_accelerator().current_device_name()), rank_and_world()
    numbers = torch.empty(megabytes * 10**6 // 4, device=device)
    seconds = []
    for _ in range(5):
        numbers.fill_(rank + 1)
        dist.barrier()
        get_accelerator().synchronize()
        begin = time.perf_counter()
        dist.all_reduce(numbers)
        get_accelerator().synchronize()
        seconds.append(time.perf_counter() - begin)
    wrong = [r for r, right in enumerate(all_gather(bool((numbers == world * (world + 1) / 2).all()))) if not right]
    if wrong:
        return Finding("all-reduce", f"wrong sums on {where(wrong, nodes)}", False)
    # The bytes that each rank sends and receives in a ring: what nccl-tests call the bus bandwidth.
    taken = max(all_gather(statistics.median(seconds)))
    bandwidth = 2 * (world - 1) / world * numbers.numel() * 4 / taken / GB
    return Finding("all-reduce", f"{megabytes} MB in {1000 * taken:.1f} ms, {bandwidth:.2f} GB/s of each rank")


def check_memory(
    options: argparse.Namespace, everyone: Sequence[dict[str, Any]], nodes: Sequence[str]
) -> list[Finding]:
    """The plan of the job's memory against what is free now."""
    ranks_on = Counter(nodes)
    host = [each["host"] / ranks_on[each["node"]] for each in everyone]  # ranks of one node share its main memory
    gpu = [each["gpu"] for each in everyone]
    if options.model is None:
        free = host if None in gpu else gpu
        return [Finding("memory", f"{min(free) / GB:.1f} GB free a rank; without --model nothing is planned", None)]
    if unplanned := errors_of([each["unplanned"] for each in everyone], nodes):
        return [Finding("memory", unplanned, False)]
    needed = everyone[0]["planned"]
    if None in gpu:
        return [_fits("memory", options, needed["device"] + needed["host"], host, nodes)]
    findings = [_fits("memory", options, needed["device"], gpu, nodes)]
    return findings + ([_fits("main memory", options, needed["host"], host, nodes)] if needed["host"] else [])


def _fits(
    check: str, options: argparse.Namespace, needed: float, free: Sequence[float], nodes: Sequence[str]
) -> Finding:
    short = [rank for rank, has in enumerate(free) if needed > USABLE * has]
    found = f"{options.model} at rank {options.lora_rank} needs {needed / GB:.1f} GB of {min(free) / GB:.1f} GB free"
    return Finding(check, f"{found} a rank" + (f": too little on {where(short, nodes)}" if short else ""), not short)
