"""The Triton kernels against the reference: on the GPU where there is one, and always in Triton's interpreter.

Triton decides when it is imported whether it interprets, and PEFT imports it. So a process of its own runs this file
again with ``TRITON_INTERPRET=1``.
"""

import os
import subprocess
import sys

import pytest
import torch
from test_kernels import (
    BETA2,
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
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither GPU nor interpreter"
)


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@needs_kernels
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


@needs_kernels
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


@needs_kernels
@pytest.mark.parametrize("bound", [0.5, float("inf")])
def test_bound(bound: float) -> None:
    from loft_ds.kernels import fused

    momentum, packed = moments(50, 6, seed=1)
    basis = rows(40, 6, seed=2)
    expected = reference.projected_update(momentum, packed, basis, quotient_of(basis, bound))
    given = [t.float().to(DEVICE) for t in (momentum, packed, basis)]
    actual = alone(fused.projected_update)(*given, quotient_of(given[2], bound))
    assert_close(actual.cpu(), expected, UPDATE_TOLERANCE[torch.float32])


@needs_kernels
def test_nan_is_not_hidden() -> None:
    from loft_ds.kernels import fused

    momentum, packed = moments(4, 3, seed=1)
    momentum[1, 0] = float("nan")
    given = [t.float().to(DEVICE) for t in (momentum, packed, rows(5, 3, seed=2))]
    update = alone(fused.projected_update)(*given, quotient_of(given[2]))
    assert update[1].isnan().all()
    assert update[[0, 2, 3]].isfinite().all()


@needs_kernels
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


@needs_kernels
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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("rank", "stored"), [(1, "float32"), (17, "bfloat16"), (64, "float32"), (128, "float32")])
def test_compiles_for_a_gpu(rank: int, stored: str, capability: int) -> None:
    """To machine code, with no GPU at hand; a Hopper must come out with its tensor cores and its shared memory."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loft_ds.kernels import fused

    pointers = dict.fromkeys(("momentum", "keys_t", "values", "out", "gradient", "pending", "rotation"), "*fp32")
    integers = dict.fromkeys(("k", "width", "columns_a_split", "seed"), "i32")
    types = {"table": "*i64", "triangle": "*i32", **pointers, **integers}
    constants = {
        "stored": getattr(tl, stored),
        "aligned": True,
        "RANK": rank,
        "PADDED": fused._padded(rank),
        "PART": min(32, fused._padded(rank)),
        "ROWS": 64,
        "COLUMNS": 64 if rank <= 64 else 32,
        "BLOCK": 32,
        "PRECISION": "tf32x3",
        "HAS_PENDING": True,
        "HAS_ROTATION": True,
    }
    kernels = [fused._projected_update_kernel.fn]
    if rank <= fused.LARGEST_ACCUMULATED_RANK:
        kernels.append(fused._accumulate_kernel)
    for kernel in kernels:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
        source = ASTSource(kernel, signature, {name: constants[name] for name in names if name in constants})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert compiled.asm["cubin"]
        assert "mma" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 99 * 1024  # what every GPU since 2020 has


@pytest.mark.parametrize(("capability", "least"), [((8, 0), 32), ((9, 0), 64)])
def test_tiles_that_round_otherwise_are_not_tried(capability, least, monkeypatch):
    """On a Hopper 32 rows are another unit's: which of them is faster must not decide over bits."""
    import triton

    from loft_ds.kernels import fused

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    tried = fused._alike([triton.Config({"ROWS": rows}) for rows in (32, 64, 128)])
    assert min(config.kwargs["ROWS"] for config in tried) == least
