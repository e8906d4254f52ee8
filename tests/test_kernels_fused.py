"""The Triton kernels against the reference, on a GPU where there is one, else in Triton's interpreter; and compiled."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import (
    BETA2,
    LESS_PRECISE,
    MOMENT_TOLERANCE,
    RANKS,
    SHAPES,
    UPDATE_TOLERANCE,
    alone,
    assert_close,
    contraction,
    moments,
    quotient_of,
    rows,
    strided,
    together,
)

from loft_ds.kernels import reference, storage, tiled

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
STORED = [(rank, torch.float32) for rank in [*RANKS, 128]] + [(rank, torch.bfloat16) for rank in (5, 33)]


@pytest.mark.parametrize(("rank", "stored"), STORED)
def test_projected_update(rank: int, stored: torch.dtype) -> None:
    from loft_ds.kernels import fused

    # The interpreter takes a second for 1e6 entries of the triangle: large ranks get one small shape.
    for seed, (k, n) in enumerate(SHAPES if rank <= 33 else [(19, 70)]):
        momentum, packed = moments(k, rank, seed)
        packed, basis = packed.to(stored), rows(n, rank, 100 + seed)
        expected = reference.projected_update(momentum, packed.double(), basis, quotient_of(basis))
        given = [momentum.float().to(DEVICE), packed.to(DEVICE), basis.float().to(DEVICE)]
        for arguments in (given, [strided(t) for t in given]):
            actual = alone(fused.projected_update)(*arguments, quotient_of(given[2]))
            assert_close(actual.cpu(), expected, UPDATE_TOLERANCE[torch.float32])


@pytest.mark.parametrize("rank", [3, 16])
def test_a_batch_is_its_pairs(rank: int) -> None:
    """Three pairs in one launch, their second moments scattered, one of them where no vector load may begin."""
    from loft_ds.kernels import fused

    pairs = [(*(t.float() for t in moments(37, rank, seed)), rows(70, rank, 50 + seed).float()) for seed in range(3)]
    momentum, basis = (torch.stack([pair[i] for pair in pairs]).to(DEVICE) for i in (0, 2))
    gradient, pending = (torch.stack([rows(37, rank, s + i) for i in range(3)]).float().to(DEVICE) for s in (60, 70))
    rotation = torch.stack([contraction(rank, 80 + i) for i in range(3)]).float().to(DEVICE)
    packed = [pair[1].to(DEVICE, copy=True) for pair in pairs]
    packed[1] = torch.cat([packed[1].new_zeros(1), packed[1].flatten()])[1:].view_as(packed[1])
    singles = [each.clone() for each in packed]

    fused.accumulate_second_moment_(packed, gradient, BETA2, pending=pending, rotation=rotation)
    quotient = together([quotient_of(each) for each in basis])
    update = fused.projected_update(momentum, packed, basis, quotient)
    for i, single in enumerate(singles):
        expected = single.double()
        optional = {"pending": pending[i].double(), "rotation": rotation[i].double()}
        reference.accumulate_second_moment_(expected, gradient[i].double(), BETA2, **optional)
        assert_close(packed[i].cpu(), expected.cpu(), MOMENT_TOLERANCE[torch.float32])
        given = momentum[i].double(), packed[i].double(), basis[i].double()
        expected = reference.projected_update(*given, quotient_of(given[2]))
        assert_close(update[i].cpu(), expected.cpu(), UPDATE_TOLERANCE[torch.float32])


@pytest.mark.parametrize("precision", LESS_PRECISE)
def test_less_precise_denominators(precision: Any) -> None:
    from loft_ds.kernels import fused

    momentum, packed = moments(37, 6, seed=1)
    basis = rows(70, 6, seed=2)
    expected = reference.projected_update(momentum, packed, basis, quotient_of(basis))
    given = [t.float().to(DEVICE) for t in (momentum, packed, basis)]
    full = alone(fused.projected_update)(*given, quotient_of(given[2]))
    actual = alone(fused.projected_update)(*given, replace(quotient_of(given[2]), precision=precision))
    # The interpreter's casts cut off where hardware rounds: twice the error.
    assert_close(actual.cpu(), expected, LESS_PRECISE[precision] * (2 if INTERPRETED else 1))
    assert torch.equal(actual, full) is (INTERPRETED and precision == "tf32")  # which the interpreter lacks


@pytest.mark.parametrize("bound", [0.5, float("inf")])
def test_bound(bound: float) -> None:
    from loft_ds.kernels import fused

    momentum, packed = moments(50, 6, seed=1)
    basis = rows(40, 6, seed=2)
    expected = reference.projected_update(momentum, packed, basis, quotient_of(basis, bound))
    given = [t.float().to(DEVICE) for t in (momentum, packed, basis)]
    actual = alone(fused.projected_update)(*given, quotient_of(given[2], bound))
    assert_close(actual.cpu(), expected, UPDATE_TOLERANCE[torch.float32])


def test_nan_is_not_hidden() -> None:
    from loft_ds.kernels import fused

    momentum, packed = moments(4, 3, seed=1)
    momentum[1, 0] = float("nan")
    given = [t.float().to(DEVICE) for t in (momentum, packed, rows(5, 3, seed=2))]
    update = alone(fused.projected_update)(*given, quotient_of(given[2]))
    assert update[1].isnan().all()
    assert update[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(("rank", "stored"), [case for case in STORED if case[0] <= 64])
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_accumulate(rank: int, stored: torch.dtype, pending: bool, rotated: bool) -> None:
    from loft_ds.kernels import fused

    for seed, k in enumerate([0, 1, 37]):
        _, packed = moments(k, rank, seed)
        packed, gradient, resting = packed.to(stored), rows(k, rank, 200 + seed), rows(k, rank, 300 + seed)
        optional = {
            "pending": resting if pending else None,
            "rotation": contraction(rank, seed) if rotated else None,
        }
        expected = packed.double()
        reference.accumulate_second_moment_(expected, gradient, BETA2, **optional)
        cast = {key: None if t is None else t.float().to(DEVICE) for key, t in optional.items()}
        for actual in (packed.to(DEVICE, copy=True), strided(packed.to(DEVICE))):
            alone(fused.accumulate_second_moment_)(actual, gradient.float().to(DEVICE), BETA2, seed=seed, **cast)
            # One unit in the last of bfloat16's 8 bits.
            tolerance = MOMENT_TOLERANCE[torch.float32] if stored == torch.float32 else 2**-7
            assert_close(actual.cpu(), expected, tolerance)


def test_stochastic_rounding_is_that_of_plain_torch() -> None:
    from loft_ds.kernels import fused

    _, packed = moments(30, 8, seed=1)
    stored = packed.bfloat16().to(DEVICE)
    plain = stored.clone()
    # Without gradient and rotation both compute the very same float32 numbers.
    alone(fused.accumulate_second_moment_)(stored, torch.zeros(30, 8, device=DEVICE), BETA2, seed=7)
    alone(tiled.accumulate_second_moment_)(plain, torch.zeros(30, 8, device=DEVICE), BETA2, seed=7)
    assert torch.equal(stored, plain)
    assert torch.equal(plain, storage.round_stochastically(BETA2 * packed.bfloat16().float(), 7).to(DEVICE))


RANKS_COMPILED = [(1, "float32"), (17, "bfloat16"), (64, "float32"), (128, "float32")]
DENOMINATORS = {"float32": "tf32x3", "bfloat16": "bf16"}
COMPILED = [(*each, DENOMINATORS[each[1]], capability) for each in RANKS_COMPILED for capability in (80, 90, 100)] + [
    (64, "float32", "tf32", 90)
]


@pytest.mark.parametrize(
    "cases", [COMPILED[4:5], pytest.param(COMPILED, marks=pytest.mark.rehearse)], ids=["one", "all"]
)
def test_compiles_for_a_gpu(cases: list[tuple[int, str, str, int]]) -> None:
    """To machine code, with no GPU at hand, in a process in which Triton does not interpret."""
    command = [sys.executable, Path(__file__).with_name("compiled.py"), json.dumps(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_ALWAYS_COMPILE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("compiled") == sum(2 if rank <= 64 else 1 for rank, *_ in cases)


@pytest.mark.parametrize(("capability", "least"), [((8, 0), 32), ((9, 0), 64)])
def test_tiles_that_round_otherwise_are_not_tried(capability, least, monkeypatch):
    """On a Hopper 32 rows are another unit's: which of them is faster must not decide over bits."""
    import triton

    from loft_ds.kernels import fused

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    tried = fused._alike([triton.Config({"ROWS": rows}) for rows in (32, 64, 128)])
    assert min(config.kwargs["ROWS"] for config in tried) == least
