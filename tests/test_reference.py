"""Below full rank: the optimizer against the dense reference, whole and with each block off."""

import pytest
import torch
from models import one_layer, relative

from loft_ds import Blocks, LoFTAdamW, algebra
from loft_ds.reference import Reference

SHAPES = [(7, 5, 3), (5, 9, 1), (4, 6, 4), (33, 19, 17)]
VARIANTS = [
    Blocks(),
    Blocks.published(),
    Blocks(turns="joint"),  # the default at all ranks here but 17
    Blocks(turns="alternate"),
    Blocks(turns="alternate", second_moment="elementwise"),
    Blocks(turns="alternate", projected_update=False),
    Blocks(gradient_scaling=False),
    Blocks(momentum_calibration=False),
    Blocks(second_moment_calibration=False),
    Blocks(momentum_calibration=False, second_moment_calibration=False),
    Blocks(projected_update=False),
    Blocks(projected_clipping=False),
    Blocks(bias_calibration=False),
    Blocks(balancing=False),
    Blocks(second_moment="elementwise"),
]


def follow(m, n, rank, steps=12, zero_b=False, small=1.0, seed=0, alpha=4, **kwargs):
    """Distances of A, B and of the clipping norms from the reference's after some steps."""
    model, A, B, scaling = one_layer(m, n, rank, seed=seed, alpha=alpha)
    with torch.no_grad():
        A.mul_(small)
        B.mul_(0.0 if zero_b else 1.0)
    arguments = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "max_grad_norm": 0.5, **kwargs}
    reference = Reference(A.detach(), B.detach(), scaling, **arguments)
    optimizer = LoFTAdamW(model, **arguments)
    worst = 0.0
    for _ in range(steps):
        x, y = torch.randn(11, n, dtype=torch.float64), torch.randn(11, m, dtype=torch.float64)
        (model(x) - y).square().mean().backward()
        reference.step(A.grad, B.grad)
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(optimizer.grad_norm - reference.norm) / reference.norm)
    return relative(A.detach(), reference.X["A"].T), relative(B.detach(), reference.X["B"]), worst


# 1e-7: two float64 computations in different coordinates. Where V is small by cancellation its rounding, 1e-16 of the
# largest, passes through a square root and comes out as 1e-8.
TOLERANCE = 1e-7


def name_of(blocks):
    return "-".join(f"{k}={v}" for k, v in vars(blocks).items() if v != vars(Blocks())[k]) or "default"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", VARIANTS, ids=name_of)
def test_follows_the_reference(shape, blocks):
    assert max(follow(*shape, blocks=blocks)) < TOLERANCE


@pytest.mark.parametrize("turns", ["joint", "alternate"])
@pytest.mark.parametrize("zero_b", [True, False])
@pytest.mark.parametrize("small", [1.0, 1e-3])
def test_follows_it_where_it_balances(turns, zero_b, small, monkeypatch):
    """From PEFT's start, from factors of very different lengths, and on every step."""
    monkeypatch.setattr(algebra, "SLACK", 0.0)
    assert max(follow(7, 5, 2, zero_b=zero_b, small=small, blocks=Blocks(turns=turns))) < TOLERANCE


def test_every_switch_matters():
    """A variant that changed nothing would agree with a reference that ignores it as well."""
    trajectories = []
    for blocks in VARIANTS:
        if blocks == Blocks(turns="joint"):
            continue  # the default at rank 3
        model, A, B, _ = one_layer(7, 5, 3)
        with torch.no_grad():
            B.mul_(1e-2)  # to be balanced
        optimizer = LoFTAdamW(model, lr=1e-1, max_grad_norm=0.5, blocks=blocks)  # far enough for bases to turn
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            x = torch.randn(11, 5, dtype=torch.float64, generator=generator)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trajectories.append(A.detach().clone())
    for i, a in enumerate(trajectories):
        for b in trajectories[:i]:
            assert relative(a, b) > 1e-6


@pytest.mark.parametrize("config", [{"alpha": 1}, {"alpha": 64}, {"alpha": 8, "use_rslora": True}])
def test_w_does_not_depend_on_alpha(config):
    """The same W from the same W, whatever the scaling: s * B @ A with B divided by s at the start."""
    ends = []
    for each in ({"alpha": 3}, config):
        model, A, B, scaling = one_layer(7, 5, 3, **each)
        with torch.no_grad():
            B.div_(scaling)
        optimizer = LoFTAdamW(model, lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
        for _ in range(20):
            x, y = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(scaling * B.detach() @ A.detach())
    assert relative(ends[1], ends[0]) < TOLERANCE
