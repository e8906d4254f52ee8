"""Every script in examples/ trains a tiny model with LoFT, under DeepSpeed on two ranks where it can.

Scripts share processes, since importing takes longer than training. This file is also the program that runs them:
``python tests/test_examples.py '[["SCRIPT", "FLAG", ...], ...]'``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from launch_helpers import CONFIGS, ROOT, free_port, make_model, unlaunched
from safetensors.torch import load_file

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.rehearse
PACKAGES = {name: Path(sys.prefix) / name for name in ("trl", "lightning", "quantised")}  # `make setup` fills them
LINES = 60
STEPS = 8
# So small a random model moves little, so its rate is far above the scripts' own. MODELS and OUT are folders.
TINY = {"--model": "MODELS/dense", "--max_steps": STEPS, "--learning_rate": 1e-2}
# TRL's own default is bfloat16, which rounds away what these checks look at.
TRAINER = TINY | {"--use_cpu": "True", "--bf16": "False", "--logging_steps": 1, "--disable_tqdm": "True"}
ZERO2, ZERO3 = (TRAINER | {"--deepspeed": CONFIGS / f"zero{stage}.json"} for stage in (2, 3))

DEEPSPEED = ["deepspeed", "--num_accelerators", "2", "--master_port", "PORT"]
TORCHRUN = ["torchrun", "--nproc_per_node", "2", "--master_port", "PORT"]
ACCELERATE = ["accelerate", "launch", "--config_file", "OUT/accelerate.yaml", "--main_process_port", "PORT"]
# `accelerate launch` takes no --cpu beside --use_deepspeed.
YAML = (
    "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\n"
    "use_cpu: true\nmixed_precision: 'no'\ndeepspeed_config: {zero_stage: 2}\n"
)

# The launcher, the packages beside the environment that it needs, and what runs in its processes, in this order.
GROUPS = {
    "two ranks": (
        DEEPSPEED,
        ["trl"],
        {
            "trainer": ZERO2,
            "trl_sft": ZERO2,
            "trl_dpo": ZERO3,
            # So many answers that their mean reward stands out of the noise.
            "trl_grpo": ZERO2 | {"--max_steps": 12, "--per_device_train_batch_size": 64, "--learning_rate": 3e-2},
            "vision_language": ZERO2 | {"--model": "MODELS/vision_language"},
            "continue_adapter": ZERO3 | {"--adapter": "OUT/trainer", "--learning_rate": 1e-3},
        },
    ),
    "one process": (
        ["python"],
        ["trl"],
        {
            "trl_reward": TRAINER,
            "experts": TRAINER | {"--model": "MODELS/experts"},
            "accelerate_loop": TINY,
            "merge": {"--adapter": "OUT/accelerate_loop"},
        },
    ),
    "accelerate launch": (ACCELERATE, [], {"accelerate_loop": TINY}),
    "Lightning": (["python"], ["lightning"], {"lightning_loop": TINY | {"--accelerator": "cpu"}}),
    "Lightning, DDP": (
        TORCHRUN,
        ["lightning"],
        {"lightning_loop": TINY | {"--accelerator": "cpu", "--devices": 2, "--strategy": "ddp"}},
    ),
    "four bits": (["python"], ["quantised"], {"qlora": TRAINER}),
}
TRAINED = [(group, name) for group, (*_, scripts) in GROUPS.items() for name in scripts if name != "merge"]


def make_experts(model: Path, folder: Path) -> Path:
    """Saves a random mixture of four experts, with the tokenizer of the other model."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=len(tokenizer), num_hidden_layers=1, num_local_experts=4, **size)
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_vision_language(model: Path, folder: Path) -> Path:
    """Saves a random model that sees pictures of 16 points, with its processor and the other model's tokenizer."""
    from transformers import (
        AutoTokenizer,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    )
    edge = {"longest_edge": 16}
    pictures = Idefics3ImageProcessorPil(size=edge, max_image_size=edge)
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template)
    processor.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, **size}
    config = Idefics3Config(
        vision_config={"image_size": 16, "patch_size": 4, **size},
        text_config={**text, "pad_token_id": tokenizer.pad_token_id},
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model = make_model(folder / "dense")
    make_experts(model, folder / "experts")
    make_vision_language(model, folder / "vision_language")
    return folder


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """``run(group)`` is the folder of what a group has left there; it runs once."""

    @functools.cache
    def launch(group: str) -> tuple[Path, subprocess.CompletedProcess]:
        launcher, packages, scripts = GROUPS[group]
        out = tmp_path_factory.mktemp("out")
        work = []
        for name, flags in scripts.items():
            words = [EXAMPLES / f"{name}.py", *(word for flag in flags.items() for word in flag)]
            words += ["--output_dir", out / name]
            if name == "continue_adapter":  # it takes the model of the adapter
                del words[1:3]
            work.append([str(word).replace("MODELS", str(models)).replace("OUT", str(out)) for word in words])
        (out / "accelerate.yaml").write_text(YAML)
        program, *rest = [word.replace("PORT", str(free_port())).replace("OUT", str(out)) for word in launcher]
        command = [Path(sys.executable).parent / program, *rest, __file__, json.dumps(work)]
        environment = unlaunched(ROOT / "launch", *(PACKAGES[package] for package in packages))
        return out, subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def run_group(group: str) -> Path:
        for package in GROUPS[group][1]:
            if not PACKAGES[package].is_dir():
                pytest.skip(f"tests/{package}.txt is not installed in {PACKAGES[package]}: run make setup")
        out, done = launch(group)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (out / "stdout").write_text(done.stdout)
        return out

    return run_group


def logged(folder: Path, what: str) -> list[float]:
    """A quantity of every step, as the script has kept it."""
    if (state := folder / "trainer_state.json").is_file():
        return [entry[what] for entry in json.loads(state.read_text())["log_history"] if what in entry]
    return [float(number) for number in re.findall(rf"{what} (\S+)", (folder.parent / "stdout").read_text())]


@pytest.mark.parametrize(("group", "name"), TRAINED, ids=[f"{name}, {group}" for group, name in TRAINED])
def test_an_example_trains_with_loft(run, group, name):
    folder = run(group) / name
    steps = GROUPS[group][2][name].get("--max_steps", STEPS)
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["optimizers"] == ["LoFTAdamW"]  # of all that torch knows, who has stepped
    assert facts["steps"] == [steps]  # of every pair: an accumulated step counts once
    adapter = load_file(folder / "adapter_model.safetensors")
    for tensor_name, tensor in adapter.items():
        assert tensor.isfinite().all(), tensor_name
        assert tensor.abs().max() > 0, tensor_name  # B begins at zero
    # Whole, or about a half of each factor on the first of two ranks that share it by ZeRO.
    share = facts["momentum"] / sum(t.numel() for tensor_name, t in adapter.items() if "lora_" in tensor_name)
    assert 0.4 < share < 0.6 if group in ("two ranks", "accelerate launch") else share == 1
    losses = logged(folder, "loss")
    assert len(losses) == steps
    assert all(math.isfinite(loss) for loss in losses)
    if name != "trl_grpo":  # its loss is zero by construction wherever a batch is used once
        assert min(losses[-2:]) < losses[0]


def test_grpo_earns_more(run):
    rewards = logged(run("two ranks") / "trl_grpo", "reward")
    # A random model answers with a digit once in 25 tokens. Of 128 answers of 16 tokens that mean is known within 11% a
    # step, and within 4% over the last nine.
    assert sum(rewards[-9:]) / 9 > 1.15 * 10 / 257


def test_dpo_begins_at_its_reference(run):
    assert logged(run("two ranks") / "trl_dpo", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)  # float32


def test_an_adapter_is_continued(run):
    """The second stage's sentences are nearly the first one's."""
    first, second = (logged(run("two ranks") / name, "loss") for name in ("trainer", "continue_adapter"))
    assert abs(second[0] - first[-1]) < abs(second[0] - first[0])


def test_a_merged_model_is_the_adapter_on_its_base(run, models):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = run("one process") / "merge"
    ids = torch.tensor([AutoTokenizer.from_pretrained(merged)("3 times 4 is").input_ids])
    sources = {
        "merged": AutoModelForCausalLM.from_pretrained(merged),
        "adapter": AutoPeftModelForCausalLM.from_pretrained(run("one process") / "accelerate_loop"),
        "base": AutoModelForCausalLM.from_pretrained(models / "dense"),
    }
    with torch.no_grad():
        logits = {name: model(ids).logits for name, model in sources.items()}
    torch.testing.assert_close(logits["merged"], logits["adapter"], rtol=1e-4, atol=1e-5)  # float32 in another order
    assert (logits["merged"] - logits["base"]).abs().max() > 0.1


def test_each_expert_has_a_pair_of_its_own(run):
    shapes = {t.shape for n, t in load_file(run("one process") / "experts" / "adapter_model.safetensors").items()}
    assert torch.Size([4 * 8, 32]) in shapes


def test_what_sees_is_adapted_too(run):
    names = load_file(run("two ranks") / "vision_language" / "adapter_model.safetensors")
    parts = {re.search(r"vision_model|connector|text_model", name)[0] for name in names}
    assert parts == {"vision_model", "connector", "text_model"}


def test_lightnings_deepspeed_strategy_takes_no_cpu(models):
    """So the tests can run the example with its other strategies alone."""
    if not PACKAGES["lightning"].is_dir():
        pytest.skip(f"tests/lightning.txt is not installed in {PACKAGES['lightning']}: run make setup")
    command = [sys.executable, EXAMPLES / "lightning_loop.py", "--model", models / "dense"]
    environment = unlaunched(PACKAGES["lightning"])
    done = subprocess.run(
        [*command, "--strategy", "deepspeed_stage_2"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "The DeepSpeed strategy is only supported on CUDA GPUs but `CPUAccelerator` is used" in done.stderr


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """``fit(steps)`` trains an odd model in Lightning: LoFT's optimizer of it."""
    if not PACKAGES["lightning"].is_dir():
        pytest.skip(f"tests/lightning.txt is not installed in {PACKAGES['lightning']}: run make setup")
    monkeypatch.syspath_prepend(PACKAGES["lightning"])
    from lightning.pytorch import LightningModule, Trainer
    from models import batch, odd_model

    from loft_ds import LoFTAdamW

    class Module(LightningModule):
        def __init__(self, norm):
            super().__init__()
            self.model, self.norm = odd_model(), norm

        def training_step(self, rows, number):
            x, y = rows
            return (self.model(x) - y).square().mean()

        def configure_optimizers(self):
            self.loft = LoFTAdamW(self.model, lr=1e-3, max_grad_norm=self.norm)
            return self.loft

    class Empty(Module):
        def on_train_end(self):
            self.trainer.optimizers = []

    def train(steps, first=0, norm=0.2, kind=Empty, begin=None, path=None, **options):
        module = kind(norm)
        if begin:
            module.on_train_start = lambda: begin(module.loft)
        options = {"max_steps": steps, "accelerator": "cpu", "enable_progress_bar": False, "logger": False, **options}
        loader = torch.utils.data.DataLoader([batch(first + step) for step in range(steps)], batch_size=None)
        with warnings.catch_warnings():
            # The process that collects the tests' warnings could not import Lightning's classes.
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", message="the norm of the factors' own gradients")
            trainer = Trainer(enable_checkpointing=False, enable_model_summary=False, **options)
            trainer.fit(module, loader, ckpt_path=path, weights_only=False)
            trainer.optimizers = [module.loft]
            trainer.save_checkpoint(tmp_path / "lightning.ckpt")
        return module.loft

    train.plain = Module
    return train


def state_of(optimizer) -> list:
    tensors = [p.detach() for p in optimizer.model.parameters()]
    return tensors + [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def test_lightnings_loop_is_one_by_hand(fit):
    from models import batch, odd_model

    from loft_ds import LoFTAdamW

    expected = LoFTAdamW(odd_model(), lr=1e-3, max_grad_norm=0.2)
    for step in range(4):
        x, y = batch(step)
        expected.zero_grad()
        (expected.model(x) - y).square().mean().backward()
        expected.step()
        assert expected.grad_norm > 0.2
    assert all(map(torch.equal, state_of(fit(4)), state_of(expected)))


def test_lightning_goes_on_from_lofts_checkpoint(fit, tmp_path):
    from loft_ds import load_checkpoint, save_checkpoint

    whole, half = fit(6), fit(3)
    save_checkpoint(half, tmp_path / "half")
    resumed = fit(3, first=3, begin=lambda loft: load_checkpoint(loft, tmp_path / "half"))
    assert all(map(torch.equal, state_of(resumed), state_of(whole)))


def test_what_lightning_does_to_state_and_gradients_is_heard(fit, tmp_path):
    with pytest.raises(TypeError, match="written into it would be lost"):  # when it ends
        fit(3, kind=fit.plain)
    fit(3)
    with pytest.raises(TypeError, match="written into it would be lost"):  # when it loads
        fit(6, path=tmp_path / "lightning.ckpt")
    with pytest.warns(UserWarning, match=r"factors' own gradients was 0\.2 in 6 steps running"):
        fit(6, norm=None, gradient_clip_val=0.2)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.name)
def test_an_example_is_short_and_is_run(script):
    assert len(script.read_text().splitlines()) <= LINES
    assert any(script.stem in scripts for *_, scripts in GROUPS.values())
    assert f"examples/{script.name}" in (ROOT / "docs" / "examples.md").read_text()


def run_scripts(scripts: list[list[str]]) -> None:
    """Runs scripts one after the other in this process, and notes which optimizers of torch's have stepped in each."""
    import deepspeed
    import deepspeed.ops
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from loft_ds import LoFTAdamW

    # Without it DeepSpeed compiles a shared-memory collective for a minute and more.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    stepped: list[torch.optim.Optimizer] = []
    register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))
    for script, *flags in scripts:
        stepped.clear()
        sys.argv = [script, *flags]
        if "RANK" in os.environ:  # on GPUs Accelerate does either; on CPUs it would see one process under DeepSpeed
            deepspeed.init_distributed(verbose=False)
            PartialState(cpu=True)
        runpy.run_path(script, run_name="__main__")
        if stepped and os.environ.get("RANK", "0") == "0":
            (loft,) = {each for each in stepped if isinstance(each, LoFTAdamW)}
            pairs = [state for parameter, state in loft.state.items() if "lora_" in parameter]
            facts = {
                "optimizers": sorted({type(each).__name__ for each in stepped}),
                "steps": sorted({state["step"] for state in pairs}),
                "momentum": sum(state["momentum"].numel() for state in pairs),
            }
            (Path(flags[flags.index("--output_dir") + 1]) / "facts.json").write_text(json.dumps(facts))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_scripts(json.loads(sys.argv[-1]))
    # As a fork server's children end: DeepSpeed keeps the process group, and a thread of gloo's that outlives the
    # interpreter aborts the process now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
