"""Factors that are alike are stacked: the same step as one by one, in a number of launches that hardly grows."""

import peft
import pytest
import torch
from models import relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loft_ds import LoFTAdamW, batch

SHAPES = [(12, 20), (20, 12), (12, 12)]


def stack_of_layers(copies, rank=3, dtype=torch.float64, zero_b=False):
    """A PEFT model of ``copies`` layers of each shape, in turn."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(n, m, bias=False, dtype=dtype) for _ in range(copies) for m, n in SHAPES)
    names = [str(i) for i in range(len(model))]
    model = peft.get_peft_model(nn.Sequential(*model), peft.LoraConfig(r=rank, target_modules=names)).to(dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name and not zero_b:
            nn.init.normal_(p, std=0.3)
    return model


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


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


def launches(copies, **kwargs):
    """Of a turn of ``B`` and one of ``A``."""
    model = stack_of_layers(copies, dtype=torch.float32)
    optimizer = LoFTAdamW(model, max_grad_norm=1.0, **kwargs)
    take_steps(model, optimizer, 2)
    counted = Launches()
    for step in (2, 3):
        set_gradients(model, step)
        with counted:
            optimizer.step()
    return counted.count


@pytest.mark.parametrize(
    ("kwargs", "slope"),
    [
        # In plain torch R.T @ (P @ R) is a product of its own for each pair: one of A, one of B. Nothing else is.
        ({"turns": "alternate"}, 2),
        ({"turns": "joint"}, 4),
        ({"second_moment": "elementwise"}, 0),
        ({"turns": "alternate", "projected_update": False}, 2),
    ],
    ids=["alternate", "joint", "elementwise", "unprojected"],
)
def test_launches_hardly_grow_with_the_number_of_pairs(kwargs, slope):
    few, many = launches(4, **kwargs), launches(24, **kwargs)
    assert many - few <= slope * 20 * len(SHAPES)
    assert few > 50, "the counter sees nothing"


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr": 1e-4},
        {"turns": "both", "lr": 1e-4},
        {"turns": "alternate"},
        {"second_moment": "elementwise"},
        {"turns": "alternate", "projected_update": False},
        {"momentum_calibration": False},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "all",
)
@pytest.mark.parametrize("zero_b", [False, True])
def test_a_batch_is_its_factors(kwargs, zero_b, monkeypatch):
    """One factor at a time, and all that are alike together."""
    trajectories = []
    for limit in (0, batch.BATCH_BYTES):
        monkeypatch.setattr(batch, "BATCH_BYTES", limit)
        model = stack_of_layers(4, zero_b=zero_b)
        optimizer = LoFTAdamW(model, **{"lr": 1e-2, "max_grad_norm": 1.0, **kwargs})
        take_steps(model, optimizer, 6)
        trajectories.append([p.detach() for p in model.parameters() if p.requires_grad])
    for alone, together in zip(*trajectories, strict=True):
        # Sums of at most 20 float64 terms in another order, through the square root of a V that may be short (1e-8 of
        # it: see test_oracle.py).
        assert relative(together, alone) < 1e-8
    assert len({float(p.norm()) for p in trajectories[0]}) == len(trajectories[0]), "factors cannot be told apart"
