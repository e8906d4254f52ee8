"""Training on real quantised bases, held against the run on the same weights dequantised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGES = Path(sys.prefix) / "quantised"  # where `make setup` puts them


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    if not PACKAGES.is_dir():
        pytest.skip(f"bitsandbytes, hqq, torchao and quanto are not in {PACKAGES}: run make setup")
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("quantised_run.py")],
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


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


@pytest.mark.parametrize("kind", ["torchao", "quanto"])
def test_a_base_of_wrapped_tensors_is_refused_under_deepspeed(outcomes, kind):
    said = outcomes[f"{kind} under a Trainer"]
    assert said.startswith(f"LoFT does not support a base model of {'torchao' if kind == 'torchao' else 'optimum'}'s")
    assert "train it without DeepSpeed" in said


def test_weights_packed_for_inference_are_refused(outcomes):
    assert outcomes["evaluated carefully"] == "stepped"
    if not outcomes["packs"]:
        pytest.skip("bitsandbytes packs on CPUs with bfloat16 arithmetic alone, and this is none")
    assert "support_avx512bf16_for_cpu = False" in outcomes["evaluated first"]
