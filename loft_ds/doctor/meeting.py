"""Who this process is among the ranks, under any launcher, and how they meet.

What a rank knows of itself reaches the others through the store at which they meet: also that of one which has no
device, and from there no collective would.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import deepspeed
import deepspeed.comm.comm
import deepspeed.ops
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from torch.distributed.elastic.utils.store import synchronize

from ..ranks import all_gather

# What launchers that do not set RANK, WORLD_SIZE and LOCAL_RANK say instead. Open MPI's first: where Slurm starts it,
# its daemons are the tasks, and the ranks inherit their variables.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


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
def joined(own: dict[str, Any], seconds: int) -> Iterator[list[dict[str, Any]]]:
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
