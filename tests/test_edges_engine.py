"""What users do with a DeepSpeed engine: switch adapters under it, park it, write into its optimizer's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch, odd_model, trained
from peft import LoraConfig
from torch import Tensor

from loft_ds import LoFTAdamW, offload_states, reload_states

PARTS = ("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer")


def engine_of(model: torch.nn.Module, stage: int, world: int, *, bf16: bool = False, **kwargs: Any) -> Any:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 12 // world,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    optimizer = LoFTAdamW(model, lr=1e-2, **kwargs)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def take_step(engine: Any, step: int, rank: int, world: int) -> None:
    x, y = (t.chunk(world)[rank] for t in batch(step))
    loss = (engine(x.to(engine.communication_data_type)).float() - y).square().mean()
    engine.backward(loss)
    engine.step()


def weights(engine: Any) -> dict[str, Tensor]:
    """What this rank holds of all that is trained, without the padding that DeepSpeed puts behind it."""
    out = {}
    for name, p in trained(engine.module).items():
        held = getattr(p, "ds_tensor", p).detach().flatten()
        if hasattr(p, "ds_numel"):
            held = held[: max(0, p.ds_numel - held.numel() * torch.distributed.get_rank())]
        out[name] = held.clone()
    return out


# --- other adapters than those that the optimizer was built for


def switch_adapters(rank: int, world: int, stage: int, when: str) -> None:
    model = odd_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "2"]))
    model.set_adapter("default")
    optimizer = LoFTAdamW(model, lr=1e-2)
    if when == "before the engine":
        model.set_adapter("second")
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 6, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config={**settings, "zero_optimization": {"stage": stage}}
    )
    if when == "after a step":
        take_step(engine, 0, rank, world)
    model.set_adapter("second")
    before = weights(engine)
    with pytest.raises(RuntimeError, match=r"adapter.*(build it, and the engine, anew|Build)|Build it.*set_adapter"):
        take_step(engine, 1, rank, world)
    assert all(torch.equal(now, before[name]) for name, now in weights(engine).items())


@pytest.mark.parametrize("when", ["before the engine", "before a step", "after a step"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_adapter_than_the_optimizers_raises(ranks, stage, when):
    ranks(2)(switch_adapters, stage, when)


def train_one_of_two(rank: int, world: int, stage: int) -> None:
    """A loss that is flat has gradients, of zero; a second optimizer on the same model takes the watch over."""
    model = odd_model()
    engine = engine_of(model, stage, world)
    take_step(engine, 0, rank, world)
    before = weights(engine)
    x, _ = batch(1)
    engine.backward((engine(x.chunk(world)[rank]) * 0.0).sum())
    engine.step()
    # Momentum goes on, as AdamW's does.
    assert any(not torch.equal(now, before[name]) for name, now in weights(engine).items())
    LoFTAdamW(model)
    take_step(engine, 2, rank, world)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_flat_loss_and_another_optimizer_do_not_stop_it(ranks, stage):
    ranks(2)(train_one_of_two, stage)


# --- parked


def park(rank: int, world: int, stage: int, bf16: bool, parts: tuple[str, ...] | None, ours: dict[str, Any]) -> None:
    unbroken, parked = (engine_of(odd_model(), stage, world, bf16=bf16, **ours) for _ in range(2))
    for step in range(4):
        if step == 2:
            saved = {name: dict(each) for name, each in parked.basic_optimizer.state.items()}
            offload_states(parked, parts)
            now = parked.basic_optimizer.state
            for name, each in saved.items():
                for kind, value in each.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(now[name][kind])), (name, kind)
            left_to_us = {"optim_states", "lp_params"} if stage == 3 else {"optim_states", "contiguous_grad_buffer"}
            assert parked.optimizer.offloaded_states == set(parts or PARTS) - left_to_us
            reload_states(parked)
            assert not parked.optimizer.offloaded_states
        take_step(unbroken, step, rank, world)
        take_step(parked, step, rank, world)
    wanted = weights(unbroken)
    assert all(torch.equal(now, wanted[name]) for name, now in weights(parked).items())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_parked_engine_goes_on_to_the_last_bit(ranks, stage, bf16):
    ranks(2)(park, stage, bf16, None, {})


@pytest.mark.parametrize("parts", [("optim_states",), ("hp_params", "lp_params")])
def test_parts_of_an_engine_are_parked(ranks, parts):
    ranks(2)(park, 3, True, parts, {"turns": "alternate", "offload_second_moment": True})


def park_wrongly(rank: int, world: int) -> None:
    engine = engine_of(odd_model(), 2, world)
    take_step(engine, 0, rank, world)
    with pytest.raises(TypeError, match=r"loft_ds\.offload_states\(engine\)"):
        engine.offload_states(pin_memory=False)
    whole = engine_of(odd_model(), 0, world)
    take_step(whole, 0, rank, world)
    with pytest.raises(ValueError, match="stages 1 to 3 alone"):
        offload_states(whole)
    with pytest.raises(ValueError, match="weights"):
        offload_states(engine, ["weights"])


def test_parking_that_would_leave_lofts_state_behind_raises(ranks):
    ranks(2)(park_wrongly)
