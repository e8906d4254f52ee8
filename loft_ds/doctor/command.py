"""Before a long job: is every node as the others, do they reach each other, does LoFT step right, will the job fit?

    deepspeed --hostfile hosts --module loft_ds.doctor --deepspeed zero3.json --output_dir runs/big --model meta/llama
    torchrun --nnodes 2 ... -m loft_ds.doctor ...
    srun python -m loft_ds.doctor ...
    python -m loft_ds.doctor                              # this process alone

Start it as the job itself will be started. The first rank prints a table; the exit status is 0 only if all is well.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from deepspeed.utils import logger
from tabulate import tabulate

from ..ranks import rank_and_world
from .checks import check_all_reduce, check_disk, check_memory, check_settings, check_shared_folder
from .facts import known
from .findings import Finding, compare, errors_of
from .meeting import identify, joined
from .step import check_step


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m loft_ds.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", metavar="JSON", help="the job's DeepSpeed settings (default: ZeRO 2)")
    parser.add_argument("--output_dir", default="runs", help="where the job will write (default: runs)")
    parser.add_argument("--model", help="of the job, to plan its memory: what python -m loft_ds.plan takes")
    parser.add_argument("--lora_rank", type=int, default=8, help="of the job's adapters (default 8)")
    parser.add_argument("--offload_second_moment", action="store_true", help="as the job")
    parser.add_argument("--second_moment_dtype", choices=["float32", "bfloat16"], default="float32", help="as the job")
    parser.add_argument("--tokens", type=int, default=4096, help="of one rank in a step of the job (default 4096)")
    parser.add_argument("--megabytes", type=int, default=64, help="to all-reduce (default 64)")
    parser.add_argument("--timeout", type=int, default=120, help="seconds that ranks wait for each other (default 120)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Examines the machine and prints a table.

    Returns:
        The exit status, the same on every rank.
    """
    options = parse(arguments)
    logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries
    if not dist.is_initialized():
        identify()
    with joined(known(options), options.timeout) as everyone:
        findings = examine(options, everyone)
        if int(os.environ["RANK"]) == 0:
            marks = {True: "ok", False: "FAIL", None: "-"}
            print(tabulate([[f.check, marks[f.well], f.found] for f in findings], ["check", "", "found"]), flush=True)
    return int(any(finding.well is False for finding in findings))


def examine(options: argparse.Namespace, everyone: Sequence[dict[str, Any]]) -> list[Finding]:
    """Everything the doctor looks at. A collective unless a rank is ill; the same on every rank."""
    nodes = [each["node"] for each in everyone]
    per_node = Counter(nodes)
    findings = [Finding("ranks", f"{len(nodes)} on {', '.join(f'{node} ({n})' for node, n in per_node.items())}")]
    well = {rank: each for rank, each in enumerate(everyone) if not each["ill"]}
    if len(well) < len(nodes):
        findings += [Finding("ill", errors_of([each["ill"] for each in everyone], nodes), False)]
    for key in next(iter(well.values()), {"same": ()})["same"]:
        findings += [compare(key, {rank: each["same"][key] for rank, each in well.items()}, nodes)]
    if len(well) < len(nodes):
        return [*findings, Finding("the rest", "left out until all ranks are well", None)]
    findings += [check_settings(options, everyone, nodes), check_disk(options, everyone, nodes)]
    findings += [check_shared_folder(options, nodes), check_all_reduce(options.megabytes, nodes)]
    if any(each["wrong"] for each in everyone):
        left_out = "left out until the DeepSpeed JSON is right"
        return [*findings, Finding("LoFT step", left_out, None), Finding("memory", left_out, None)]
    findings += [check_step(options, everyone[rank_and_world()[0]]["settings"], nodes)]
    return [*findings, *check_memory(options, everyone, nodes)]
