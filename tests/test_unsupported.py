"""The table of what LoFT cannot treat: a JSON, a model or an engine reaches every row."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from models import odd_model

from loft_ds import LoFTAdamW
from loft_ds.zero.stages import layout_of
from loft_ds.zero.unsupported import OTHER_OPTIMIZER, UNSUPPORTED, find_json_refusals

# --- the JSON


def offloading(stage=3, **more):
    return {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu", **more}}}


# By name, what a JSON has beyond the settings that LoFT needs.
JSON = {
    "another optimizer in the JSON": {"optimizer": {"type": "AdamW"}},
    "ZeRO for tested optimizers alone": {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": False},
    "DeepSpeedCPUAdam": {**offloading(), "zero_force_ds_cpu_optimizer": True},
    "tensor parallelism": {"tensor_parallel": {"autotp_size": 2}},
    "master weights in 16 bits": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    "torch_autocast in float16": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    'offload_optimizer.device "nvme"': offloading(2, device="nvme"),
    "offload_optimizer.super_offload and a ratio below 1 at stage 3": offloading(super_offload=True),
    "ZenFlow": {"zero_optimization": {"stage": 2, "zenflow": {}}},
    "MiCS": {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
    "fp16 at ZeRO stage 0 with a loss scale": {"fp16": {"enabled": True}},
}


def test_every_row_of_the_json_has_a_case():
    assert set(JSON) == {row.name for row in UNSUPPORTED if row.in_json is not None}


@pytest.mark.parametrize("row", [row for row in UNSUPPORTED if row.in_json is not None], ids=lambda row: row.name)
def test_a_json_is_refused_with_the_remedy(row):
    needed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    assert find_json_refusals(needed) == []
    assert find_json_refusals({**needed, **JSON[row.name]}) == [f"LoFT does not support {row.name}: {row.remedy}"]


# --- the engine


@pytest.fixture(scope="module")
def loft():
    return LoFTAdamW(odd_model())


def precision(*, bf16=False, fp16=False):
    """Whether masters are in 16 bits, as an engine's settings say it."""
    return SimpleNamespace(
        bfloat16_config=SimpleNamespace(bf16_master_weights_and_grads=bf16),
        float16_config=SimpleNamespace(fp16_master_weights_and_grads=fp16),
    )


def fake(loft, wrapper=None, *, engine=None, offload=None, **changed):
    """As much of an engine as the table looks at; ``wrapper`` None is LoFT's optimizer itself."""
    engine = SimpleNamespace() if engine is None else engine
    engine.__dict__.update(
        basic_optimizer=loft,
        optimizer=loft if wrapper is None else wrapper,
        module=loft,
        mpu=None,
        _config=precision(),
        torch_autocast_z0_gradscaler=None,
        autotp_size=lambda: 0,
        zenflow_config=lambda: None,
        zero_optimization_stage=lambda: 3,
        zero_offload_optimizer=lambda: offload and DeepSpeedZeroOffloadOptimizerConfig(**offload),
    )
    engine.__dict__.update(changed)
    return engine


def unbuilt(kind, **attributes):
    """An object of a type of DeepSpeed's, without what its ``__init__`` does."""
    built = kind.__new__(kind)
    built.__dict__.update(attributes)
    return built


def at_stage0(scale):
    return unbuilt(FP16_UnfusedOptimizer, loss_scale_config=SimpleNamespace(cur_scale=scale), fp16_groups=[])


def at_stage3(*groups):
    params = [SimpleNamespace(ds_process_group=group) for group in groups]
    return unbuilt(DeepSpeedZeroOptimizer_Stage3, fp16_groups=[params[:1], params[1:]], torch_autocast_gradscaler=None)


class DeepSpeedCPUAdam(torch.optim.AdamW):
    """Stands for DeepSpeed's, which would compile its CPU extension."""


def adamw(kind=torch.optim.AdamW):
    return kind([torch.nn.Parameter(torch.zeros(1))])


def ranks_of_tensors(size):
    return SimpleNamespace(get_model_parallel_world_size=lambda: size)


# By name, engines of which the row holds.
ENGINES = {
    "DeepSpeedCPUAdam": [lambda loft: fake(loft, basic_optimizer=adamw(DeepSpeedCPUAdam))],
    OTHER_OPTIMIZER.name: [lambda loft: fake(loft, basic_optimizer=adamw())],
    "DeepSpeed's pipeline engine": [lambda loft: fake(loft, engine=unbuilt(PipelineEngine))],
    "tensor parallelism": [
        lambda loft: fake(loft, autotp_size=lambda: 2),
        lambda loft: fake(loft, at_stage3("all"), mpu=ranks_of_tensors(2)),
    ],
    "master weights in 16 bits": [
        lambda loft: fake(loft, _config=precision(bf16=True)),
        lambda loft: fake(loft, _config=precision(fp16=True)),
    ],
    "torch_autocast in float16": [
        lambda loft: fake(loft, torch_autocast_z0_gradscaler=object()),
        lambda loft: fake(loft, SimpleNamespace(torch_autocast_gradscaler=object())),
    ],
    'offload_optimizer.device "nvme"': [lambda loft: fake(loft, offload={"device": "nvme"})],
    "offload_optimizer.super_offload and a ratio below 1 at stage 3": [
        lambda loft: fake(loft, offload={"device": "cpu", "super_offload": True}),
        lambda loft: fake(loft, offload={"device": "cpu", "ratio": 0.5}),
    ],
    "ZenFlow": [lambda loft: fake(loft, at_stage3("all"), zenflow_config=object)],
    "fp16 at ZeRO stage 0 with a loss scale": [lambda loft: fake(loft, at_stage0(2.0**16))],
    "any other wrapper of DeepSpeed's around an optimizer": [
        lambda loft: fake(loft, SimpleNamespace()),
        lambda loft: fake(loft, unbuilt(type("Sub", (DeepSpeedZeroOptimizer,), {}))),
    ],
    "several data-parallel groups": [
        lambda loft: fake(loft, unbuilt(DeepSpeedZeroOptimizer, real_dp_process_group=["all", "experts"])),
        lambda loft: fake(loft, at_stage3("all", "experts")),
    ],
}
CASES = [(row, build) for row in UNSUPPORTED if row.in_engine is not None for build in ENGINES[row.name]]


def test_every_row_of_the_engine_has_a_case():
    assert set(ENGINES) == {row.name for row in UNSUPPORTED if row.in_engine is not None}


@pytest.mark.parametrize(("row", "build"), CASES, ids=[row.name for row, _ in CASES])
def test_an_engine_is_refused_with_the_remedy(loft, row, build):
    engine = build(loft)
    found = row.found_in_engine(engine)
    name = found if isinstance(found, str) else row.name
    with pytest.raises(NotImplementedError, match=f"^LoFT does not support {re.escape(f'{name}: {row.remedy}')}$"):
        layout_of(engine, loft.trainable)


def test_an_unknown_wrapper_is_named(loft):
    with pytest.raises(NotImplementedError, match="does not support DeepSpeed's SimpleNamespace"):
        layout_of(fake(loft, SimpleNamespace()), loft.trainable)


@pytest.mark.parametrize(
    "build",
    [
        fake,
        lambda loft: fake(loft, mpu=ranks_of_tensors(1)),
        lambda loft: fake(loft, mpu=SimpleNamespace(initialize_sequence_parallel=None)),  # Ulysses
        lambda loft: fake(loft, offload={"device": "cpu"}),
        lambda loft: fake(loft, offload={"device": "cpu", "ratio": 0.5}, zero_optimization_stage=lambda: 2),
    ],
)
def test_other_engines_are_not(loft, build):
    assert layout_of(build(loft), loft.trainable) is not None


def test_no_deepspeed_is_imported_for_it():
    asked = "import sys, loft_ds.zero.unsupported; print('deepspeed' in sys.modules, 'torch' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed.split() == ["False", "False"]
