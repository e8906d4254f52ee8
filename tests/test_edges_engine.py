"""What users do with a DeepSpeed engine: switch adapters under it, park it, write into its optimizer's state."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from models import batch, odd_model, trained
from peft import LoraConfig, get_peft_model
from sharded_run import start_engine, train_engine
from torch import Tensor

from loft_ds import CheckpointError, LoFTAdamW, load_checkpoint, offload_states, reload_states, save_checkpoint

PARTS = ("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer")


def engine_of(model: torch.nn.Module, stage: int, world: int, *, bf16: bool = False, **kwargs: Any) -> Any:
    """An engine with a LoFTAdamW of its own, which takes ``kwargs``."""
    return start_engine(model, LoFTAdamW(model, lr=1e-2, **kwargs), world, stage, bf16={"enabled": bf16})


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
    engine = start_engine(model, optimizer, world, stage)
    if when == "after a step":
        train_engine(engine, rank, world, [0])
    model.set_adapter("second")
    before = weights(engine)
    with pytest.raises(RuntimeError, match=r"adapter.*(build it, and the engine, anew|Build)|Build it.*set_adapter"):
        train_engine(engine, rank, world, [1])
    assert all(torch.equal(now, before[name]) for name, now in weights(engine).items())


@pytest.mark.parametrize("when", ["before the engine", "before a step", "after a step"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_adapter_than_the_optimizers_raises(ranks, stage, when):
    ranks(2)(switch_adapters, stage, when)


def train_one_of_two(rank: int, world: int, stage: int) -> None:
    """A loss that is flat has gradients, of zero; a second optimizer on the same model takes the watch over."""
    model = odd_model()
    engine = engine_of(model, stage, world)
    train_engine(engine, rank, world, [0])
    before = weights(engine)
    x, _ = batch(1)
    engine.backward((engine(x.chunk(world)[rank]) * 0.0).sum())
    engine.step()
    # Momentum goes on, as AdamW's does.
    assert any(not torch.equal(now, before[name]) for name, now in weights(engine).items())
    LoFTAdamW(model)
    train_engine(engine, rank, world, [2])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_flat_loss_and_another_optimizer_do_not_stop_it(ranks, stage):
    ranks(2)(train_one_of_two, stage)


# --- gradients that do not come


class Branches(torch.nn.Module):
    """Two layers of which a loss may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(7, 3), torch.nn.Linear(7, 3)

    def forward(self, x: Tensor, use: str) -> Tensor:
        return sum(getattr(self, name)(x) for name in use)


def use_branches(rank: int, world: int, stage: int, uses: list[str]) -> str:
    """What training says that uses these branches in its steps; where it goes on, that it is as with zeros."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(get_peft_model(Branches(), LoraConfig(r=2, target_modules=["a", "b"])))
    # A large eps: AdamW's first quotients are signs, of rounding too. DeepSpeed clips at 1.0 where nothing is said.
    engine = engine_of(models[0], stage, world, eps=0.03)
    alone = LoFTAdamW(models[1], lr=1e-2, eps=0.03, max_grad_norm=1.0)
    for step, use in enumerate(uses):
        x, y = batch(step)
        try:
            engine.backward(engine(x.chunk(world)[rank], use).sub(y.chunk(world)[rank]).square().mean())
            engine.step()
        except RuntimeError as error:
            return str(error)
        parts = [models[1](x.chunk(world)[r], use) - y.chunk(world)[r] for r in range(world)]
        (sum(part.square().mean() for part in parts) / world).backward()
        for p in trained(models[1]).values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        alone.step()
        alone.zero_grad()
    wanted = trained(models[1])
    for name, p in trained(engine.module).items():
        if stage < 3:
            torch.testing.assert_close(p, wanted[name], rtol=1e-4, atol=1e-6)  # float32, summed in another order
    return "as with zeros"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_pair_without_a_gradient_gets_zeros(ranks, stage):
    assert set(ranks(2)(use_branches, stage, ["ab", "a", "a", "ab"])) == {"as with zeros"}


def test_an_old_gradient_at_stage_3_is_refused(ranks):
    """A pair that never had one has zeros there too."""
    assert set(ranks(2)(use_branches, 3, ["a", "a", "ab"])) == {"as with zeros"}
    for said in ranks(2)(use_branches, 3, ["ab", "a"]):
        assert said.startswith("no gradient of base_model.model.b.lora_A.default.weight came to any rank")
        assert "use stage 2" in said


def freeze_half(rank: int, world: int, stage: int) -> str:
    engine = engine_of(odd_model(), stage, world)
    train_engine(engine, rank, world, [0])
    next(p for name, p in engine.module.named_parameters() if "2.lora_A" in name).requires_grad_(False)
    with pytest.raises(RuntimeError) as stopped:
        train_engine(engine, rank, world, [1])
    return str(stopped.value)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_pair_that_is_frozen_by_half_is_refused(ranks, stage):
    for said in ranks(2)(freeze_half, stage):
        assert "2.lora_A.default.weight and base_model.model.2.lora_B.default.weight only one has a gradient" in said


# --- the engine itself


def hide(rank: int, world: int, stage: int) -> float:
    """The norm that a step is clipped by under an engine which gc.freeze() has hidden."""
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2)
    engine = start_engine(model, optimizer, world, stage, gradient_clipping=0.05)
    gc.freeze()
    try:
        train_engine(engine, rank, world, [0])
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    return optimizer.max_grad_norm


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_engine_is_found_that_gc_has_frozen(ranks, stage):
    assert ranks(2)(hide, stage) == [0.05, 0.05]


def built_by_deepspeed(rank: int, world: int, stage: int) -> None:
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 6, "zero_allow_untested_optimizer": True}
    settings["zero_optimization"] = {"stage": stage}
    with pytest.raises(TypeError, match=r"LoFTAdamW is built from the model, not from list.*lambda params"):
        start_engine(odd_model(), LoFTAdamW, world, stage)
    model = odd_model()
    parameters = list(trained(model).values())
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        optimizer=lambda params: LoFTAdamW(model, lr=1e-2, params=params),
        config=settings,
    )
    other = engine_of(odd_model(), stage, world)
    for step in range(2):
        train_engine(engine, rank, world, [step])
        train_engine(other, rank, world, [step])
    wanted = weights(other)
    assert all(torch.equal(now, wanted[name]) for name, now in weights(engine).items())


def test_deepspeed_builds_it_from_a_function(ranks):
    ranks(2)(built_by_deepspeed, 2)


def resume_with_secondary_partitions(rank: int, world: int, folder: str) -> None:
    zero = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 10}
    engines = []
    for _ in range(2):
        model = odd_model()
        engines.append(start_engine(model, LoFTAdamW(model, lr=1e-2), world, 3, zero_optimization=zero))
    unbroken, resumed = engines
    for step in range(2):
        train_engine(unbroken, rank, world, [step])
    resumed.eval()
    resumed(batch(5)[0])  # which leaves copies of other weights
    resumed.train()
    save_checkpoint(unbroken, folder)
    load_checkpoint(resumed, folder)
    for step in range(2, 4):
        train_engine(unbroken, rank, world, [step])
        train_engine(resumed, rank, world, [step])
    wanted = weights(unbroken)
    assert all(torch.equal(now, wanted[name]) for name, now in weights(resumed).items())


def test_a_resume_reaches_the_copies_within_a_node(ranks, tmp_path):
    ranks(2)(resume_with_secondary_partitions, str(tmp_path))


def save_apart(rank: int, world: int, folder: str) -> None:
    engine = engine_of(odd_model(), 0, world)
    train_engine(engine, rank, world, [0])
    with pytest.raises(CheckpointError, match=r"under different tags, tag0, tag1"):
        save_checkpoint(engine, folder, f"tag{rank}")
    assert not list(Path(folder).iterdir())


def test_ranks_that_save_under_different_tags_are_stopped(ranks, tmp_path):
    ranks(2)(save_apart, str(tmp_path))


# --- weights that another rank holds


def gather(rank: int, world: int) -> None:
    """The first weight takes longest to come, and gloo has several threads: the last one is there before it."""
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(2048, 1024), torch.nn.Linear(1024, 3)),
        LoraConfig(r=2, target_modules=["0", "1"]),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = engine_of(model, 3, world)
    for _ in range(20):
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            assert all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())


def test_a_weight_has_come_when_it_is_read(ranks):
    """The oldest DeepSpeed that is admitted waits for every gather: pyproject.toml."""
    ranks(2)(gather)


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
        train_engine(unbroken, rank, world, [step])
        train_engine(parked, rank, world, [step])
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
    train_engine(engine, rank, world, [0])
    with pytest.raises(TypeError, match=r"loft_ds\.offload_states\(engine\)"):
        engine.offload_states(pin_memory=False)
    whole = engine_of(odd_model(), 0, world)
    train_engine(whole, rank, world, [0])
    with pytest.raises(ValueError, match="stages 1 to 3 alone"):
        offload_states(whole)
    with pytest.raises(ValueError, match="weights"):
        offload_states(engine, ["weights"])


def test_parking_that_would_leave_lofts_state_behind_raises(ranks):
    ranks(2)(park_wrongly)
