"""Training on real quantised bases, held against the run on the same weights dequantised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch_helpers import ROOT, free_port, make_model, unlaunched, write_text
from safetensors.torch import load_file
from scaling import TINY

from loft_ds.plan import Job, memory, shapes_of

PACKAGES = Path(sys.prefix) / "quantised"  # where `make setup` puts them


def run(*command: str | Path) -> str:
    """What a command prints that finds the packages."""
    if not PACKAGES.is_dir():
        pytest.skip(f"bitsandbytes, hqq, torchao and quanto are not in {PACKAGES}: run make setup")
    environment = unlaunched(PACKAGES, ROOT / "benchmarks")
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    return json.loads(run(sys.executable, Path(__file__).with_name("quantised_run.py")).splitlines()[-1])


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4 twice", "hqq"])
def test_a_quantised_base_is_its_dequantised_weights_to_the_last_bit(outcomes, kind, stage):
    assert outcomes[f"{kind} {stage}"] == 0


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_int8_base_is_its_dequantised_weights_within_its_arithmetic(outcomes, stage):
    """bitsandbytes rounds activations to 8 bits there, which AdamW's first steps enlarge: small entries of a gradient
    change sign. LoFT's steps are AdamW's; half as much again is room for another CPU's rounding."""
    assert 0 < outcomes[f"int8 {stage}"] < 1.5 * outcomes["int8 AdamW"]


def test_a_base_of_wrapped_tensors_trains_without_deepspeed(outcomes):
    assert outcomes["quanto plain"] == 0
    # torchao scales after its product, and not before it: float32's rounding, enlarged in the same way.
    assert 0 < outcomes["torchao plain"] < outcomes["int8 AdamW"]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(("kind", "planned_as"), [("nf4", "4bit"), ("nf4 twice", "4bit-double"), ("int8", "8bit")])
def test_the_plan_knows_the_size_of_a_quantised_base(outcomes, kind, planned_as, stage):
    job = Job(rank=4, world=2, stage=stage, precision=4, quantised=planned_as, persistent=1000)
    planned = memory(shapes_of(TINY), job)["base weights"]
    assert outcomes[f"{kind} {stage} bytes"] == pytest.approx(planned.tolist(), rel=0.02)


@pytest.mark.parametrize("kind", ["torchao", "quanto"])
def test_a_base_of_wrapped_tensors_is_refused_under_deepspeed(outcomes, kind):
    said = outcomes[f"{kind} under a Trainer"]
    assert said.startswith(f"LoFT does not support a base model of {'torchao' if kind == 'torchao' else 'optimum'}'s")
    assert "train it without DeepSpeed" in said


def test_weights_packed_for_inference_are_refused(outcomes):
    assert outcomes["evaluated carefully"] == "stepped"
    if not outcomes["packs"]:
        pytest.skip("bitsandbytes packs on CPUs with bfloat16 arithmetic alone, and this is none")
    assert "loft_ds.quantised.keep_gradients(model)" in outcomes["evaluated first"]


@pytest.mark.rehearse
@pytest.mark.parametrize(
    ("start", "flags", "quantised"),
    [
        (
            ["deepspeed", "--num_accelerators", "2", "--master_port", "PORT"],
            ["--deepspeed", "ds_configs/zero3.json", "--load_in_4bit", "--bnb_4bit_use_double_quant"],
            "nf4",
        ),
        (["python"], ["--load_in_8bit", "--optimizer", "lora"], "int8"),
    ],
)
def test_the_main_job_on_a_quantised_base(tmp_path, start, flags, quantised):
    """It evaluates first, which on some CPUs would have bitsandbytes pack the weights."""
    model, text, out = make_model(tmp_path / "model"), write_text(tmp_path / "text.txt"), tmp_path / "out"
    program, *rest = [str(free_port()) if each == "PORT" else each for each in start]
    run(
        *(Path(sys.executable).parent / program, *rest, "launch/train.py", *flags),
        *("--model_name_or_path", model, "--train_file", text, "--output_dir", out, "--report_to", "none"),
        *("--max_steps", "6", "--block_size", "32", "--lora_rank", "4", "--learning_rate", "1e-2"),
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["quantised"] == quantised
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    assert all(tensor.abs().max() > 0 for tensor in load_file(out / "adapter_model.safetensors").values())
