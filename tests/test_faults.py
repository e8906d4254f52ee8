"""A rank that dies, hangs or is cut off, a full disk, SIGTERM: the job ends everywhere, says why once, and resumes."""

from __future__ import annotations

import ctypes
import errno
import gc
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hosts
import pytest
import torch
from launch_helpers import CONFIGS, fill_disk, free_port, losses, make_model, write_text
from ranks import CONTEXT

from loft_ds.training import faults

STEPS, SAVE, AT = 8, 3, 5  # the fault comes in the step after so many
TIMEOUT = 12  # seconds a collective may take here, by --ddp_timeout
PATIENCE = 180  # seconds that a job may take here; only a job that would wait for ever reaches it
CLONE_NEWNET = 0x40000000  # linux/sched.h


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("faults")
    each = {
        "deepspeed": CONFIGS / "zero2.json",
        "model_name_or_path": make_model(folder / "model"),
        "train_file": write_text(folder / "text.txt"),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE,
        "block_size": 32,
        "lora_rank": 4,
        "learning_rate": "1e-2",
        "ddp_timeout": TIMEOUT,
        "disable_tqdm": True,
    }
    return [word for name, value in each.items() for word in (f"--{name}", str(value))]


class Unlaunched:
    """Ranks of launch/train.py, without a launcher that would end the one when the other ends.

    Args:
        faults: What a rank runs when step ``AT`` has ended.
        spaces: The network namespace of each rank.
        world: How many ranks.
    """

    def __init__(
        self,
        flags: list[str],
        out: Path,
        *extra: str,
        faults: dict[int, Callable[[Path], None]] | None = None,
        spaces: tuple[str, str] | None = None,
        address: str = "127.0.0.1",
        world: int = 2,
    ) -> None:
        argv = ["train.py", *flags, "--output_dir", str(out), *extra]
        self._logs = [out.parent / f"{out.name}-{rank}.log" for rank in range(world)]
        environment = {"MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        self.ranks = [
            CONTEXT.Process(
                target=_run,
                args=(rank, environment, argv, log, (faults or {}).get(rank), out, spaces and spaces[rank]),
            )
            for rank, log in enumerate(self._logs)
        ]
        for rank in self.ranks:
            rank.start()

    def end(self) -> list[int | None]:
        """The exit codes, once all ranks have ended."""
        deadline = time.monotonic() + PATIENCE
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        for rank in self.ranks:
            rank.kill()
            rank.join()
        assert None not in codes, f"waits for ever: {codes}\n{self.said()}"
        return codes

    def said(self) -> str:
        return "".join(log.read_text() for log in self._logs)

    def errors(self) -> list[str]:
        return [line for line in self.said().splitlines() if "error:" in line]


def _run(rank, environment, argv, log, fault, out, space):
    gc.freeze()  # as in a pool of ranks
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if space is not None:
        namespace = os.open(f"/run/netns/{space}", os.O_RDONLY)
        assert ctypes.CDLL(None).setns(namespace, CLONE_NEWNET) == 0
        environment |= {"GLOO_SOCKET_IFNAME": hosts.INTERFACE, "TP_SOCKET_IFNAME": hosts.INTERFACE}
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    from loft_ds.training import train

    if fault is not None:
        healthy = train.LoggedTrainer.training_step

        def step(self, *args, **kwargs):
            if self.state.global_step == AT:
                fault(out)
            return healthy(self, *args, **kwargs)

        train.LoggedTrainer.training_step = step
    sys.argv = argv
    train.main()


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """The losses of a run that nothing happened to; it was told to resume, and there was nothing to resume from."""
    out = tmp_path_factory.mktemp("whole") / "out"
    job = Unlaunched(flags, out, "--resume_from_checkpoint", "True")
    assert job.end() == [0, 0], job.said()
    return losses(out)


def resumes(flags, out, uninterrupted):
    """Whether the same command goes on to the very losses of the run without a fault."""
    job = Unlaunched(flags, out, "--resume_from_checkpoint", "True")
    assert job.end() == [0, 0], job.said()
    assert losses(out) == uninterrupted


def terminate(out):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.rehearse
def test_sigterm_on_one_rank_saves_and_stops_all(flags, tmp_path, uninterrupted):
    job = Unlaunched(flags, tmp_path / "out", faults={1: terminate})
    assert job.end() == [128 + signal.SIGTERM] * 2, job.said()
    assert job.said().count("SIGTERM reached rank 1: saved after step 6") == 1
    assert list(losses(tmp_path / "out")) == list(range(1, AT + 2))
    assert not (tmp_path / "out" / "metrics.json").exists()
    resumes(flags, tmp_path / "out", uninterrupted)


def die(out):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.rehearse
def test_the_first_rank_dies_and_is_named(flags, tmp_path, uninterrupted):
    job = Unlaunched(flags, tmp_path / "out", faults={0: die})
    assert job.end() == [-signal.SIGKILL, 1], job.said()
    (error,) = job.errors()
    assert error.startswith("train.py: error: rank 0 on ")
    assert f"died or was stopped after step {AT}: no sign of life for" in error
    resumes(flags, tmp_path / "out", uninterrupted)


def hang(out):
    while True:
        time.sleep(1)


HANGS = inspect.getsourcelines(hang)[1] + 2


@pytest.mark.rehearse
def test_a_rank_that_dies_while_no_collective_waits_for_it(flags, tmp_path):
    """As on a GPU, where the process waits for the device and not for the collective."""
    job = Unlaunched(flags, tmp_path / "out", faults={0: hang, 1: die})
    assert job.end() == [1, -signal.SIGKILL], job.said()
    (error,) = job.errors()
    assert error.startswith("train.py: error: rank 1 on ")
    assert f"died or was stopped after step {AT}: no sign of life for" in error


@pytest.mark.rehearse
def test_of_three_ranks_the_one_that_hangs_is_named(flags, tmp_path):
    job = Unlaunched(flags, tmp_path / "out", faults={1: hang}, world=3)
    assert job.end() == [1, 1, 1], job.said()
    (error,) = job.errors()
    assert error.startswith("train.py: error: rank 1 on ")
    assert error.endswith(f"hangs: it is alive, but does nothing after step {AT} in hang (test_faults.py:{HANGS})")


def late(out):
    faults.NEAR = math.inf


@pytest.mark.rehearse
def test_a_rank_that_hangs_is_named_by_the_collective_that_failed(flags, tmp_path, uninterrupted):
    job = Unlaunched(flags, tmp_path / "out", faults={0: late, 1: hang})
    assert job.end() == [1, 1], job.said()
    (error,) = job.errors()
    assert error.startswith("train.py: error: rank 1 on ")
    assert f"hangs: it is alive, but does nothing after step {AT} in hang (test_faults.py:{HANGS})" in error
    assert ". Rank 0 saw: " in error
    resumes(flags, tmp_path / "out", uninterrupted)


def wait_for_a_device(out):
    torch.distributed.all_reduce(torch.zeros(1), async_op=True)
    hang(out)


@pytest.mark.rehearse
def test_a_rank_that_hangs_is_named_where_no_collective_fails(flags, tmp_path):
    """As under NCCL, which tells no Python of a collective that times out."""
    job = Unlaunched(flags, tmp_path / "out", faults={0: wait_for_a_device, 1: hang})
    assert job.end() == [1, 1], job.said()
    (error,) = job.errors()
    assert error.startswith("train.py: error: rank 1 on ")


def rest(out):
    time.sleep(1.5 * TIMEOUT)


def once(bad, good):
    """``good``, but ``bad`` the first time."""
    first = iter([bad])
    return lambda *args: next(first, good)(*args)


def refuse(*args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def stumble(out):
    """A note that the disk does not take, and one that is read while it is half written."""
    os.pwrite = once(refuse, os.pwrite)
    faults.Watch._read = once(lambda watch, rank: json.loads('{"host": '), faults.Watch._read)
    rest(out)


@pytest.mark.rehearse
def test_ranks_that_need_long_without_each_other_are_left_alone(flags, tmp_path, uninterrupted):
    job = Unlaunched(flags, tmp_path / "out", faults={0: rest, 1: stumble})
    assert job.end() == [0, 0], job.said()
    assert losses(tmp_path / "out") == uninterrupted


def lose(out):
    raise torch.distributed.DistBackendError("\N{GRINNING FACE}" * 5000)


@pytest.mark.rehearse
def test_an_error_of_many_words_is_read_by_the_others(flags, tmp_path):
    job = Unlaunched(flags, tmp_path / "out", faults={0: lose, 1: lose})
    assert job.end() == [1, 1], job.said()
    (error,) = job.errors()
    assert error.startswith("train.py: error: all ranks are alive and reach rank 0, but a collective between them")


def lose_with_the_disk(out):
    os.pwrite = lambda *args: hang(out)
    lose(out)


@pytest.mark.rehearse
def test_a_disk_that_hangs_keeps_no_rank(flags, tmp_path):
    job = Unlaunched(flags, tmp_path / "out", "--ddp_timeout", "6", faults=dict.fromkeys(range(2), lose_with_the_disk))
    assert job.end() == [1, 1], job.said()
    for rank, error in enumerate(job.errors()):
        assert error.startswith(f"train.py: error: rank {rank} on {os.uname().nodename}: DistBackendError: ")
        assert error.endswith("/_ranks does not answer)")


def fail(out):
    raise ValueError("a batch of nothing")


def test_ranks_that_do_not_meet_end():
    """Joining has no time-out of its own where a connection is open to a rank that has stopped."""
    joining = (
        "import time; from loft_ds.training.faults import bounded_joining\nwith bounded_joining(0.1): time.sleep(60)"
    )
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    done = subprocess.run([sys.executable, "-c", joining], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the 2 ranks did not all meet at node0:29500 within 0.2 s" in done.stderr
    with faults.bounded_joining(0.1):
        pass
    time.sleep(0.4)  # it would have ended this process by now


def test_an_error_on_one_rank_is_the_one_that_is_told(flags, tmp_path):
    job = Unlaunched(flags, tmp_path / "out", faults={1: fail})
    assert job.end() == [1, 1], job.said()
    assert [line for line in job.errors() if line.startswith("train.py")] == [
        f"train.py: error: rank 1 on {os.uname().nodename}: ValueError: a batch of nothing"
    ]
    assert job.said().count("Traceback") == 1


def wait_for_the_cut(out):
    while not (out.parent / "cut").exists():
        time.sleep(0.1)


@pytest.mark.rehearse
def test_a_peer_that_is_cut_off_is_named(flags, tmp_path, uninterrupted):
    if reason := hosts.missing():
        pytest.skip(reason)
    out = tmp_path / "out"
    with hosts.Hosts(2) as pair:
        both = dict.fromkeys(range(2), wait_for_the_cut)
        job = Unlaunched(flags, out, faults=both, spaces=tuple(pair._spaces), address=pair.addresses[0])
        deadline = time.monotonic() + PATIENCE
        while not (out / "log.jsonl").exists() or AT not in losses(out):
            assert time.monotonic() < deadline, job.said()
            time.sleep(0.1)
        pair.cut(1)
        (tmp_path / "cut").touch()
        assert job.end() == [1, 1], job.said()
    (error,) = job.errors()
    assert "rank 1 on " in error
    assert "is cut off: it does not reach rank 0" in error
    resumes(flags, out, uninterrupted)


def fill(out):
    fill_disk(out.parent)


@pytest.mark.rehearse
def test_a_full_disk_is_named_and_the_last_checkpoint_is_whole(flags, small_disk, tmp_path, uninterrupted):
    out = small_disk / "out"
    job = Unlaunched(flags, out, faults={1: fill})
    assert job.end() == [1, 1], job.said()
    (error,) = job.errors()
    assert f"{out}/" in error
    assert "No space left on device" in error
    (small_disk / "filler").unlink()
    resumes(flags, out, uninterrupted)
