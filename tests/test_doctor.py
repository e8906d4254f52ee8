"""The doctor finds nothing on two healthy ranks, and each illness by its name and its node's."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from unittest import mock

import psutil
import pytest
from launch_helpers import CONFIGS, ROOT, free_port, make_model, unlaunched
from ranks import CONTEXT

from loft_ds import LoFTAdamW, doctor
from loft_ds.doctor import checks, meeting
from loft_ds.doctor.command import parse
from loft_ds.doctor.job import job_of, read_settings
from loft_ds.plan import Job, shapes_of

LAUNCHERS = {name for names in meeting.LAUNCHERS for name in names} | {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")
}
ZERO2 = ["--deepspeed", str(CONFIGS / "zero2.json")]


def consult(rank, world, arguments, ill=None):
    """The doctor's status and table on one rank; ``ill`` is what is wrong on rank 1."""
    own = arguments[rank] if isinstance(arguments[0], list) else arguments
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("socket.gethostname", return_value=f"node{rank}"))
        if ill is not None and rank == 1:
            stack.enter_context(ill())
        stack.enter_context(contextlib.redirect_stdout(said))
        status = doctor.main(["--megabytes", "1", *own])
    return status, said.getvalue()


def row(table, check):
    """The verdict and the text of one line."""
    (line,) = (line for line in table.splitlines() if line.startswith(check))
    verdict, text = line.removeprefix(check).strip().split(maxsplit=1)
    return verdict, text


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3_offload"])
def test_two_healthy_ranks(ranks, tmp_path, name):
    model = make_model(tmp_path / "model")
    arguments = ["--deepspeed", str(CONFIGS / f"{name}.json"), "--output_dir", str(tmp_path / "out")]
    (status, table), (other, silence) = ranks(2)(consult, [*arguments, "--model", str(model)])
    assert status == other == 0, table
    assert silence == ""
    assert "FAIL" not in table
    assert row(table, "ranks") == ("ok", "2 on node0 (1), node1 (1)")
    assert row(table, "backend") == ("ok", "gloo")
    verdict, text = row(table, "LoFT step")
    assert verdict == "ok"
    assert text.startswith(f"ZeRO {name[4]}, float32: ")
    assert row(table, "memory")[0] == "ok"
    assert list((tmp_path / "out").iterdir()) == []


def another_torch():
    return mock.patch(
        "loft_ds.doctor.facts.version", lambda package: "2.0.0" if package == "torch" else version(package)
    )


def no_accelerate():
    def known(package):
        if package == "accelerate":
            raise PackageNotFoundError(package)
        return version(package)

    return mock.patch("loft_ds.doctor.facts.version", known)


def another_learning_rate():
    return mock.patch("loft_ds.doctor.step.LoFTAdamW", lambda model, lr, eps: LoFTAdamW(model, lr=2 * lr, eps=eps))


def wrong_sums():
    import torch.distributed as dist

    healthy = dist.all_reduce

    def one_more(tensor, *args, **kwargs):
        work = healthy(tensor, *args, **kwargs)
        tensor.add_(1)
        return work

    return mock.patch("torch.distributed.all_reduce", one_more)


def little_memory():
    return mock.patch("psutil.virtual_memory", return_value=psutil.virtual_memory()._replace(available=2 * 10**6))


def little_disk():
    return mock.patch("shutil.disk_usage", return_value=shutil.disk_usage("/")._replace(free=10**4))


def a_bad_mount():
    return mock.patch("shutil.disk_usage", side_effect=OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/shared"))


def one_gpu_for_two_ranks():
    fake = mock.Mock()
    fake.device_name.return_value, fake.device_count.return_value = "cuda", 1
    return mock.patch("loft_ds.doctor.facts.get_accelerator", return_value=fake)


@pytest.mark.parametrize(
    ("ill", "check", "said"),
    [
        (another_torch, "torch", "; 2.0.0 on node1 (rank 1)"),
        (no_accelerate, "accelerate", "; missing on node1 (rank 1)"),
        (another_learning_rate, "LoFT step", "from one process's, on node0 (rank 0), node1 (rank 1)"),
        (wrong_sums, "all-reduce", "wrong sums on node1 (rank 1)"),
        (little_memory, "memory", "too little on node1 (rank 1)"),
        (little_disk, "disk", "least on node1 (rank 1): room for 0 checkpoints of 0."),
        (one_gpu_for_two_ranks, "ill", "RuntimeError: local rank 1, but there are 1 devices, on node1 (rank 1)"),
    ],
)
def test_an_illness_is_named_with_its_node(ranks, tmp_path, ill, check, said):
    model = make_model(tmp_path / "model")
    arguments = [*ZERO2, "--output_dir", str(tmp_path / "out"), "--model", str(model)]
    (status, table), (other, _) = ranks(2)(consult, arguments, ill)
    verdict, text = row(table, check)
    assert verdict == "FAIL"
    assert said in text
    assert status == other == 1


def changed(tmp_path, **change):
    file = tmp_path / "changed.json"
    file.write_text(json.dumps({**json.loads((CONFIGS / "zero2.json").read_text()), **change}))
    return ["--deepspeed", str(file)]


def test_settings_that_are_wrong_on_one_node(ranks, tmp_path):
    out = ["--output_dir", str(tmp_path)]
    arguments = [[*ZERO2, *out], [*changed(tmp_path, gradient_cliping=1.0), *out]]
    (status, table), (other, _) = ranks(2)(consult, arguments)
    verdict, text = row(table, "DeepSpeed JSON")
    assert verdict == "FAIL"
    assert "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?, on node1 (rank 1)" in text
    assert row(table, "LoFT step")[0] == "-"
    assert status == other == 1


def test_settings_of_two_kinds(ranks, tmp_path):
    out = ["--output_dir", str(tmp_path)]
    (_, table), _ = ranks(2)(consult, [[*ZERO2, *out], [*changed(tmp_path, steps_per_print=7), *out]])
    verdict, text = row(table, "DeepSpeed JSON")
    assert verdict == "FAIL"
    assert text.endswith("on node1 (rank 1)")


def test_a_folder_that_is_not_shared(ranks, tmp_path):
    folders = [[*ZERO2, "--output_dir", str(tmp_path / str(rank))] for rank in range(2)]
    (status, table), _ = ranks(2)(consult, folders)
    verdict, text = row(table, "output folder")
    assert verdict == "FAIL"
    assert "not the same folder on node1 (rank 1)" in text
    assert status == 1


def test_an_output_folder_that_is_a_file(ranks, tmp_path):
    (tmp_path / "out").touch()
    (status, table), (other, _) = ranks(2)(consult, [*ZERO2, "--output_dir", str(tmp_path / "out")])
    assert row(table, "output folder") == ("FAIL", f"rank 0 on node0 cannot write into {tmp_path}/out: File exists")
    assert status == other == 1


def test_a_batch_size_that_the_ranks_do_not_give(ranks, tmp_path):
    sizes = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4}
    settings = [*changed(tmp_path, train_batch_size=25, **sizes), "--output_dir", str(tmp_path)]
    (status, table), _ = ranks(2)(consult, settings)
    assert row(table, "DeepSpeed JSON")[0] == "FAIL"
    said = "train_batch_size 25 is not train_micro_batch_size_per_gpu 3 * gradient_accumulation_steps 4 * 2 ranks, on"
    assert said in row(table, "DeepSpeed JSON")[1]
    assert status == 1
    options = parse(changed(tmp_path, train_batch_size=24, **sizes))
    assert read_settings(options, 2)["train_batch_size"] == 24


def test_a_model_that_one_node_does_not_have(ranks, tmp_path):
    out = [*ZERO2, "--output_dir", str(tmp_path), "--model"]
    arguments = [[*out, str(make_model(tmp_path / "model"))], [*out, str(tmp_path / "none")]]
    (status, table), (other, _) = ranks(2)(consult, arguments)
    verdict, text = row(table, "memory")
    assert verdict == "FAIL"
    assert text.startswith(f"{tmp_path}/none: ")
    assert text.endswith("on node1 (rank 1)")
    assert status == other == 1


def test_the_job_to_plan_is_that_of_the_json():
    shapes = shapes_of("SmolLM2-135M")

    def job(zero, *flags):
        return job_of(parse(flags), {"zero_optimization": {"stage": 3, **zero}}, shapes, 8)

    plain = job({})
    assert (plain.reduce_bucket, plain.persistent) == (Job.reduce_bucket, Job.persistent)
    given = job({"reduce_bucket_size": 5e7, "stage3_param_persistence_threshold": 1000})
    assert (given.reduce_bucket, given.persistent) == (50_000_000, 1000)
    auto = job({"reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"})
    assert (auto.reduce_bucket, auto.persistent) == (576**2, 5760)
    cheap = job({"offload_param": {"device": "cpu"}}, "--offload_second_moment", "--second_moment_dtype", "bfloat16")
    assert (cheap.second_moment, cheap.offload) == (2, {"second_moment", "param"})


def test_memory_is_what_is_free_on_the_device_and_in_main_memory():
    options = argparse.Namespace(model="big", lora_rank=8, output_dir="out")
    needed = {"device": 50e9, "host": 30e9, "checkpoint": 10e9}
    nodes = ["node0", "node0", "node1"]

    def verdicts(gpu, host, disk=1e12):
        everyone = [
            {"node": node, "gpu": gpu[rank], "host": host[rank], "disk": disk, "planned": needed, "unplanned": None}
            for rank, node in enumerate(nodes)
        ]
        found = [checks.check_disk(options, everyone, nodes), *checks.check_memory(options, everyone, nodes)]
        return [(finding.check, finding.well) for finding in found]

    well = [("disk", True), ("memory", True), ("main memory", True)]
    assert verdicts([80e9] * 3, [100e9] * 3) == well
    assert verdicts([80e9, 80e9, 52e9], [100e9] * 3)[1] == ("memory", False)  # another process has the rest
    assert verdicts([80e9] * 3, [100e9, 100e9, 50e9]) == well
    assert verdicts([80e9] * 3, [50e9, 50e9, 100e9])[2] == ("main memory", False)  # two ranks share node0's
    assert verdicts([None] * 3, [200e9] * 3)[1:] == [("memory", True)]
    assert verdicts([None] * 3, [150e9] * 3)[1:] == [("memory", False)]
    assert [verdicts([80e9] * 3, [100e9] * 3, free)[0][1] for free in (19e9, 49e9, 50e9)] == [False, None, True]


def one(rank, environment, arguments, log, ill):
    """One of several doctors that meet by themselves."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    for name in LAUNCHERS & os.environ.keys():
        del os.environ[name]
    os.environ.update(environment)
    with mock.patch("socket.gethostname", return_value=f"node{rank}"), ill() if ill else contextlib.nullcontext():
        sys.exit(doctor.main(["--megabytes", "1", *arguments]))


def started(tmp_path, environments, *arguments, ill=None):
    """What each of them exits with, and what it says; ``ill`` is what is wrong on the last one."""
    port = str(free_port())
    processes = []
    for rank, environment in enumerate(environments):
        wrong = ill if rank == len(environments) - 1 else None
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
        options = ["--output_dir", str(tmp_path / "out"), *arguments]
        processes += [CONTEXT.Process(target=one, args=(rank, environment, options, tmp_path / f"{rank}", wrong))]
        processes[-1].start()
    for process in processes:
        process.join()
    return [(process.exitcode, (tmp_path / f"{rank}").read_text()) for rank, process in enumerate(processes)]


def under(launcher, world=2):
    """The variables of each rank."""
    rank, size, local = launcher
    return [{rank: str(r), size: str(world), local: str(r)} for r in range(world)]


def test_ranks_that_slurm_starts(tmp_path):
    (status, table), (other, silence) = started(tmp_path, under(meeting.LAUNCHERS[1]), *ZERO2)
    assert status == other == 0, table + silence
    assert row(table, "ranks") == ("ok", "2 on node0 (1), node1 (1)")
    assert row(table, "LoFT step")[0] == "ok"
    assert "LoFT step" not in silence


def test_a_rank_that_cannot_look_at_itself_under_open_mpi(tmp_path):
    (status, table), (other, _) = started(tmp_path, under(meeting.LAUNCHERS[0]), "--timeout", "60", ill=a_bad_mount)
    assert row(table, "ill") == ("FAIL", "OSError: [Errno 116] Stale file handle: '/shared', on node1 (rank 1)")
    assert row(table, "torch") == ("ok", version("torch"))
    assert status == other == 1


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.setenv(name, "")  # so that what identify() sets is taken back
        monkeypatch.delenv(name)
    return monkeypatch


def test_where_to_meet_under_slurm(no_launcher, tmp_path):
    no_launcher.setenv("PATH", str(tmp_path))
    for name, value in {**under(meeting.LAUNCHERS[1])[1], "SLURM_JOB_ID": "12345"}.items():
        no_launcher.setenv(name, value)
    no_launcher.setenv("SLURM_JOB_NODELIST", "big[1-2]")
    with pytest.raises(SystemExit, match=r"^doctor: rank 1: MASTER_ADDR not set: export where rank 0 is met$"):
        meeting.identify()
    no_launcher.delenv("RANK")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames big[1-2]" ] && printf "big1\\nbig2\\n"')
    scontrol.chmod(0o755)
    meeting.identify()
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["1", "2", "1", "big1", "22345"]


def test_where_to_meet_under_open_mpi(no_launcher):
    for name, value in under(meeting.LAUNCHERS[0])[1].items():
        no_launcher.setenv(name, value)
    no_launcher.setattr(meeting.importlib.util, "find_spec", lambda name: None)  # no mpi4py
    with pytest.raises(SystemExit, match="MASTER_ADDR not set"):
        meeting.identify()
    no_launcher.delenv("RANK")
    no_launcher.setenv("MASTER_ADDR", "big1")
    meeting.identify()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")] == ["1", "2", "29500"]


def test_one_task_is_alone(no_launcher):
    no_launcher.setenv("SLURM_NTASKS", "1")
    meeting.identify()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_a_node_that_does_not_come(tmp_path):
    ranks = under(("RANK", "WORLD_SIZE", "LOCAL_RANK"), world=4)
    first, third = started(tmp_path, [ranks[0], ranks[2]], "--timeout", "4")
    assert first[0] == third[0] == 1
    said = r"^doctor: rank 0 on node0: 2 of 4 ranks came to 127\.0\.0\.1:\d+ within 4 s, not rank 1, 3$"
    assert re.search(said, first[1], re.MULTILINE), first[1]


def test_a_first_rank_that_does_not_come(tmp_path):
    ((status, said),) = started(tmp_path, under(("RANK", "WORLD_SIZE", "LOCAL_RANK"))[1:], "--timeout", "2")
    assert status == 1
    assert "doctor: rank 1 on node0: rank 0 did not come to 127.0.0.1:" in said


def test_the_command_alone(tmp_path):
    command = [sys.executable, "-m", "loft_ds.doctor", "--megabytes", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [*command, *changed(tmp_path, zero_allow_untested_optimizer=False)],
        cwd=ROOT,
        env=unlaunched(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    verdict, text = row(done.stdout, "DeepSpeed JSON")
    assert verdict == "FAIL"
    assert 'needs "zero_allow_untested_optimizer": true' in text
    assert row(done.stdout, "all-reduce")[0] == "ok"
