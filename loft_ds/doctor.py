"""Before a long job: is every node as the others, do they reach each other, does LoFT step right, will the job fit?

    deepspeed --hostfile hosts --module loft_ds.doctor --deepspeed zero3.json --output_dir runs/big --model meta/llama
    torchrun --nnodes 2 ... -m loft_ds.doctor ...
    python -m loft_ds.doctor                              # this process alone

Start it as the job itself will be started. The first rank prints a table; the exit status is 0 only if all is well.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import socket
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn

from .durable import all_gather, bound_collectives
from .optimizer import LoFTAdamW
from .plan import Job, peak, shapes_of
from .plan.hardware import USABLE
from .settings import SettingsError, check_loft_settings, read_deepspeed_json

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "loft_ds")
GB = 1e9
# The part of a DeepSpeed JSON that decides how LoFT's step is spread over ranks.
STEP_SETTINGS = ("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
# float32: ranks sum gradients in another order than one process does. Two steps of 1e-2 carry an error of 1e-7 on.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was looked at.
        found: what was seen; where it is not well, on which node.
        well: False fails the doctor, None is a remark.
    """

    check: str
    found: str
    well: bool | None = True


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m loft_ds.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", metavar="JSON", help="the job's DeepSpeed settings (default: ZeRO 2)")
    parser.add_argument("--output_dir", default="runs", help="where the job will write (default: runs)")
    parser.add_argument("--model", help="of the job, to plan its memory: what python -m loft_ds.plan takes")
    parser.add_argument("--lora_rank", type=int, default=8, help="of the job's adapters (default 8)")
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
    with _joined(options.timeout):
        findings = examine(options)
        if dist.get_rank() == 0:
            marks = {True: "ok", False: "FAIL", None: "-"}
            print(tabulate([[f.check, marks[f.well], f.found] for f in findings], ["check", "", "found"]), flush=True)
    return int(any(finding.well is False for finding in findings))


@contextmanager
def _joined(seconds: int) -> Iterator[None]:
    """All ranks that the launcher started, in one process group; this process alone where there was no launcher."""
    if get_accelerator().device_name() == "cpu":
        # Else DeepSpeed compiles an extension for a minute or two, which only tensor-parallel layers call.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        yield
        return
    if not {"RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
            alone["MASTER_PORT"] = free.getsockname()[1]
        os.environ.update({name: str(value) for name, value in alone.items()})
    try:
        deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=seconds))
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        sys.exit(
            f"doctor: rank {os.environ.get('RANK')} on {socket.gethostname()}: not all {os.environ.get('WORLD_SIZE')} "
            f"ranks met at {where} within {seconds} s: {str(error).splitlines()[0]}"
        )
    try:
        yield
    finally:
        dist.destroy_process_group()


def examine(options: argparse.Namespace) -> list[Finding]:
    """Everything the doctor looks at. A collective; the same on every rank."""
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    own = facts(options)
    everyone = all_gather(own)
    nodes = [each["node"] for each in everyone]
    per_node = Counter(nodes)
    findings = [Finding("ranks", f"{len(nodes)} on {', '.join(f'{node} ({n})' for node, n in per_node.items())}")]
    findings += [compare(key, [each["same"][key] for each in everyone], nodes) for key in own["same"]]
    findings += [_settings(options, [each["settings"] for each in everyone], nodes)]
    findings += [_disk(options, [each["free"] for each in everyone], nodes), _shared(options, nodes)]
    findings += [_all_reduce(options.megabytes, nodes)]
    if any(each["settings"]["said"] for each in everyone):
        findings += [Finding("LoFT step", "left out until the DeepSpeed JSON is right", None)]
    else:
        findings += [_step(options, nodes)]
    findings += [_memory(options, [each["memory"] for each in everyone], nodes)]
    return findings


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What this rank knows of itself; ``same`` is what must be alike on all."""
    accelerator, backend = get_accelerator(), dist.get_backend()
    on_gpu = accelerator.device_name() != "cpu"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else None
    # Ranks of one node share its main memory.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    memory = accelerator.total_memory() if on_gpu else psutil.virtual_memory().total // local
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else accelerator.device_name()
    try:
        settings = read_settings(options)
        said = None
    except SettingsError as error:
        settings, said = None, str(error)
    content = Path(options.deepspeed).read_bytes() if options.deepspeed and Path(options.deepspeed).is_file() else b""
    return {
        "node": socket.gethostname(),
        "same": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
            "backend": f"{backend} {nccl or ''}".strip(),
            "device": f"{name}, {memory / GB:.0f} GB" if on_gpu else name,
        },
        "settings": {"said": said, "digest": hashlib.sha256(content).hexdigest()[:12], "stage": stage_of(settings)},
        "free": shutil.disk_usage(_existing(Path(options.output_dir))).free,
        "memory": memory,
    }


def read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The job's DeepSpeed settings.

    Raises:
        SettingsError: DeepSpeed does not know or accept something in them, or LoFT cannot train under them.
    """
    if options.deepspeed is None:
        return {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    settings = read_deepspeed_json(options.deepspeed)
    check_loft_settings(options.deepspeed, settings)
    return settings


def stage_of(settings: dict[str, Any] | None) -> int:
    """The ZeRO stage of DeepSpeed settings."""
    return int((settings or {}).get("zero_optimization", {}).get("stage", 0))


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def where(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """``node1 (rank 4, 5)``: a node with those of the given ranks that run on it."""
    on: dict[str, list[str]] = {}
    for rank in ranks:
        on.setdefault(nodes[rank], []).append(str(rank))
    return ", ".join(f"{node} (rank {', '.join(ranks)})" for node, ranks in on.items())


def compare(check: str, values: Sequence[str], nodes: Sequence[str]) -> Finding:
    """What all ranks have, or what most have and who differs."""
    usual = Counter(values).most_common(1)[0][0]
    strange: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        if value != usual:
            strange.setdefault(value, []).append(rank)
    others = [f"{value} on {where(ranks, nodes)}" for value, ranks in strange.items()]
    return Finding(check, "; ".join([usual, *others]), not others)


def _settings(options: argparse.Namespace, found: Sequence[dict[str, Any]], nodes: Sequence[str]) -> Finding:
    check = "DeepSpeed JSON"
    said = {
        each["said"]: [r for r, e in enumerate(found) if e["said"] == each["said"]] for each in found if each["said"]
    }
    if said:
        return Finding(check, "; ".join(f"{error}, on {where(ranks, nodes)}" for error, ranks in said.items()), False)
    if options.deepspeed is None:
        return Finding(check, "none given: ZeRO 2 is tried", None)
    digests = compare(check, [f"{options.deepspeed}, sha256 {each['digest']}" for each in found], nodes)
    return Finding(check, f"ZeRO {found[0]['stage']}: {digests.found}", digests.well)


def _disk(options: argparse.Namespace, free: Sequence[int], nodes: Sequence[str]) -> Finding:
    least = min(range(len(free)), key=free.__getitem__)
    found = f"{free[least] / GB:.1f} GB free at {options.output_dir}, least on {where([least], nodes)}"
    return Finding("disk", found, free[least] > 0)


def _shared(options: argparse.Namespace, nodes: Sequence[str]) -> Finding:
    """Whether all ranks see in the output folder what one of them writes there, as checkpoints need it."""
    folder = Path(options.output_dir)
    token = folder / ".doctor"
    said = None
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.write_text("seen by all ranks?")
        except OSError as error:
            said = f"rank 0 on {nodes[0]} cannot write into {folder}: {error.strerror}"
    said = all_gather(said)[0]
    seen = all_gather(token.is_file())
    if dist.get_rank() == 0:
        token.unlink(missing_ok=True)
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if said is None and blind:
        said = f"{folder} is not the same folder on {where(blind, nodes)}: checkpoints need one that all ranks see"
    return Finding("output folder", said or f"{folder}: all ranks see the same", said is None)


def _all_reduce(megabytes: int, nodes: Sequence[str]) -> Finding:
    """An all-reduce between all ranks: is it right, and how fast."""
    device, world, rank = torch.device(get_accelerator().current_device_name()), dist.get_world_size(), dist.get_rank()
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


def _step(options: argparse.Namespace, nodes: Sequence[str]) -> Finding:
    """A LoFT step of each factor of tiny adapters, under the job's ZeRO stage and offloading, against one process."""
    settings = read_settings(options)
    said = None
    try:
        distance = _distance(settings, options.timeout)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        distance, said = float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0]}"
    distances, errors = all_gather(distance), all_gather(said)
    failed = [rank for rank, error in enumerate(errors) if error]
    if failed:
        return Finding("LoFT step", f"{errors[failed[0]]}, on {where(failed, nodes)}", False)
    off = [rank for rank, value in enumerate(distances) if not value <= TOLERANCE]
    found = f"ZeRO {stage_of(settings)}, float32: {max(distances):.1e} from one process's"
    return Finding("LoFT step", found + (f", on {where(off, nodes)}" if off else ""), not off)


def _distance(settings: dict[str, Any], seconds: int) -> float:
    """The relative distance of the adapters after two steps from what this process computes alone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(get_accelerator().current_device_name())
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2 * world, 24, generator=generator).to(device)

    def loss_of(model: nn.Module, part: Tensor) -> Tensor:
        loss: Tensor = model(part).square().mean()
        return loss

    alone = _tiny_model().to(device)
    # eps of the size of these gradients: with 1e-8 the first step is their sign, also of those that are rounding alone.
    optimizer = LoFTAdamW(alone, lr=1e-2, eps=1e-3)
    for _ in range(2):
        loss_of(alone, data).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = _tiny_model()
    config = {key: _without_auto(settings[key]) for key in STEP_SETTINGS if key in settings}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=LoFTAdamW(model, lr=1e-2, eps=1e-3),
        config={**config, "train_micro_batch_size_per_gpu": 2},
    )
    bound_collectives(timedelta(seconds=seconds))
    for _ in range(2):
        engine.backward(loss_of(engine, data[2 * rank : 2 * rank + 2]))
        engine.step()
    squares = []
    for mine, theirs in zip(alone.parameters(), model.parameters(), strict=True):
        if mine.requires_grad:
            with deepspeed.zero.GatheredParameters([theirs], enabled=stage_of(settings) == 3):
                squares.append(
                    ((theirs.detach().to(device) - mine.detach()).square().sum(), mine.detach().square().sum())
                )
    engine.destroy()
    difference, size = (float(torch.stack(each).sum().sqrt()) for each in zip(*squares, strict=True))
    return difference / size


def _tiny_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(24, 33), nn.Tanh(), nn.Linear(33, 17))
        model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]))
        for name, param in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(param, std=0.3)
    return model


def _without_auto(section: Any) -> Any:
    """A section without the values that the Trainer fills in."""
    if not isinstance(section, dict):
        return section
    return {key: _without_auto(value) for key, value in section.items() if value != "auto"}


def _memory(options: argparse.Namespace, memory: Sequence[int], nodes: Sequence[str]) -> Finding:
    """The plan of the job's memory against the device that has least."""
    check = "memory"
    if options.model is None:
        return Finding(check, f"{min(memory) / GB:.0f} GB a rank; without --model nothing is planned", None)
    try:
        settings = read_settings(options)
        planned = peak(shapes_of(options.model), job_of(options, settings, len(nodes), max(Counter(nodes).values())))
    except (SettingsError, OSError, ValueError) as error:
        return Finding(check, f"{options.model}: {str(error).splitlines()[0]}", False)
    short = [rank for rank, has in enumerate(memory) if planned > USABLE * has]
    found = (
        f"{options.model} at rank {options.lora_rank} needs {planned / GB:.1f} GB of {min(memory) / GB:.0f} GB a rank"
    )
    return Finding(check, found + (f": too little on {where(short, nodes)}" if short else ""), not short)


def job_of(options: argparse.Namespace, settings: dict[str, Any], world: int, per_node: int) -> Job:
    """The coming job, as :mod:`loft_ds.plan` wants it described."""
    zero = settings.get("zero_optimization", {})
    offload = {
        what for what in ("optimizer", "param") if (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"
    }
    sixteen = any((settings.get(half) or {}).get("enabled") in (True, "auto") for half in ("bf16", "fp16"))
    return Job(
        rank=options.lora_rank,
        world=world,
        stage=stage_of(settings),
        precision=2 if sixteen else 4,
        offload=frozenset(offload),
        tokens=options.tokens,
        per_node=per_node,
    )


if __name__ == "__main__":
    sys.exit(main())
