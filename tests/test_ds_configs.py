"""Every file in ds_configs/ trains LoFT through DeepSpeed on two ranks, and leaves the same adapter."""

from __future__ import annotations

import contextlib
import functools
import json

import pytest
import torch
import torch.multiprocessing as mp
from launch_helpers import CONFIGS, free_port, make_model, train_configs, write_text
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loft_ds.zero.config import SettingsError, read_deepspeed_json
from loft_ds.zero.unsupported import find_json_refusals

# Stage 3 goes first: it needs the process group earliest, and would find that of a run before it.
NAMES = ["zero3", "zero0", "zero1", "zero2", "zero2_offload", "zero3_offload"]
STEPS = 4


def test_the_folder_holds_these_configs_and_no_other():
    assert {file.stem for file in CONFIGS.glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_one_that_deepspeed_knows_and_loft_can_use(name):
    path = str(CONFIGS / f"{name}.json")
    read_deepspeed_json(path, find_json_refusals)


def offloading(stage=3, **more):
    return {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu", **more}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 0}, "fp16": {"enabled": True}}, 'fp16 at ZeRO stage 0.* use stage 1.*"bf16"'),
        ({"zero_optimization": {"stage": 0}, "fp16": {"enabled": True, "loss_scale": 1}}, None),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, None),
        (offloading(), None),
        (offloading(device="nvme"), 'offload_optimizer.device "nvme": use "cpu"'),
        (offloading(2, device="nvme"), 'offload_optimizer.device "nvme": use "cpu"'),
        (offloading(super_offload=True), "super_offload"),
        (offloading(ratio=0.5), "a ratio below 1"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "does not support ZenFlow"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "MiCS"),  # by now DeepSpeed's own message
        ({"tensor_parallel": {"autotp_size": 2}}, "does not support tensor parallelism"),
        ({"tensor_parallel": {"autotp_size": 1}}, None),
        ({"torch_autocast": {"enabled": True, "dtype": "half"}}, "torch_autocast in float16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, None),
    ],
)
def test_what_loft_would_refuse_later_is_refused_at_once(tmp_path, change, message):
    path = tmp_path / "ds.json"
    needed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    path.write_text(json.dumps({**needed, **change}))
    with pytest.raises(SettingsError, match=f"^{path}: .*{message}") if message else contextlib.nullcontext():
        read_deepspeed_json(str(path), find_json_refusals)


@pytest.mark.parametrize("enabled", [False, True])
def test_auto_is_what_the_flag_says(tmp_path, enabled):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}, "fp16": {"enabled": "auto"}}))
    with pytest.raises(SettingsError, match="fp16 at ZeRO stage 0") if enabled else contextlib.nullcontext():
        read_deepspeed_json(str(path), functools.partial(find_json_refusals, auto_fp16=enabled))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The output folders of one short training under each config."""
    folder = tmp_path_factory.mktemp("configs")
    flags = [
        *("--model_name_or_path", str(make_model(folder / "model"))),
        *("--train_file", str(write_text(folder / "text.txt"))),
        *("--max_steps", str(STEPS), "--block_size", "32", "--learning_rate", "5e-3", "--disable_tqdm", "True"),
        *("--per_device_train_batch_size", "2", "--lora_rank", "3"),
        # The size of this model's gradients. With the usual 1e-8 the first step is the sign of every gradient, also
        # of those that are nothing but rounding, and stage 3 rounds otherwise than stage 0.
        *("--adam_epsilon", "1e-3"),
    ]
    configs = [str(CONFIGS / f"{name}.json") for name in NAMES]
    # Forked, ranks end without the interpreter's: gloo's threads outlive destroy_process_group and may abort it.
    mp.start_processes(train_configs, (2, free_port(), flags, configs, str(folder)), 2, start_method="forkserver")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_the_loss(runs, name):
    metrics = json.loads((runs / name / "metrics.json").read_text())
    assert metrics["steps"] == STEPS
    assert metrics["world_size"] == 2
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "zero0"])
def test_every_stage_leaves_the_adapter_of_stage_0(runs, name):
    expected = load_file(runs / "zero0" / "adapter_model.safetensors")
    adapter = load_file(runs / name / "adapter_model.safetensors")
    assert adapter.keys() == expected.keys()
    assert all(tensor.numel() > 0 for tensor in adapter.values())
    for key, tensor in adapter.items():
        # float32: only the order of reduction differs, over 4 steps that move the factors by about 1e-2.
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6)


def test_plain_peft_merges_the_adapter_of_a_sharded_model(runs):
    base = AutoModelForCausalLM.from_pretrained(runs / "model")
    before = base.lm_head.weight.clone(), base.model.layers[0].mlp.up_proj.weight.clone()
    merged = PeftModel.from_pretrained(base, runs / "zero3").merge_and_unload()
    assert torch.equal(merged.lm_head.weight, before[0])  # "all linear layers" leaves the output layer out
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, before[1])
