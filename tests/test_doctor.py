"""The doctor finds nothing on two healthy ranks, and each illness by its name and its node's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from importlib.metadata import version
from unittest import mock

import psutil
import pytest
from launch_helpers import CONFIGS, ROOT, free_port, make_model
from ranks import CONTEXT

from loft_ds import LoFTAdamW, doctor

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
    return mock.patch("loft_ds.doctor.version", lambda package: "2.0.0" if package == "torch" else version(package))


def another_learning_rate():
    return mock.patch("loft_ds.doctor.LoFTAdamW", lambda model, lr, eps: LoFTAdamW(model, lr=2 * lr, eps=eps))


def wrong_sums():
    import torch.distributed as dist

    healthy = dist.all_reduce

    def one_more(tensor, *args, **kwargs):
        work = healthy(tensor, *args, **kwargs)
        tensor.add_(1)
        return work

    return mock.patch("torch.distributed.all_reduce", one_more)


def little_memory():
    return mock.patch("psutil.virtual_memory", return_value=psutil.virtual_memory()._replace(total=2 * 10**6))


@pytest.mark.parametrize(
    ("ill", "check", "said"),
    [
        (another_torch, "torch", "; 2.0.0 on node1 (rank 1)"),
        (another_learning_rate, "LoFT step", "from one process's, on node0 (rank 0), node1 (rank 1)"),
        (wrong_sums, "all-reduce", "wrong sums on node1 (rank 1)"),
        (little_memory, "memory", "too little on node1 (rank 1)"),
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


def lonely(log):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    sys.exit(doctor.main(["--timeout", "3"]))


def test_a_node_that_does_not_come(tmp_path):
    process = CONTEXT.Process(target=lonely, args=(tmp_path / "log",))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert "not all 2 ranks met at 127.0.0.1:" in (tmp_path / "log").read_text()


def test_the_command_alone(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    command = [sys.executable, "-m", "loft_ds.doctor", "--megabytes", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [*command, *changed(tmp_path, zero_allow_untested_optimizer=False)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    verdict, text = row(done.stdout, "DeepSpeed JSON")
    assert verdict == "FAIL"
    assert 'needs "zero_allow_untested_optimizer": true' in text
    assert row(done.stdout, "all-reduce")[0] == "ok"
