"""What any torch optimizer can, LoFTAdamW can; and what DeepSpeed keeps silent about, it says."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from models import batch, odd_model, one_layer, relative, train_alone, trained
from peft.tuners.lora import LoraLayer
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import loft_ds
from loft_ds import LoFTAdamW


def go(model, optimizer, steps=3, start=0):
    """Losses of some steps."""
    return train_alone(model, optimizer, range(start, start + steps))[1]


def ready(**settings):
    """A model and its optimizer after three steps."""
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2, **settings)
    go(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_a_copy_has_all_settings(copied):
    """Each argument has another value than its default, and the attribute of its name."""
    given = {
        "max_grad_norm": 0.5,
        "second_moment_dtype": torch.bfloat16,
        "denominator_precision": "bf16",
        "offload_second_moment": True,
    }
    settings = inspect.signature(LoFTAdamW).parameters.keys() - {
        "model",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "params",
    }
    assert settings == given.keys() | {"turns", "blocks"}
    optimizer = copied(LoFTAdamW(odd_model(), turns="alternate", **given))
    assert {name: getattr(optimizer, name) for name in given} == given
    assert optimizer.blocks.turns == "alternate"
    runtime = optimizer._runtime
    assert (runtime.precision, runtime.second_moment_dtype, runtime.offload_second_moment) == (
        "bf16",
        torch.bfloat16,
        True,
    )


def test_a_model_is_pickled_without_its_optimizer():
    model = odd_model()
    LoFTAdamW(model)
    torch.save(model, io.BytesIO())
    pickle.dumps(model)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("turns", ["joint", "alternate"])
def test_copied_with_its_model(copied, turns):
    model, optimizer = ready(turns=turns, max_grad_norm=0.5)
    twin, other = copied((model, optimizer))
    assert {id(p) for group in other.param_groups for p in group["params"]} == {id(p) for p in trained(twin).values()}
    assert go(model, optimizer, start=3) == go(twin, other, start=3)


def test_autocast_is_not_for_a_step():
    ends = []
    for enabled in (True, False):
        model = odd_model()
        optimizer = LoFTAdamW(model, lr=1e-2)
        for step in range(3):
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in trained(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_compiled_step():
    model, twin = odd_model(), odd_model()
    optimizer, other = LoFTAdamW(model, lr=1e-2), LoFTAdamW(twin, lr=1e-2)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(2):
        x, y = batch(step)
        for each in (model, twin):
            (each(x) - y).square().mean().backward()
        compiled()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
    for ours, theirs in zip(trained(model).values(), trained(twin).values(), strict=True):
        assert relative(ours, theirs) < 1e-5  # float32, some products by another kernel


def test_named_parameters():
    model, twin = odd_model(), odd_model()
    named = LoFTAdamW(model, lr=1e-2, params=list(trained(model).items()))
    assert go(model, named) == go(twin, LoFTAdamW(twin, lr=1e-2))


def test_a_tensors_rate():
    model, twin = odd_model(), odd_model()
    rate = torch.tensor([1e-2], dtype=torch.float64)
    assert go(model, LoFTAdamW(model, lr=rate)) == go(twin, LoFTAdamW(twin, lr=1e-2))


def test_state_dict_hooks():
    model, optimizer = ready()
    optimizer.register_state_dict_post_hook(lambda _, state: {"wrapped": state})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["wrapped"])
    state = optimizer.state_dict()
    assert set(state) == {"wrapped"}
    optimizer.load_state_dict(state)
    go(model, optimizer)


def test_loaded_state_is_its_own():
    model, optimizer = ready()
    twin = copy.deepcopy(model)
    other = LoFTAdamW(twin, lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    assert go(model, optimizer, start=3) == go(twin, other, start=3)


def test_state_of_another_precision():
    _, optimizer = ready()
    model = odd_model(torch.float64)
    wider = LoFTAdamW(model, lr=1e-2)
    wider.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(model, wider, 2)
    assert wider.state[wider.trainable.factors[0].name]["momentum"].dtype == torch.float64


def test_torch_distributed_checkpoint():
    model, optimizer = ready()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    other = LoFTAdamW(twin, lr=1e-2)
    set_optimizer_state_dict(twin, other, state)
    assert go(model, optimizer, start=3) == go(twin, other, start=3)


def test_state_of_another_variant_is_refused_there_too():
    model, optimizer = ready(turns="alternate")
    state = get_optimizer_state_dict(model, optimizer)
    with pytest.raises(ValueError, match="this is no state of this optimizer"):
        set_optimizer_state_dict(model, LoFTAdamW(model, lr=1e-2), state)


def test_complex_numbers_are_refused():
    model = odd_model()
    for p in model.parameters():
        p.data = p.data.to(torch.complex64)
    with pytest.raises(ValueError, match="is complex"):
        LoFTAdamW(model)


def test_a_step_that_fails_is_none():
    model, A, _, _ = one_layer(7, 5, 3)
    optimizer = LoFTAdamW(model)
    x = torch.randn(11, 5, dtype=torch.float64)
    model(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        A.fill_(torch.nan)
    taken = 1
    with pytest.raises(RuntimeError, match="infinite or NaN"):  # noqa: PT012
        while taken < 4:  # the factor that moved last is read in the step after
            optimizer.step()
            taken += 1
    assert {state["step"] for state in optimizer.state.values()} == {taken}


def test_the_obvious_call():
    """``LoFT`` is what people try."""
    model = odd_model()
    optimizer = loft_ds.LoFT(model, lr=3e-4)
    assert isinstance(optimizer, LoFTAdamW)
    assert optimizer.defaults["lr"] == 3e-4


# --- what DeepSpeed keeps silent about ---


@pytest.mark.parametrize(("dtype", "said"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_factors_of_16_bits_are_warned_of_once(dtype, said):
    """As TRL's SFTTrainer makes them on a base in 4 bits: without float32 masters small steps are lost."""
    model = odd_model(dtype)
    optimizer = LoFTAdamW(model, lr=1e-3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(2):
            x, y = batch(step, dtype=dtype)
            (model(x) - y).square().mean().backward()
            optimizer.step()
    found = [str(w.message) for w in seen if "Cast the adapters to float32" in str(w.message)]
    assert len(found) == said
    assert all("lora_A.default.weight first" in each for each in found)


def half_under_deepspeed(rank, world, stage):
    """The warnings of two steps in bfloat16 where DeepSpeed keeps float32 masters."""
    import deepspeed

    model = odd_model()
    config = {
        "train_micro_batch_size_per_gpu": 12,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=LoFTAdamW(model), config=config)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(2):
            x, y = batch(step, dtype=torch.bfloat16)
            engine.backward((engine(x) - y).square().mean())
            engine.step()
    return [str(w.message) for w in seen if "Cast the adapters" in str(w.message)]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_masters_of_deepspeed_are_float32(ranks, stage):
    assert ranks(1)(half_under_deepspeed, stage) == [[]]


def without_gradients(rank, world, stage, kind):
    """Train a model whose pairs get no gradient, or whose loss is flat, after a step with one or before."""
    import deepspeed

    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 12,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    lost = []
    for module in model.modules():
        if isinstance(module, LoraLayer):  # as reentrant checkpointing over frozen embeddings has it: biases learn
            up = module.lora_B["default"]
            up.register_forward_hook(lambda _, __, out: out.detach() if lost else out)

    def loss(step, kind):
        lost[:] = [True] if kind == "lost" else []
        x, y = batch(step)
        return (engine(x) - y).square().mean() * (0 if kind == "flat" else 1)

    try:
        for step, each in enumerate(kind):
            engine.backward(loss(step, each))
            engine.step()
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return None


@pytest.mark.parametrize("kind", [["lost"], ["all", "lost"]])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_in_which_no_pair_has_a_gradient(ranks, stage, kind):
    (said,) = ranks(1)(without_gradients, stage, kind)
    assert "no LoRA pair has a gradient" in said
    assert "enable_input_require_grads()" in said
    assert "use_reentrant=False" in said


@pytest.mark.parametrize("kind", [["flat"], ["flat", "all", "flat"]])
def test_a_flat_loss_goes_on(ranks, kind):
    """All rewards of a batch alike: every gradient comes, and is zero."""
    assert ranks(1)(without_gradients, 2, kind) == [None]


def clipped_by(rank, world, stage, in_json, own):
    import deepspeed

    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-3, max_grad_norm=own)
    config = {
        "train_micro_batch_size_per_gpu": 12,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        **({} if in_json is None else {"gradient_clipping": in_json}),
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    x, y = batch(0)
    engine.backward((engine(x) - y).square().mean())
    engine.step()
    engine.destroy()
    return optimizer.max_grad_norm


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("in_json", "own", "found"),
    [(None, 0.05, 0.05), (None, None, 1.0), (0.3, None, 0.3), (0.3, 0.3, 0.3), (None, float("inf"), float("inf"))],
)
def test_what_is_said_of_clipping_counts(ranks, stage, in_json, own, found):
    """DeepSpeed clips at 1.0 where the JSON is silent; that is no word against what the optimizer was told."""
    assert ranks(1)(clipped_by, stage, in_json, own) == [found]
