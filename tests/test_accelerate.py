"""LoFT in Accelerate's loop: clipping by whose norm, steps counted once, and state that comes back to a bit."""

import os
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from models import batch, odd_model, train_alone, trained
from torch import Tensor

from loft_ds import LoFTAdamW

STEPS, CLIP = 6, 0.2


@pytest.fixture(autouse=True)
def a_state_of_its_own():
    """Accelerate's is one of the process."""
    yield
    reset()


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepare(norm=CLIP, **options):
    model = odd_model()
    accelerator = Accelerator(cpu=True, **options)
    optimizer = LoFTAdamW(model, lr=1e-3, max_grad_norm=norm)
    return accelerator, *accelerator.prepare(model, optimizer), optimizer


def take(accelerator, model, prepared, steps, clip=None, micro=1, share=slice(None)):
    """Steps as Accelerate's loop has them, each of one batch or of micro-batches; this rank's share of each."""
    for step in steps:
        for x, y in zip(*(part[share].chunk(micro) for part in batch(step)), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - y).square().mean())
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                prepared.step()
                prepared.zero_grad()


def by_hand(norm=CLIP):
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-3, max_grad_norm=norm)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        assert norm is None or optimizer.grad_norm > norm
    return optimizer


def everything(optimizer):
    """Weights and all state, flat."""
    found: dict[str, object] = {name: p.detach().clone() for name, p in trained(optimizer.model).items()}
    for name, state in optimizer.state.items():
        found |= {f"{name}|{key}": v.clone() if isinstance(v, Tensor) else v for key, v in state.items()}
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        assert same, name


# --- clipping and accumulation


def test_the_norm_that_loft_is_told_is_a_loop_by_hand():
    accelerator, model, prepared, optimizer = prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(accelerator, model, prepared, range(STEPS))
    assert_equal(everything(optimizer), everything(by_hand()))


def test_accelerates_own_clipping_is_heard():
    """It clips by another norm, and moves the weights elsewhere."""
    accelerator, model, prepared, _ = prepare(norm=None)
    with pytest.warns(UserWarning, match=rf"factors' own gradients was {CLIP} in 6 steps running: something clips"):
        take(accelerator, model, prepared, range(STEPS), clip=CLIP)
    apart = [
        (p - q).abs().max() for p, q in zip(trained(model).values(), trained(by_hand().model).values(), strict=True)
    ]
    assert max(apart) > 1e-4  # a tenth of a step


def test_a_loss_that_stands_still_is_no_clipping():
    """The norms of a step in which B moves and of one in which A does differ, though nothing else changes."""
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=0.0, turns="alternate")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_alone(model, optimizer, [0] * 12)


@pytest.mark.parametrize(
    ("what", "clip", "same"),
    [("a norm that is never reached", 1e3, False), ("the same batch", None, True)],
)
def test_nothing_is_heard_where_nobody_clips(what, clip, same):
    accelerator, model, prepared, _ = prepare(norm=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(accelerator, model, prepared, [0] * 20 if same else range(20), clip)


def test_an_accumulated_step_is_one():
    accelerator, model, prepared, optimizer = prepare(gradient_accumulation_steps=3)
    take(accelerator, model, prepared, range(STEPS), micro=3)
    expected = everything(by_hand())
    for name, value in everything(optimizer).items():
        if isinstance(value, Tensor):
            if "|" not in name:  # states are written in bases that are one of many
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert value == expected[name], name


# --- save_state and load_state


def resumed(folder, share=slice(None)):
    """All there is after six steps, and after the last three once more, loaded into what had gone elsewhere."""
    accelerator, model, prepared, optimizer = prepare()
    take(accelerator, model, prepared, range(3), share=share)
    accelerator.save_state(folder)
    take(accelerator, model, prepared, range(3, STEPS), share=share)
    whole = everything(optimizer)
    reset()
    accelerator, model, prepared, optimizer = prepare()
    take(accelerator, model, prepared, range(10, 12), share=share)
    accelerator.load_state(folder)
    take(accelerator, model, prepared, range(3, STEPS), share=share)
    return whole, everything(optimizer)


def test_a_saved_state_comes_back_to_a_bit(tmp_path):
    whole, again = resumed(tmp_path)
    assert_equal(again, whole)
    assert_equal(whole, everything(by_hand()))  # and saving changes nothing


def on_a_rank(rank, world, folder):
    """The same with DDP."""
    reset()  # another test may have left its own on this rank
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    try:
        return resumed(folder, slice(rank, None, world))
    finally:
        reset()


def test_a_saved_state_comes_back_to_a_bit_on_two_ranks(ranks, tmp_path):
    (whole, again), (whole_of_other, _) = ranks(2)(on_a_rank, tmp_path)
    assert_equal(again, whole)
    assert_equal(whole_of_other, whole)


# --- under DeepSpeed


def steps_under_deepspeed(rank, world, said):
    """What Accelerate believes, and how many steps LoFT takes for eight micro-batches of which two are to make one.

    Told by a plugin without a JSON where ``said`` is None, else by a JSON that says so.
    """
    from accelerate import DeepSpeedPlugin

    reset()
    PartialState(cpu=True)  # Accelerator(cpu=True) passes over a plugin
    config = {"train_micro_batch_size_per_gpu": 6, "zero_allow_untested_optimizer": True}
    if said is None:
        plugin = DeepSpeedPlugin(zero_stage=3)
        plugin.deepspeed_config |= config
    else:
        plugin = DeepSpeedPlugin(hf_ds_config={**config, "zero_optimization": {"stage": 3}, **said})
    accelerator = Accelerator(gradient_accumulation_steps=2, deepspeed_plugin=plugin)
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-3)
    try:
        take(accelerator, *accelerator.prepare(model, optimizer), range(4), micro=2)
        return accelerator.gradient_accumulation_steps, {s["step"] for s in optimizer.state.values() if "step" in s}
    finally:
        reset()


@pytest.mark.parametrize(
    ("said", "expected"),
    [(None, (2, {4})), ({}, (1, {8})), ({"gradient_accumulation_steps": "auto"}, (2, {4}))],
    ids=["no JSON", "a silent JSON", "auto"],
)
def test_a_silent_json_makes_a_step_of_each_micro_batch(ranks, said, expected):
    assert ranks(1)(steps_under_deepspeed, said) == [expected]


def passed_over(rank, world):
    """What Accelerate makes of a plugin where it is told to use the CPU, and what it wraps the model in."""
    from accelerate import DeepSpeedPlugin

    reset()
    try:
        accelerator, model, *_ = prepare(deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
        return accelerator.distributed_type.value, type(model).__name__
    finally:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
        reset()


def test_accelerate_on_a_cpu_passes_over_a_plugin(ranks):
    """As docs/examples.md warns."""
    assert ranks(1)(passed_over) == [("MULTI_CPU", "DistributedDataParallel")]
