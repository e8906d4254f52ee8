"""A start from gradients: its directions are the gradient's, and nothing else of the model changes."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from launch_helpers import CONFIGS, make_model, write_text
from models import odd_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from loft_ds import LoFTAdamW, start_from_gradients
from loft_ds.start import LENGTH
from loft_ds.training import train
from loft_ds.training.checks import LaunchError
from loft_ds.zero.config import SettingsError
from studies.methods import METHODS
from studies.tasks import Factorisation

M, N, R = 9, 12, 3


def new_layer(r=R, base=None, **config):
    """One layer in float64 with a new adapter, and the gradient that its weight has."""
    torch.manual_seed(0)
    base = base or nn.Linear(N, M, bias=False)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], **config)
    model = get_peft_model(nn.Sequential(base), config).double()
    gradient = torch.randn(M, N, dtype=torch.float64)
    return model, model.base_model.model[0], gradient


def by_directions(product, gradient):
    """What a product does along the singular directions of a gradient, without signs."""
    left, _, right = torch.linalg.svd(gradient)
    return (left.T @ product @ right.T).abs()


@pytest.mark.parametrize("r", [1, R, 8], ids="r = {}".format)
def test_its_directions_are_the_gradients(r):
    model, layer, gradient = new_layer(r)
    start_from_gradients(model, lambda: (layer.get_base_layer().weight * gradient).sum().backward())
    found = by_directions(layer.get_delta_weight("default"), gradient)
    values = torch.linalg.svdvals(gradient)
    expected = torch.zeros(M, N, dtype=torch.float64)
    second = min(r, M - r)  # the last r, where there are fewer than 2 r
    for i in range(r):
        expected[second + i, i] = values[second + i]
    # svd_lowrank draws at random and iterates; with all directions in its basis or a few more it has converged.
    torch.testing.assert_close(found, LENGTH * expected / expected.norm(), rtol=0, atol=1e-3)
    assert float(layer.get_delta_weight("default").norm()) == pytest.approx(LENGTH)


def test_a_gradient_of_fewer_directions():
    """As of one token: the others are any, and no number is lost."""
    model, layer, gradient = new_layer()
    one = gradient[:, :1] @ gradient[:1]
    start_from_gradients(model, lambda: (layer.get_base_layer().weight * one).sum().backward())
    product = layer.get_delta_weight("default").detach()
    assert float(product.norm()) == pytest.approx(LENGTH)
    assert float((product @ gradient[0]).norm()) > 0.5 * LENGTH / R**0.5 * float(gradient[0].norm()), "A has the one"


def test_a_weight_that_is_stored_the_other_way_round():
    model, layer, gradient = new_layer(base=Conv1D(M, N), fan_in_fan_out=True)
    start_from_gradients(model, lambda: (layer.get_base_layer().weight * gradient.T).sum().backward())
    found = by_directions(layer.get_delta_weight("default").T, gradient)
    assert found[R, 0] == found.max() > LENGTH / 2


def test_it_is_the_start_of_the_study():
    """With the gradient of the very loss that PEFT's LoRA-GA has there."""
    task = Factorisation(m=M, n=N, rank=4)
    prepared = METHODS["LoFT, gradient start left in"].prepare(task, task.model(0), rank=2, lr=1e-3, seed=0)
    (theirs,) = (module for module in prepared.model.modules() if isinstance(module, LoraLayer))
    model = get_peft_model(task.model(0), LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    start_from_gradients(model, lambda: task.loss(model, 0, 0).backward())
    gradient = -task._target(0)  # of a squared error from zero, but for a number
    ours, theirs = (
        by_directions(each.get_delta_weight("default"), gradient) for each in (model.base_model.model[0], theirs)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def loss(model, scale=1.0):
    return scale * model(torch.linspace(-1, 1, 14).reshape(2, 7)).square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_factors_changes(dtype):
    model = odd_model(zero_b=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for name, p in model.named_parameters():
        if name in frozen:
            p.data = p.to(dtype)
            before[name] = before[name].to(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        start_from_gradients(model, lambda: loss(model).backward())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_A" not in name and not name.endswith("lora_B.default.weight")), (
            name
        )
        assert p.requires_grad == (name not in frozen)
        assert p.grad is None
    assert model.peft_config["default"].init_lora_weights is True, "to PEFT it is an ordinary adapter"


def test_it_trains_from_there():
    model = odd_model(zero_b=True)
    start_from_gradients(model, lambda: loss(model).backward())
    optimizer, before = LoFTAdamW(model, lr=1e-2), float(loss(model))
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert float(loss(model)) < 0.9 * before


def test_a_layer_without_a_gradient_stays_at_zero():
    model = odd_model(zero_b=True)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    start_from_gradients(model, lambda: (layers[0].get_base_layer().weight.sum() + 0 * loss(model)).backward())
    assert [bool(layer.lora_B["default"].weight.any()) for layer in layers] == [True, False, False, False]


def quantised(layer):
    weight = layer.get_base_layer().weight
    layer.get_base_layer().weight = nn.Parameter(weight.to(torch.uint8), requires_grad=False)


def partitioned(layer):
    layer.get_base_layer().weight.ds_id = 0


def trained(layer):
    nn.init.ones_(layer.lora_B["default"].weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (quantised, "model.0: its weight has no gradient to start from, as it is quantised"),
        (partitioned, "model.0: its weight is partitioned"),
        (trained, "lora_B.default.weight is not zero: only new adapters"),
    ],
)
def test_where_it_cannot_start(change, said):
    model, layer, _ = new_layer()
    change(layer)
    with pytest.raises(ValueError, match=said):
        start_from_gradients(model, lambda: pytest.fail("it computes gradients all the same"))


@pytest.mark.parametrize(
    ("scale", "said"), [(None, "no adapted weight has a gradient"), (float("inf"), "the gradient of its weight is not")]
)
def test_a_gradient_that_is_none(scale, said):
    model = odd_model(zero_b=True)
    with pytest.raises(RuntimeError, match=said):
        start_from_gradients(model, lambda: scale and loss(model, scale).backward())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer.weight" in name)


def starts(rank, world):
    model = odd_model(zero_b=True)
    torch.manual_seed(rank)
    start_from_gradients(model, lambda: loss(model, 1.0 + rank).backward())
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])


def test_ranks_start_alike(ranks):
    """svd_lowrank draws at random, and each rank may have batches of its own."""
    first, second = ranks(2)(starts)
    assert torch.equal(first, second)


def start_where_one_fails(rank, world):
    model = odd_model(zero_b=True)
    with pytest.raises(RuntimeError, match="not on this rank"):
        start_from_gradients(model, lambda: fail() if rank else loss(model).backward())


def fail():
    raise RuntimeError("not on this rank")


def test_a_rank_that_fails_leaves_none_waiting(ranks):
    ranks(2)(start_where_one_fails)


def test_what_trains_besides_goes_on_training():
    model, layer, gradient = new_layer()
    weight = layer.get_base_layer().weight.requires_grad_(True)
    start_from_gradients(model, lambda: (weight * gradient).sum().backward())
    assert weight.requires_grad
    assert weight.grad is None


def test_the_main_job_starts_from_gradients(tmp_path):
    assert not dist.is_initialized()
    model, text = make_model(tmp_path / "model"), write_text(tmp_path / "text.txt")
    flags = ["--model_name_or_path", str(model), "--train_file", str(text), "--use_cpu"]
    flags += ["--init_lora_weights", "gradients"]
    flags += [
        "--max_steps",
        "1",
        "--learning_rate",
        "1e-12",
        "--block_size",
        "32",
        "--lora_rank",
        "2",
        "--lora_alpha",
        "16",
    ]
    train.train([*flags, "--output_dir", str(tmp_path / "out"), "--report_to", "none", "--disable_tqdm", "True"])
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    lengths = [
        float((8 * adapter[b] @ adapter[b.replace("lora_B", "lora_A")]).norm()) for b in adapter if "lora_B" in b
    ]
    assert lengths == pytest.approx([LENGTH] * len(lengths), rel=1e-4)


def test_where_the_main_job_cannot(tmp_path, monkeypatch):
    flags = ["--init_lora_weights", "gradients"]
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes" or there(name))
    with pytest.raises(LaunchError, match="quantised weights have no gradient"):
        train.train([*flags, "--load_in_4bit"])
    with pytest.raises(SettingsError, match="at stage 3 no rank has a whole weight"):
        train.train([*flags, "--deepspeed", str(CONFIGS / "zero3.json")])
