"""Before a long job: is every node as the others, do they reach each other, does LoFT step right, will the job fit?

    deepspeed --hostfile hosts --module loft_ds.doctor --deepspeed zero3.json --output_dir runs/big --model meta/llama
    torchrun --nnodes 2 ... -m loft_ds.doctor ...
    srun python -m loft_ds.doctor ...
    python -m loft_ds.doctor                              # this process alone

Start it as the job itself will be started. The first rank prints a table; the exit status is 0 only if all is well.
What a rank knows of itself reaches the others through the store at which they meet: also that of one which has no
device, and from there no collective would.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import pickle
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import deepspeed.comm.comm
import deepspeed.ops
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.utils import logger
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.elastic.utils.store import synchronize

from .durable import all_gather, bound_collectives
from .optimizer import LoFTAdamW
from .plan import GPUS, INTERCONNECTS, Job, Shapes, plan, shapes_of
from .plan.hardware import USABLE
from .settings import SettingsError, check_loft_settings, read_deepspeed_json

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "loft_ds")
GB = 1e9
# The part of a DeepSpeed JSON that decides how LoFT's step is spread over ranks.
STEP_SETTINGS = ("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
# float32: ranks sum gradients in another order than one process does. Two steps of 1e-2 carry an error of 1e-7 on.
TOLERANCE = 1e-4
# A checkpoint is written beside the one before; the Trainer keeps all of them unless told otherwise.
LEAST_CHECKPOINTS, FEW_CHECKPOINTS = 2, 5
# What launchers that do not set RANK, WORLD_SIZE and LOCAL_RANK say instead. Open MPI's first: where Slurm starts it,
# its daemons are the tasks, and the ranks inherit their variables.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


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
    with _joined(known(options), options.timeout) as everyone:
        findings = examine(options, everyone)
        if int(os.environ["RANK"]) == 0:
            marks = {True: "ok", False: "FAIL", None: "-"}
            print(tabulate([[f.check, marks[f.well], f.found] for f in findings], ["check", "", "found"]), flush=True)
    return int(any(finding.well is False for finding in findings))


def identify() -> None:
    """Leaves RANK and its like in the environment as torchrun does; without a launcher this process is alone."""
    if "RANK" not in os.environ:
        launcher = next((names for names in LAUNCHERS if int(os.environ.get(names[1], 1)) > 1), None)
        found = _told(launcher) if launcher else _alone()
        os.environ.update({name: str(value) for name, value in found.items()})
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        sys.exit(f"doctor: rank {os.environ['RANK']}: {' and '.join(missing)} not set: export where rank 0 is met")


def _alone() -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _told(launcher: Sequence[str]) -> dict[str, Any]:
    """What one of :data:`LAUNCHERS` says, and where rank 0 is met as far as that can be found out."""
    open_mpi, nodes = launcher == LAUNCHERS[0], os.environ.get("SLURM_JOB_NODELIST")
    # Slurm: jobs may share a node.
    port = TORCH_DISTRIBUTED_DEFAULT_PORT if open_mpi else 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found: dict[str, Any] = {name: os.environ[theirs] for name, theirs in zip(names, launcher, strict=True)}
    found["MASTER_PORT"] = os.environ.get("MASTER_PORT", port)
    if "MASTER_ADDR" in os.environ:
        return found
    if open_mpi and importlib.util.find_spec("mpi4py"):
        deepspeed.comm.comm.mpi_discovery(int(found["MASTER_PORT"]), verbose=False)  # sets it
    elif not open_mpi and nodes and shutil.which("scontrol"):
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        found["MASTER_ADDR"] = hosts.stdout.split()[0]
    return found


@contextmanager
def _joined(own: dict[str, Any], seconds: int) -> Iterator[list[dict[str, Any]]]:
    """What all ranks know of themselves, and one process group of theirs unless one is ill."""
    if dist.is_initialized():
        yield all_gather(own)
        return
    if get_accelerator().device_name() == "cpu":
        # Else DeepSpeed compiles an extension for a minute or two, which only tensor-parallel layers call.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        server = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,  # the process group will meet at the same one
        )
        store = dist.PrefixStore(f"doctor{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", server)
        try:
            everyone = [pickle.loads(each) for each in synchronize(store, pickle.dumps(own), rank, world, "", seconds)]
        except dist.DistStoreError:
            absent = [str(each) for each in range(world) if not store.check([str(each)])]
            came = f"{world - len(absent)} of {world} ranks came to {place} within {seconds} s"
            _leave(rank, f"{came}, {'not rank ' + ', '.join(absent) if absent else 'but not all stayed'}")
    except dist.DistError as error:
        _leave(rank, f"rank 0 did not come to {place} within {seconds} s, or left: {str(error).splitlines()[0]}")
    try:
        if not any(each["ill"] for each in everyone):
            deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        _leave(rank, f"all {world} ranks came to {place}, but do not reach each other: {str(error).splitlines()[0]}")
    try:
        yield everyone
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _leave(rank: int, said: str) -> NoReturn:
    sys.exit(f"doctor: rank {rank} on {socket.gethostname()}: {said}")


def examine(options: argparse.Namespace, everyone: Sequence[dict[str, Any]]) -> list[Finding]:
    """Everything the doctor looks at. A collective unless a rank is ill; the same on every rank."""
    nodes = [each["node"] for each in everyone]
    per_node = Counter(nodes)
    findings = [Finding("ranks", f"{len(nodes)} on {', '.join(f'{node} ({n})' for node, n in per_node.items())}")]
    well = {rank: each for rank, each in enumerate(everyone) if not each["ill"]}
    if len(well) < len(nodes):
        findings += [Finding("ill", _said([each["ill"] for each in everyone], nodes), False)]
    for key in next(iter(well.values()), {"same": ()})["same"]:
        findings += [compare(key, {rank: each["same"][key] for rank, each in well.items()}, nodes)]
    if len(well) < len(nodes):
        return [*findings, Finding("the rest", "left out until all ranks are well", None)]
    findings += [_settings(options, everyone, nodes), _disk(options, everyone, nodes), _shared(options, nodes)]
    findings += [_all_reduce(options.megabytes, nodes)]
    if any(each["wrong"] for each in everyone):
        left_out = "left out until the DeepSpeed JSON is right"
        return [*findings, Finding("LoFT step", left_out, None), Finding("memory", left_out, None)]
    return [*findings, _step(options, everyone[dist.get_rank()]["settings"], nodes), *_memory(options, everyone, nodes)]


def known(options: argparse.Namespace) -> dict[str, Any]:
    """What this rank knows of itself, or under ``ill`` why it could not find out."""
    node = socket.gethostname()
    try:
        return {"node": node, "ill": None, **facts(options)}
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        return {"node": node, "ill": _line(error)}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What this rank knows of itself; ``same`` is what must be alike on all."""
    accelerator = get_accelerator()
    on_gpu = accelerator.device_name() != "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and local >= accelerator.device_count():
        raise RuntimeError(f"local rank {local}, but there are {accelerator.device_count()} devices")
    accelerator.set_device(local)
    backend = accelerator.communication_backend_name()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else ""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else accelerator.device_name()
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else accelerator.available_memory()
    world = int(os.environ["WORLD_SIZE"])
    settings, wrong, planned, unplanned = {}, None, None, None
    try:
        settings = read_settings(options, world)
    except SettingsError as error:
        wrong = str(error)
    try:
        planned = needs(options, settings, world) if options.model and not wrong else None
    except (OSError, ValueError) as error:
        unplanned = f"{options.model}: {_line(error)}"
    content = Path(options.deepspeed).read_bytes() if options.deepspeed and Path(options.deepspeed).is_file() else b""
    return {
        "same": {
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
            "backend": f"{backend} {nccl}".strip(),
            "device": f"{name}, {accelerator.total_memory() / GB:.0f} GB" if on_gpu else name,
        },
        "settings": settings,
        "wrong": wrong,
        "digest": hashlib.sha256(content).hexdigest()[:12],
        "disk": shutil.disk_usage(_existing(Path(options.output_dir))).free,
        "gpu": free if on_gpu else None,
        "host": psutil.virtual_memory().available,
        "planned": planned,
        "unplanned": unplanned,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def read_settings(options: argparse.Namespace, world: int) -> dict[str, Any]:
    """The job's DeepSpeed settings.

    Raises:
        SettingsError: DeepSpeed does not know or accept something in them, or LoFT cannot train under them.
    """
    if options.deepspeed is None:
        return {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    settings = read_deepspeed_json(options.deepspeed)
    check_loft_settings(options.deepspeed, settings)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = [settings[key] for key in keys if isinstance(settings.get(key), int)]  # not "auto"
    if len(given) == len(keys) and given[0] != given[1] * given[2] * world:
        product = " * ".join(f"{key} {number}" for key, number in zip(keys[1:], given[1:], strict=True))
        raise SettingsError(f"{options.deepspeed}: {keys[0]} {given[0]} is not {product} * {world} ranks")
    return settings


def stage_of(settings: dict[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed settings."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def where(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """``node1 (rank 4, 5)``: a node with those of the given ranks that run on it."""
    on: dict[str, list[str]] = {}
    for rank in ranks:
        on.setdefault(nodes[rank], []).append(str(rank))
    return ", ".join(f"{node} (rank {', '.join(ranks)})" for node, ranks in on.items())


def compare(check: str, values: Mapping[int, str], nodes: Sequence[str]) -> Finding:
    """What all of these ranks have, or what most have and who differs."""
    usual = Counter(values.values()).most_common(1)[0][0]
    others = {rank: value for rank, value in values.items() if value != usual}
    differing = [f"{value} on {where([r for r, v in others.items() if v == value], nodes)}" for value in _once(others)]
    return Finding(check, "; ".join([usual, *differing]), not others)


def _said(errors: Sequence[str | None], nodes: Sequence[str]) -> str:
    """Each error of a rank once, with where it happened."""
    found = {rank: error for rank, error in enumerate(errors) if error}
    return "; ".join(f"{e}, on {where([r for r, f in found.items() if f == e], nodes)}" for e in _once(found))


def _once(values: Mapping[int, str]) -> list[str]:
    return list(dict.fromkeys(values.values()))


def _settings(options: argparse.Namespace, everyone: Sequence[dict[str, Any]], nodes: Sequence[str]) -> Finding:
    check = "DeepSpeed JSON"
    if wrong := _said([each["wrong"] for each in everyone], nodes):
        return Finding(check, wrong, False)
    if options.deepspeed is None:
        return Finding(check, "none given: ZeRO 2 is tried", None)
    sums = {rank: f"{options.deepspeed}, sha256 {each['digest']}" for rank, each in enumerate(everyone)}
    same = compare(check, sums, nodes)
    return Finding(check, f"ZeRO {stage_of(everyone[0]['settings'])}: {same.found}", same.well)


def _disk(options: argparse.Namespace, everyone: Sequence[dict[str, Any]], nodes: Sequence[str]) -> Finding:
    free = [each["disk"] for each in everyone]
    least = min(range(len(free)), key=free.__getitem__)
    found = f"{free[least] / GB:.1f} GB free at {options.output_dir}, least on {where([least], nodes)}"
    planned = everyone[least]["planned"]
    if planned is None:
        return Finding("disk", found, free[least] > 0)
    room = free[least] // planned["checkpoint"]
    found += f": room for {room} checkpoints of {planned['checkpoint'] / GB:.3f} GB"
    return Finding("disk", found, False if room < LEAST_CHECKPOINTS else None if room < FEW_CHECKPOINTS else True)


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
    seen = all_gather(os.access(token, os.R_OK))  # which never raises
    if dist.get_rank() == 0 and seen[0]:
        token.unlink()
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


def _step(options: argparse.Namespace, settings: dict[str, Any], nodes: Sequence[str]) -> Finding:
    """A LoFT step of each factor of tiny adapters, under the job's ZeRO stage and offloading, against one process."""
    said = None
    try:
        distance = _distance(settings, options.timeout)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        distance, said = float("inf"), _line(error)
    distances, errors = all_gather(distance), all_gather(said)
    if any(errors):
        return Finding("LoFT step", _said(errors, nodes), False)
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


def needs(options: argparse.Namespace, settings: dict[str, Any], world: int) -> dict[str, float]:
    """Bytes that a rank of the coming job needs on its device and in main memory, and those of a checkpoint."""
    shapes = shapes_of(options.model)
    # Only memory is asked for, which does not depend on the kind of device.
    found = plan(shapes, job_of(options, settings, shapes, world), GPUS["H100"], INTERCONNECTS["ndr400"])
    return {"device": found.peak, "host": sum(found.on_cpu.values()), "checkpoint": found.checkpoint}


def _memory(options: argparse.Namespace, everyone: Sequence[dict[str, Any]], nodes: Sequence[str]) -> list[Finding]:
    """The plan of the job's memory against what is free now."""
    ranks_on = Counter(nodes)
    host = [each["host"] / ranks_on[each["node"]] for each in everyone]  # ranks of one node share its main memory
    gpu = [each["gpu"] for each in everyone]
    if options.model is None:
        free = host if None in gpu else gpu
        return [Finding("memory", f"{min(free) / GB:.1f} GB free a rank; without --model nothing is planned", None)]
    if unplanned := _said([each["unplanned"] for each in everyone], nodes):
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


def job_of(options: argparse.Namespace, settings: dict[str, Any], shapes: Shapes, world: int) -> Job:
    """The coming job, as :mod:`loft_ds.plan` wants it described."""
    zero = settings.get("zero_optimization", {})
    offload = {
        what for what in ("optimizer", "param") if (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"
    }
    sixteen = any((settings.get(half) or {}).get("enabled") in (True, "auto") for half in ("bf16", "fp16"))

    def size(key: str, default: int, auto: int) -> int:
        value = zero.get(key, default)
        return auto if value == "auto" else int(value)

    return Job(
        rank=options.lora_rank,
        world=world,
        stage=stage_of(settings),
        precision=2 if sixteen else 4,
        second_moment=2 if options.second_moment_dtype == "bfloat16" else 4,
        offload=frozenset(offload | ({"second_moment"} if options.offload_second_moment else set())),
        tokens=options.tokens,
        # "auto" as transformers fills it in (integrations/deepspeed.py).
        reduce_bucket=size("reduce_bucket_size", Job.reduce_bucket, shapes.hidden**2),
        persistent=size("stage3_param_persistence_threshold", Job.persistent, 10 * shapes.hidden),
    )


if __name__ == "__main__":
    sys.exit(main())
