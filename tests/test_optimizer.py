"""LoFTAdamW as a torch optimizer: groups, schedulers, dtypes, state, and what it refuses in plain torch."""

import copy
import warnings
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from models import batch, odd_model, one_layer, relative, train_alone, trained, two_groups
from peft import LoraConfig, get_peft_model
from torch import nn

from loft_ds import Blocks, LoFTAdamW, algebra, kernels
from loft_ds.step import EXACT_STEPS


def train(model, optimizer, steps, start=0, scheduler=None):
    train_alone(model, optimizer, range(start, start + steps), scheduler=scheduler)
    return {name: p.detach().clone() for name, p in trained(model).items()}


# What state is kept of: of a factor's rows, and of all of a pair, which is float64 always.
ROWS, SQUARES = {"momentum", "second_moment", "exp_avg", "exp_avg_sq"}, {"basis", "weights", "rotation"}


def test_factors_alternate():
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2, turns="alternate")
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    for step, (moves, rests) in enumerate([("lora_B", "lora_A"), ("lora_A", "lora_B"), ("lora_B", "lora_A")]):
        after = train(model, optimizer, 1, start=step)
        for name in after:
            if moves in name or "lora" not in name:
                assert not torch.equal(after[name], before[name]), name
            if rests in name:
                assert torch.equal(after[name], before[name]), name
        before = after


def test_small_ranks_move_jointly_and_others_alternate():
    """In one model, each as if all were of its rank."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, target_modules=["0", "2"], rank_pattern={"2": 17}, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(19, 18), nn.Tanh(), nn.Linear(18, 17)).double(), config).double()
    start, moved = copy.deepcopy(model), {}
    x, y = torch.randn(5, 19, dtype=torch.float64), torch.randn(5, 17, dtype=torch.float64)
    for turns in ("auto", "joint", "alternate"):
        twin = copy.deepcopy(start)
        optimizer = LoFTAdamW(twin, lr=1e-2, turns=turns)
        (twin(x) - y).square().mean().backward()
        optimizer.step()
        moved[turns] = {name: p.detach() for name, p in trained(twin).items()}
    for name, before in trained(start).items():
        small = "model.0." in name
        assert torch.equal(moved["auto"][name], moved["joint" if small else "alternate"][name])
        assert torch.equal(moved["auto"][name], before) == (not small and "lora_A" in name)


def test_everything_else_gets_adamw():
    """Biases and saved modules: torch.optim.AdamW to the last few bits, alone with the gradient of the same loss."""
    model = odd_model(torch.float64)
    for factor in LoFTAdamW(model).trainable.factors:
        factor.param.requires_grad_(False)
    twin = copy.deepcopy(model)
    first = model.base_model.model[0]
    first.lora_A["default"].weight.requires_grad_(True)
    first.lora_B["default"].weight.requires_grad_(True)
    groups = [
        {"params": [first.lora_A["default"].weight, first.lora_B["default"].weight], "lr": 0.0},
        {"params": [p for name, p in trained(model).items() if "lora_" not in name]},
    ]
    ours = train(model, LoFTAdamW(model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), params=groups), 10)
    theirs = train(twin, torch.optim.AdamW(trained(twin).values(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99)), 10)
    for name, param in theirs.items():
        assert relative(ours[name], param) < 1e-13, name  # the same float64 operations in another order


def test_groups_and_schedulers():
    """A scheduler moves each group's own lr, and a group's lr is what its factors move by."""
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2, params=two_groups(model))
    assert [g["lr"] for g in optimizer.param_groups] == [2e-3, 1e-2]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1.0)
    before = train(model, optimizer, 2, scheduler=scheduler)
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.0]
    after = train(model, optimizer, 2, start=2, scheduler=scheduler)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_empty_groups_are_dropped():
    model = odd_model()
    optimizer = LoFTAdamW(model, params=[*two_groups(model), {"params": []}])
    assert len(optimizer.param_groups) == 2


def test_weight_decay_is_times_lr():
    """With zero gradients only the decay moves W: once a step, by (1 - lr * wd)."""
    model, A, B, scaling = one_layer(7, 5, 3)
    optimizer = LoFTAdamW(model, lr=0.1, weight_decay=0.5)
    before = scaling * B.detach() @ A.detach()
    for _ in range(4):
        A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
        optimizer.step()
    assert relative(scaling * B.detach() @ A.detach(), (1 - 0.05) ** 4 * before) < 1e-14


@pytest.mark.parametrize("turns", ["joint", "alternate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_dtype(dtype, turns):
    model = odd_model(dtype)
    optimizer = LoFTAdamW(model, lr=1e-2, turns=turns)
    train(model, optimizer, 2)
    expected, kinds = torch.float64 if dtype == torch.float64 else torch.float32, set()
    for name, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == (torch.float64 if key in SQUARES else expected), (name, key)
                kinds.add(key)
    assert kinds == {"basis", "weights"} | ROWS | ({"before"} if turns == "joint" else {"pending", "rotation"})
    assert all(p.dtype == dtype for p in trained(model).values())


def test_narrow_parameters_follow_wide_ones():
    """What ten steps change is the same within the rounding of ten stored bfloat16 values."""
    start = {name: p.detach().clone() for name, p in trained(odd_model()).items()}
    wide = train(odd := odd_model(), LoFTAdamW(odd, lr=3e-2), 10)
    narrow = train(half := odd_model(torch.bfloat16), LoFTAdamW(half, lr=3e-2), 10)
    change = torch.cat([(wide[name] - start[name]).reshape(-1) for name in wide])
    same = torch.cat([(narrow[name].float() - start[name]).reshape(-1) for name in wide])
    # Values of about 0.5 are stored to 2^-9 of themselves, 1e-3 against the 0.1 that ten steps of 3e-2 change, and
    # gradients of that precision turn the path some more.
    assert relative(same, change) < 0.2


@pytest.mark.parametrize("turns", ["joint", "alternate"])
@pytest.mark.parametrize("first", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(first, dtype, turns, tmp_path):
    """N steps, save, load, M steps are N + M steps, with either factor's turn next."""
    settings = {"lr": 1e-2, "max_grad_norm": 0.1, "turns": turns}
    model = odd_model(dtype)
    whole = train(model, LoFTAdamW(model, **settings), first + 4)
    model = odd_model(dtype)
    optimizer = LoFTAdamW(model, **settings)
    train(model, optimizer, first)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    model = odd_model(dtype)
    model.load_state_dict(saved["model"])
    optimizer = LoFTAdamW(model, **settings)
    optimizer.load_state_dict(saved["optimizer"])
    resumed = train(model, optimizer, 4, start=first)
    for name in whole:
        assert torch.equal(resumed[name], whole[name]), name


@pytest.mark.parametrize("turns", ["joint", "alternate"])
def test_loaded_state_is_its_own(turns):
    """``state`` gives views; whoever steps on changes nothing of what was loaded from them, nor of what it gave."""
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2, turns=turns)
    train(model, optimizer, 3)
    twin, kept = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    second = LoFTAdamW(twin, lr=1e-2, turns=turns)
    second.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 3, start=3)
    for name, state in second.state_dict()["state"].items():
        for kind, value in state.items():
            same = torch.equal if isinstance(value, torch.Tensor) else int.__eq__
            assert same(value, kept["state"][name][kind]), (name, kind)
    after = train(twin, second, 3, start=3)
    assert all(torch.equal(p, after[name]) for name, p in trained(model).items())


def test_state_is_assigned_as_a_whole():
    """It is made when it is asked for: what is written into it would be lost."""
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    name = next(iter(optimizer.state))
    with pytest.raises(TypeError, match=r"'step' written into it would be lost: assign optimizer\.state"):
        optimizer.state[name]["step"] = 7
    assert optimizer.state[name]["step"] == 2
    optimizer.state = {}
    assert not optimizer.state
    assert optimizer.state["whatever DeepSpeed asks for"] == {}
    train(model, optimizer, 1)
    assert optimizer.state[name]["step"] == 1


def test_state_of_other_rows_is_refused():
    model = odd_model()
    optimizer = LoFTAdamW(model)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    next(state for state in saved["state"].values() if "momentum" in state)["start"] = 2
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"from row 2 on, this rank owns .* from row 0 on: .* another world size"):
        train(model, optimizer, 1)


def test_a_layer_without_gradient_rests():
    """As in torch's optimizers: state and parameters of a pair that took no part in the loss stay."""
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    x, y = batch(2)
    (model(x) - y).square().mean().backward()
    rests = model.base_model.model[2]
    for factor in (rests.lora_A["default"].weight, rests.lora_B["default"].weight):
        factor.grad = None
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    optimizer.step()
    moved = {name for name, p in trained(model).items() if not torch.equal(p, before[name])}
    assert not any("model.2.lora" in name for name in moved)
    assert any("model.0.lora_B" in name for name in moved)
    assert {name: s["step"] for name, s in optimizer.state.items() if "lora_A" in name}[
        "base_model.model.2.lora_A.default.weight"
    ] == 2


def test_full_matrices_are_never_built():
    """Nothing of size (k, l) is allocated by a step, nor more than a few times the state."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    model, A, B, _ = one_layer(3000, 4000, 2, dtype=torch.float32)
    optimizer = LoFTAdamW(model)
    with Watch():
        for _ in range(3):
            A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
            optimizer.step()
    assert 0 < largest < 3000 * 4000 * 4 / 2


def test_nothing_to_do_raises():
    model = odd_model()
    optimizer = LoFTAdamW(model)
    with pytest.raises(RuntimeError, match="no LoRA pair has a gradient"):
        optimizer.step()
    next(p for name, p in trained(model).items() if "bias" in name).grad = torch.zeros(8)
    with pytest.raises(RuntimeError, match="no LoRA pair has a gradient"):
        optimizer.step()


def test_unknown_layouts_raise():
    model = odd_model()
    optimizer = LoFTAdamW(model)
    optimizer.param_groups[0]["params"] = [
        nn.Parameter(torch.cat([p.detach().reshape(-1) for p in trained(model).values()]))
    ]
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    flat = optimizer.param_groups[0]["params"][0]
    flat.grad = torch.ones_like(flat)
    with pytest.raises(RuntimeError, match="no gradient reached the parameters of the model it was built from"):
        optimizer.step()

    model = odd_model()
    optimizer = LoFTAdamW(model)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    with pytest.raises(RuntimeError, match=r"lora_A.* is not in the optimizer's parameter groups"):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "must not be negative"),
        ({"betas": (1.0, 0.9)}, "betas must lie in"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive or None"),
        ({"turns": "both"}, 'turns must be "auto", "joint" or "alternate"'),
        ({"second_moment_dtype": torch.float16}, "second_moment_dtype must be None, or torch.bfloat16"),
        (
            {"second_moment_dtype": torch.bfloat16, "blocks": Blocks(second_moment="elementwise")},
            "torch.bfloat16 for the matrix form",
        ),
        ({"denominator_precision": "fp8"}, 'denominator_precision must be "ieee", "tf32" or "bf16"'),
        (
            {"denominator_precision": "bf16", "blocks": Blocks(second_moment="elementwise")},
            "for the projected update of the matrix form",
        ),
        ({"params": []}, "14 of them are missing"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoFTAdamW(odd_model(), **arguments)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"turns": "both"}, 'turns must be "auto", "joint" or "alternate"'),
        ({"second_moment": "diagonal"}, 'second_moment must be "matrix" or "elementwise"'),
    ],
)
def test_bad_blocks(switches, message):
    with pytest.raises(ValueError, match=message):
        Blocks(**switches)


def test_turns_go_before_those_of_the_blocks():
    assert LoFTAdamW(odd_model(), turns="alternate").blocks == Blocks(turns="alternate")
    assert LoFTAdamW(odd_model(), blocks=Blocks.published()).blocks.turns == "alternate"
    assert LoFTAdamW(odd_model(), turns="joint", blocks=Blocks.published()).blocks == Blocks.published(turns="joint")


def test_published_is_the_paper_and_nothing_else():
    ours, published = asdict(Blocks()), asdict(Blocks.published())
    changed = {switch: value for switch, value in published.items() if value != ours[switch]}
    assert changed == {"turns": "alternate", "bias_calibration": False, "balancing": False}


def test_groups_are_all_that_is_trained():
    model = odd_model()
    first, *rest = trained(model).values()
    with pytest.raises(ValueError, match="1 of them are missing and 0 others are given"):
        LoFTAdamW(model, params=rest)
    with pytest.raises(ValueError, match="0 of them are missing and 1 others are given"):
        LoFTAdamW(model, params=[first, *rest, nn.Parameter(torch.zeros(1))])


def test_groups_are_fixed_at_construction():
    optimizer = LoFTAdamW(odd_model())
    with pytest.raises(ValueError, match="pass all groups as params"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_quiet_where_all_is_treated():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoFTAdamW(odd_model())


def test_bfloat16_second_moments():
    """Half the bytes, and nearly the same way: what 10 steps change differs by some per cent, not by its size."""
    start = {name: p.detach().clone() for name, p in trained(odd_model()).items()}
    wide = train(odd := odd_model(), LoFTAdamW(odd, lr=1e-2), 10)
    optimizer = LoFTAdamW(half := odd_model(), lr=1e-2, second_moment_dtype=torch.bfloat16)
    narrow = train(half, optimizer, 10)
    moments = [s["second_moment"] for s in optimizer.state.values() if "second_moment" in s]
    assert {m.dtype for m in moments} == {torch.bfloat16}
    change = torch.cat([(wide[name] - start[name]).reshape(-1) for name in wide])
    same = torch.cat([(narrow[name] - start[name]).reshape(-1) for name in wide])
    # bfloat16 keeps 8 bits, so sqrt(V) is off by 0.2%, by more where V is small by cancellation.
    assert 0 < relative(same, change) < 0.1


def test_the_first_steps_divide_in_full_precision(monkeypatch):
    """Of few gradients V cancels; what is rounded in it then is not small."""
    used, update = [], kernels.projected_update

    def noted(momentum, packed, basis, quotient):
        used.append(quotient.precision)
        return update(momentum, packed, basis, quotient)

    monkeypatch.setattr(kernels, "projected_update", noted)
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2, denominator_precision="bf16")
    for step in range(EXACT_STEPS + 2):
        used.clear()
        train(model, optimizer, 1, start=step)
        assert set(used) == {"ieee" if step < EXACT_STEPS else "bf16"}


def test_a_frozen_half_is_refused_later_too():
    model = odd_model()
    optimizer = LoFTAdamW(model)
    train(model, optimizer, 2)
    model.base_model.model[0].lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"lora_A\S+ and \S+lora_B\S+ only one has a gradient"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("kind", ["adamw", "variant", "names", "numbers"])
def test_foreign_state_is_refused(kind):
    model = odd_model()
    optimizer = LoFTAdamW(model)
    train(model, optimizer, 1)
    if kind == "adamw":
        other = torch.optim.AdamW(trained(model).values())
        train(model, other, 1)
        saved = other.state_dict()
    elif kind == "variant":
        saved = LoFTAdamW(odd_model(), blocks=Blocks(second_moment="elementwise")).state_dict()
    else:
        saved = optimizer.state_dict()
        renamed = "renamed.{}".format if kind == "names" else (lambda number: number + len(saved["state"]))
        saved["state"] = {renamed(number): state for number, state in saved["state"].items()}
    with pytest.raises(ValueError, match="this is no state of this optimizer"):
        LoFTAdamW(odd_model()).load_state_dict(saved)


def test_a_step_frees_what_zero_grad_frees():
    """The optimizer holds no gradient between steps, and the parameters do not hold the optimizer."""
    import gc
    import weakref

    model = odd_model()
    optimizer = LoFTAdamW(model)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    grads = [weakref.ref(p.grad) for p in trained(model).values()]
    optimizer.step()
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in grads)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    (model(x) - y).square().mean().backward()  # and without it the model trains on


@pytest.mark.parametrize("turns", ["joint", "alternate"])
@pytest.mark.parametrize("broken", ["lora_A", "lora_B"])
def test_divergence_is_named(turns, broken):
    """In the very step in which the leading factor moves to NaN, in the next one where it is the other one."""
    model, A, B, _ = one_layer(7, 5, 3)
    optimizer = LoFTAdamW(model, turns=turns)
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    (A if broken == "lora_A" else B).grad.fill_(float("nan"))
    if broken == "lora_A":
        optimizer.step()
    steps = [state["step"] for state in optimizer.state.values()]
    with pytest.raises(RuntimeError, match=rf"{broken}\S+ became infinite or NaN: the run has diverged"):
        optimizer.step()
    assert [state["step"] for state in optimizer.state.values()] == steps, "a step that failed is none"


def test_a_step_ignores_tf32(monkeypatch):
    """A run's own TF32 stays as it was; on a GPU a step in ten bits would be another one."""
    matmul, seen = torch.backends.cuda.matmul, []
    model = odd_model()
    optimizer = LoFTAdamW(model)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    gram = algebra.gram
    monkeypatch.setattr(algebra, "gram", lambda *given: seen.append(matmul.fp32_precision) or gram(*given))
    with algebra.products_in("tf32"):
        optimizer.step()
        assert matmul.fp32_precision == "tf32"
    assert set(seen) == {"ieee"}


def test_inherited_precision_stays_inherited():
    matmul = torch.backends.cuda.matmul
    with algebra.products_in("none"):
        before, torch.backends.fp32_precision = torch.backends.fp32_precision, "tf32"
        try:
            with algebra.products_in("ieee"):
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == "tf32"
            torch.backends.fp32_precision = "ieee"
            assert matmul.fp32_precision == "ieee"
        finally:
            torch.backends.fp32_precision = before


def test_dropout_of_the_adapters_input():
    """LoFT with a mask is LoFT on inputs that were masked before they came."""
    layers = [nn.Linear(6, 5, bias=False) for _ in range(2)]
    nn.init.zeros_(layers[0].weight)  # so that the frozen weight does not see which of them was masked
    layers[1].load_state_dict(layers[0].state_dict())
    config = {"r": 2, "target_modules": ["0"]}
    models = [
        get_peft_model(nn.Sequential(layer), LoraConfig(lora_dropout=p, **config))
        for layer, p in zip(layers, (0.5, 0.0), strict=True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [LoFTAdamW(model, lr=1e-2) for model in models]
    for step in range(4):
        x, y = torch.randn(8, 6), torch.randn(8, 5)
        torch.manual_seed(step)
        masked = nn.functional.dropout(x, 0.5)
        for model, optimizer, seen in zip(models, optimizers, (x, masked), strict=True):
            torch.manual_seed(step)
            (model(seen) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = dict(models[1].named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in models[0].named_parameters())


class Linear4bit(nn.Linear):
    """Stands for bitsandbytes' on a CPU with bfloat16 arithmetic, as far as its packing shows."""

    support_avx512bf16_for_cpu = True

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=False)


def test_weights_packed_for_inference_are_refused():
    model = get_peft_model(nn.Sequential(Linear4bit(5, 4)), LoraConfig(r=2, target_modules=["0"]))
    base = model.base_model.model[0].get_base_layer()
    optimizer = LoFTAdamW(model)
    assert not base.support_avx512bf16_for_cpu
    base.weight.quant_state.packing_format_for_cpu = True  # as an evaluation before that has done
    model(torch.ones(1, 5)).sum().backward()
    for each in (optimizer, LoFTAdamW(model)):
        with pytest.raises(RuntimeError, match=r"call loft_ds\.quantised\.keep_gradients\(model\)"):
            each.step()
