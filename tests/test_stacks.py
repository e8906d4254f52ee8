"""Pairs that are alike are stacked: the same step as one by one, in a number of launches that hardly grows."""

import copy
from contextlib import nullcontext

import peft
import pytest
import torch
from models import relative, trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loft_ds import Blocks, LoFTAdamW, pairs
from loft_ds.kernels import compiled

SHAPES = [(12, 20), (20, 12), (12, 12)]


def stack_of_layers(copies, r=3, dtype=torch.float64, zero_b=False):
    """A PEFT model of ``copies`` layers of each shape, in turn."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(n, m, bias=False, dtype=dtype) for _ in range(copies) for m, n in SHAPES)
    names = [str(i) for i in range(len(model))]
    model = peft.get_peft_model(nn.Sequential(*model), peft.LoraConfig(r=r, target_modules=names)).to(dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name and not zero_b:
            nn.init.normal_(p, std=0.3)
    return model


def set_gradients(model, step, rests=lambda layer: False):
    """Of all layers but those that take no part in the loss."""
    generator = torch.Generator().manual_seed(step)
    for name, p in trained(model).items():
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if rests(int(name.split(".")[2])) else gradient


def take_steps(model, optimizer, steps):
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()


class Launches(TorchDispatchMode):
    """Counts what would be a kernel launch on a GPU: calls of operators that are neither views nor allocations.

    A foreach operator is one launch for all its tensors where the lists match in dtype and strides, as many as
    tensors elsewhere (torch's own rule, ATen/native/ForeachUtils.h).
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.name():
            self.count += self._of(func, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _of(func, args):
        if "_foreach_" not in func.name():
            return 1
        lists = [arg for arg in args if isinstance(arg, list) and isinstance(arg[0], torch.Tensor)]
        alike = all(t.stride() == together[0].stride() for together in zip(*lists, strict=True) for t in together)
        return 1 if alike else len(lists[0])


def launches(copies, halves=1, r=3, **kwargs):
    """Of a turn of ``B`` and one of ``A``; the layers may step half by half."""
    model = stack_of_layers(copies, r, dtype=torch.float32)
    optimizer = LoFTAdamW(model, max_grad_norm=1.0, **kwargs)
    counted = Launches()
    for step in range(4):
        for half in range(halves):
            set_gradients(model, step, lambda layer, half=half: layer // len(SHAPES) % halves != half)
            with counted if step >= 2 else nullcontext():
                optimizer.step()
    return counted.count


# In plain torch R.T @ (P @ R) is a product of its own for each pair; nothing else is. One of A and one of B, since a
# second moment is turned once between two passes over it. That holds jointly too: the factor that leads has followed
# in the step before, in coordinates that its partner has not left since.
TURNED = 2


@pytest.fixture(params=["plain torch", "compiled"])
def slope(request, monkeypatch):
    """How many launches a pair may add to two steps."""
    if request.param == "plain torch":
        monkeypatch.setattr(compiled, "library", lambda: None)
        return TURNED
    if compiled.library() is None:
        pytest.skip(f"nothing is compiled for {compiled.capability()}")
    return 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"turns": "alternate"},
        {"turns": "joint"},
        {"turns": "joint", "r": 1},
        {"blocks": Blocks.published()},
        {"blocks": Blocks(second_moment="elementwise")},
        {"blocks": Blocks(turns="alternate", projected_update=False)},
    ],
    ids=["alternate", "joint", "rank one", "published", "elementwise", "unprojected"],
)
def test_launches_hardly_grow_with_the_number_of_pairs(kwargs, slope):
    few, many = launches(4, **kwargs), launches(12, **kwargs)
    assert many - few <= slope * 8 * len(SHAPES)
    assert few > 50, "the counter sees nothing"


def test_what_rests_together_stays_together(slope):
    """Two halves of the layers that take turns are stacks as well."""
    few, many = launches(4, halves=2, turns="alternate"), launches(12, halves=2, turns="alternate")
    assert many - few <= slope * 8 * len(SHAPES)


VARIANTS = {
    "default": {"lr": 1e-4},
    "alternate": {"turns": "alternate"},
    "published": {"blocks": Blocks.published()},
    "elementwise": {"blocks": Blocks(second_moment="elementwise")},
    "unprojected": {"blocks": Blocks(turns="alternate", projected_update=False)},
    "uncalibrated": {"blocks": Blocks(momentum_calibration=False)},
}


def assert_alike(together, alone):
    for a, b in zip(together, alone, strict=True):
        # Sums of at most 20 float64 terms in another order, through the square root of a V that may be short: 1e-8 of
        # it a step, as in test_reference.py.
        assert relative(a, b) < 1e-7
    assert len({float(p.norm()) for p in alone}) == len(alone), "factors cannot be told apart"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("zero_b", [False, True])
def test_a_stack_is_its_pairs(variant, zero_b, monkeypatch):
    """One pair at a time, and all that are alike together."""
    trajectories = []
    for limit in (0, pairs.STACK_BYTES):
        monkeypatch.setattr(pairs, "STACK_BYTES", limit)
        model = stack_of_layers(4, zero_b=zero_b)
        optimizer = LoFTAdamW(model, **{"lr": 1e-2, "max_grad_norm": 1.0, **VARIANTS[variant]})
        take_steps(model, optimizer, 6)
        trajectories.append([p.detach() for p in trained(model).values()])
    assert_alike(*reversed(trajectories))


def sizes(optimizer):
    """How many pairs the stacks hold."""
    return sorted(len(stack.A.factors) for stack in optimizer._runtime._stacks)


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forming_stacks_anew_loses_nothing(variant, reloaded, monkeypatch):
    """Layers that rest in some steps, at random, end where they end as stacks of their own: whoever leaves a stack and
    joins one takes its state along. Also where all state is loaded anew on the way.
    """
    steps, generator = 12, torch.Generator().manual_seed(1)
    resting = torch.rand(steps, 4 * len(SHAPES), generator=generator) < 0.4
    trajectories, counters = [], []
    for limit in (0, pairs.STACK_BYTES):
        monkeypatch.setattr(pairs, "STACK_BYTES", limit)
        model, seen = stack_of_layers(4), set()
        settings = {"lr": 1e-2, "max_grad_norm": 1.0, **VARIANTS[variant]}
        optimizer = LoFTAdamW(model, **settings)
        for step in range(steps):
            if reloaded and step == steps // 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = LoFTAdamW(model, **settings)
                optimizer.load_state_dict(saved)
            set_gradients(model, step, lambda layer, now=resting[step]: bool(now[layer]))
            optimizer.step()
            seen.add(tuple(sizes(optimizer)))
        trajectories.append([p.detach() for p in trained(model).values()])
        counters.append({name: state["step"] for name, state in optimizer.state.items()})
    assert_alike(*reversed(trajectories))
    assert counters[0] == counters[1]
    took_part = (steps - resting.sum(0)).tolist()
    assert list(counters[0].values()) == [count for count in took_part for _ in "AB"]
    assert len(seen) > 3, "hardly any stack was formed anew"
    assert max(map(max, seen)) == 4


def test_stacks_formed_anew_hold_no_memory_of_old_ones():
    """Nor does a saved state, which takes the memory that its tensors lie in."""
    model = stack_of_layers(4)
    optimizer = LoFTAdamW(model)
    for step in range(4):
        set_gradients(model, step, lambda layer, rests=step: layer == rests)
        optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(held.values()) == sum(t.nbytes for t in tensors)
