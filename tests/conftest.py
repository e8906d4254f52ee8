"""What the tests share: pools of ranks, and one thread a process so that two cores hold several of them."""

import os
import subprocess

# The suite is for CPUs, also where there is a GPU. What can run on GPUs, over NCCL:
# DS_ACCELERATOR=cuda pytest tests/test_kernels_fused.py tests/test_sharded.py
if os.environ.setdefault("DS_ACCELERATOR", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator

import pytest
import torch
from ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(n)`` is a pool of n ranks with one process group, shared by all tests that ask for n."""
    on_gpus = os.environ["DS_ACCELERATOR"] != "cpu"
    pools: dict[int, Ranks] = {}

    def pool(world: int) -> Ranks:
        if on_gpus and world > torch.accelerator.device_count():
            pytest.skip(f"needs {world} accelerators")
        if world not in pools or not pools[world].alive:
            pools[world] = Ranks(world)
        return pools[world]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)
