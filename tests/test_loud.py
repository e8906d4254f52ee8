"""Under DeepSpeed LoFT works or raises: each way it could be swapped out or misled, and what the error says."""

import copy
import re

import pytest
import torch
from models import batch, odd_model, train_alone, trained
from sharded_run import start_engine, train_engine

from loft_ds import LoFTAdamW


def message(rank, world, build, **config):
    """The error that one step of what ``build(model)`` returns as optimizer ends with."""
    model = odd_model()
    try:
        engine = start_engine(model, build(model), world, 2, **config)
        train_engine(engine, rank, world, range(2))
    except Exception as error:  # whatever it is, the test reads it
        return f"{type(error).__name__}: {error}"
    return "no error"


def adamw_in_its_place(model):
    model.loft = LoFTAdamW(model)
    return torch.optim.AdamW(trained(model).values())


class DeepSpeedCPUAdam(torch.optim.AdamW):
    """Stands for DeepSpeed's, whose CPU extension takes a minute to compile; it is found out by its name."""


def cpu_adam_in_its_place(model):
    model.loft = LoFTAdamW(model)
    return DeepSpeedCPUAdam(trained(model).values())


def of_another_model(model):
    return LoFTAdamW(copy.deepcopy(model))


def contradicting(model):
    return LoFTAdamW(model, max_grad_norm=0.5)


CASES = {
    "control": (LoFTAdamW, {}, "no error"),
    "swapped for AdamW": (adamw_in_its_place, {}, "LoFTAdamW was swapped out.* with AdamW.*optimizer_cls_and_kwargs"),
    "swapped at stage 3": (
        adamw_in_its_place,
        {"zero_optimization": {"stage": 3}},
        "LoFTAdamW was swapped out.* with AdamW",
    ),
    "swapped for DeepSpeedCPUAdam": (cpu_adam_in_its_place, {}, '"zero_force_ds_cpu_optimizer": false'),
    "zero_force_ds_cpu_optimizer": (
        LoFTAdamW,
        {
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "zero_force_ds_cpu_optimizer": True,
        },
        '"zero_force_ds_cpu_optimizer": false',
    ),
    "zero_allow_untested_optimizer": (
        LoFTAdamW,
        {"zero_allow_untested_optimizer": False},
        "zero_allow_untested_optimizer",
    ),
    "another model, stage 0": (of_another_model, {"zero_optimization": {"stage": 0}}, "no LoRA pair has a gradient"),
    "another model, stage 0, bf16": (
        of_another_model,
        {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
        "no gradient reached the parameters of the model it was built from",
    ),
    "another model, stage 2": (of_another_model, {}, "KeyError: Parameter containing"),  # DeepSpeed's own
    "two clipping norms": (
        contradicting,
        {"gradient_clipping": 1.0},
        '"gradient_clipping": 1.0 in the DeepSpeed JSON contradicts max_grad_norm=0.5',
    ),
    "offload ratio": (
        LoFTAdamW,
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "Hybrid Optimizer Only Supports DeepSpeedCPUAdam",  # DeepSpeed's own: it would move the rest with AdamW
    ),
    "ZenFlow, stage 3": (  # under the same wrapper as without
        LoFTAdamW,
        {"zero_optimization": {"stage": 3, "zenflow": {}}},
        "NotImplementedError: LoFT does not support ZenFlow",
    ),
    "offload to nvme": (
        LoFTAdamW,
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
        'NotImplementedError: LoFT does not support offload_optimizer.device "nvme"',
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_works_or_raises(ranks, name):
    build, config, expected = CASES[name]
    (said,) = ranks(1)(message, build, **config)
    assert re.search(expected, said, flags=re.DOTALL), said


def rebuilt(rank, world, stage, early):
    """Norms and clipping of a second engine on a model that an earlier one has trained, which is still referenced.

    With ``early`` there is a backward pass before ``deepspeed.initialize`` instead of an earlier engine.
    """
    model = odd_model()

    def build(optimizer):
        return start_engine(model, optimizer, world, stage, gradient_clipping=0.2)

    optimizer = LoFTAdamW(model, lr=1e-3)
    if early:
        x, y = batch(1)
        (model(x) - y).square().mean().backward()
        optimizer.zero_grad()
        norms = []
    else:
        first = build(optimizer)
        norms, _ = train_engine(first, rank, world, [0])
        first.destroy()
        optimizer = LoFTAdamW(model, lr=1e-3)
    second = build(optimizer)
    norms += train_engine(second, rank, world, [0])[0]
    clips = second.basic_optimizer.max_grad_norm, second._config.gradient_clipping
    second.destroy()
    return norms, clips


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_second_engine_and_an_early_backward(ranks, stage, early):
    """LoFT finds the engine that is its own, and takes the clipping over in each case."""
    ((norms, clips),) = ranks(1)(rebuilt, stage, early)
    assert clips == (0.2, 0.0)
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-3, max_grad_norm=0.2)
    expected = []
    for _ in norms:
        expected += train_alone(model, optimizer, [0])[0]
        optimizer = LoFTAdamW(model, lr=1e-3, max_grad_norm=0.2)
    assert norms == pytest.approx(expected, rel=1e-6)  # one rank: the same float32 sums
