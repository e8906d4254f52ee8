"""What the tests share: pools of ranks, and one thread a process so that two cores hold several of them."""

import gc
import os
import subprocess

# The suite is for CPUs, also where there is a GPU. What can run on GPUs, over NCCL:
# DS_ACCELERATOR=cuda pytest tests/test_kernels_fused.py tests/test_sharded.py
if os.environ.setdefault("DS_ACCELERATOR", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Triton decides when it is imported, and PEFT imports it. Its interpreter runs the kernels where there is no GPU.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from ranks import Ranks

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection of garbage need look through it again."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long each file took, and how many tests it has, the longest first."""
    reports = [r for each in terminalreporter.stats.values() for r in each if isinstance(r, pytest.TestReport)]
    seconds, tests = Counter(), Counter()
    for report in reports:
        file = report.nodeid.partition("::")[0]
        seconds[file] += report.duration
        tests[file] += report.when == "call"
    if len(seconds) > 1:
        terminalreporter.section("seconds and tests of each file")
        for file, total in seconds.most_common():
            terminalreporter.write_line(f"{total:7.1f} {tests[file]:4d} {file}")


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
