"""Every path of the kernels against the reference in float64, on fresh random input."""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from loft_ds import kernels
from loft_ds.algebra import cauchy_schwarz_bound, pack
from loft_ds.kernels import Quotient, compiled, reference, storage, tiled

BETA1, BETA2, STEPS = 0.9, 0.99, 40

RANKS = [1, 2, 3, 5, 16, 17, 33, 64]
# (k, n): rows fewer and more than columns, neither a multiple of a tile, and the empty and single ones.
SHAPES = [(70, 131), (131, 70), (1, 9), (9, 1), (0, 5), (5, 0)]


def quotient_of(basis: Tensor, bound: float = cauchy_schwarz_bound(BETA1, BETA2, STEPS), eps: float = 1e-8) -> Quotient:
    """What a step divides by: corrections that differ from row to row of the basis, as they do once it has turned."""
    generator = torch.Generator().manual_seed(len(basis))
    kept = torch.rand(len(basis), dtype=torch.float64, generator=generator)
    return Quotient(1 - BETA1**STEPS, ((1 - BETA2) + kept * (BETA2 - BETA2**STEPS)).to(basis), eps, bound)


def moments(k: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Momentum (k, r) and packed second moment (k, p) of STEPS gradients, in float64: what an optimizer would hold."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(STEPS, k, rank, dtype=torch.float64, generator=generator)
    ages = torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
    momentum = torch.einsum("t,tkr->kr", (1 - BETA1) * BETA1**ages, gradients)
    second = torch.einsum("t,tkr,tks->krs", (1 - BETA2) * BETA2**ages, gradients, gradients)
    return momentum, pack(second)


def rows(count: int, rank: int, seed: int) -> Tensor:
    """Rows (count, r) of unit columns on average, as an orthonormal basis has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rank, dtype=torch.float64, generator=generator) / math.sqrt(max(count, 1))


def contraction(rank: int, seed: int) -> Tensor:
    """What a calibration is: (r, r) with no singular value above 1."""
    matrix = rows(rank, rank, seed)
    return matrix / torch.linalg.matrix_norm(matrix, 2)


def strided(tensor: Tensor) -> Tensor:
    """The same values with no dimension contiguous."""
    wide = tensor.new_empty(2 * tensor.shape[1], 2 * tensor.shape[0])
    view = wide[::2, ::2].T
    view.copy_(tensor)
    return view


def together(quotients: Sequence[Quotient]) -> Quotient:
    """The quotients of pairs as one of a batch."""
    return replace(quotients[0], correction2=torch.stack([each.correction2 for each in quotients]))


def alone(function: Callable[..., Tensor | None]) -> Callable[..., Any]:
    """A function of a batch of pairs as one of a single pair."""

    def call(*args: Any, **kwargs: Any) -> Any:
        # Views, for some of them are changed in place.
        args, kwargs = tree_map_only(Tensor, lambda t: t[None], (args, kwargs))
        args, kwargs = tree_map_only(Quotient, lambda q: together([q]), (args, kwargs))
        result = function(*args, **kwargs)
        return None if result is None else result[0]

    return call


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Errors are measured against the largest entry: sums of many terms have no better entrywise bound."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    if expected.numel():
        assert float((actual.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


# Only roundings and the order of sums differ: unit roundoff is 1e-16 and 6e-8. The V of 40 gradients are sums with
# little cancellation, so about ten roundings are seen; room for ten times more, and as much again for 3xTF32.
UPDATE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
MOMENT_TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6}


# What a CPU has, from the least to the most, as torch names it.
CAPABILITIES = ["DEFAULT", *compiled.INSTRUCTIONS]


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test by plain torch, and by what is compiled for each kind of CPU that this one can do."""
    most = compiled.capability()
    if CAPABILITIES.index(request.param) > (CAPABILITIES.index(most) if most in CAPABILITIES else 0):
        pytest.skip(f"this CPU has no {request.param}")
    plain = request.param == "DEFAULT"
    monkeypatch.setattr(compiled, "library", lambda: None if plain else compiled.load_library(request.param))
    return request.param


# In full precision the last one is the one before it.
DTYPES = pytest.mark.parametrize(
    ("capability", "dtype"),
    [("DEFAULT", torch.float64), *((each, torch.float32) for each in CAPABILITIES[:-1])],
    indirect=["capability"],
)


@pytest.mark.parametrize("name", ["projected_update", "normalized_update"])
@pytest.mark.parametrize("rank", [*RANKS, 128])
@DTYPES
def test_update(name: str, rank: int, capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one pair, and of three together, of which two fit in a tile."""
    monkeypatch.setattr(tiled, "TILE_ROWS", 150)
    for seed, (k, n) in enumerate(SHAPES if rank <= 64 else SHAPES[2:]):
        pairs = [(*moments(k, rank, 10 * seed + i), rows(n, rank, 100 + 10 * seed + i)) for i in range(3)]
        expected = [getattr(reference, name)(*pair, quotient_of(pair[2])) for pair in pairs]
        for layout in (torch.Tensor.contiguous, strided):
            given = [tuple(layout(t.to(dtype)) for t in pair) for pair in pairs]
            for count in (1, 3):
                momentum, packed, basis = zip(*given[:count], strict=True)
                quotient = together([quotient_of(each) for each in basis])
                actual = getattr(kernels, name)(torch.stack(momentum), packed, torch.stack(basis), quotient)
                assert actual.dtype == dtype
                assert_close(actual, torch.stack(expected[:count]), UPDATE_TOLERANCE[dtype])


@pytest.mark.parametrize(("k", "n", "rank"), [(2500, 1100, 4), (1030, 600, 16), (30, 515, 128), (3, 5, 128)])
def test_update_across_tiles(k: int, n: int, rank: int) -> None:
    momentum, packed = moments(k, rank, seed=k)
    basis = rows(n, rank, seed=n)
    expected = alone(tiled.projected_update)(momentum, packed, basis, quotient_of(basis))
    some = torch.arange(0, k, max(1, k // 40))
    found = reference.projected_update(momentum[some], packed[some], basis, quotient_of(basis))
    assert_close(expected[some], found, 1e-13)
    momentum, packed, basis = momentum.float(), packed.float(), basis.float()
    actual = alone(tiled.projected_update)(momentum, packed, basis, quotient_of(basis))
    assert_close(actual, expected, UPDATE_TOLERANCE[torch.float32])


@DTYPES
@pytest.mark.parametrize("bound", [cauchy_schwarz_bound(BETA1, BETA2, STEPS), 0.5, math.inf])
def test_bound(bound: float, capability: str, dtype: torch.dtype) -> None:
    """0.5 clamps most entries."""
    momentum, packed = moments(50, 6, seed=1)
    basis = rows(40, 6, seed=2)
    expected = reference.projected_update(momentum, packed, basis, quotient_of(basis, bound))
    momentum, packed, basis = (t.to(dtype) for t in (momentum, packed, basis))
    actual = alone(kernels.projected_update)(momentum, packed, basis, quotient_of(basis, bound))
    assert_close(actual, expected, UPDATE_TOLERANCE[dtype])


# Both operands of a product for V are rounded, by half a unit in the last of 8 or 11 bits: V is off by twice that at
# most, of its largest terms, and U by half of V's error.
LESS_PRECISE = {"tf32": 2.0**-11, "bf16": 2.0**-8}


@pytest.mark.parametrize("precision", LESS_PRECISE)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 5, 16, 33])
def test_less_precise_denominators(precision: Any, stored: torch.dtype, rank: int, capability: str) -> None:
    """Where the CPU has no units for it, it is done in full."""
    momentum, packed = moments(131, rank, seed=1)
    packed, basis = packed.to(stored), rows(259, rank, seed=2)
    expected = reference.projected_update(momentum, packed.double(), basis, quotient_of(basis))
    given = momentum.float(), packed, basis.float()
    full = alone(kernels.projected_update)(*given, quotient_of(given[2]))
    update = alone(kernels.projected_update)(*given, replace(quotient_of(given[2]), precision=precision))
    assert_close(update, expected, LESS_PRECISE[precision])
    halved = precision == "bf16" and capability == "AVX512_BF16"
    assert capability == "DEFAULT" or torch.equal(update, full) is not halved


@DTYPES
def test_vanishing_second_moment_gives_no_update(capability: str, dtype: torch.dtype) -> None:
    """Rounding can drive V to zero, or below, where M is not: the clamp decides, not a division by eps."""
    momentum = torch.ones(3, 2, dtype=dtype)
    packed = torch.tensor([[0.0, 0, 0], [-1e-9, 0, -1e-9], [1.0, -1, 1]], dtype=dtype)
    basis = torch.ones(4, 2, dtype=dtype)
    assert alone(kernels.projected_update)(momentum, packed, basis, quotient_of(basis)).abs().max() < 1e-6


def test_what_overflows_gives_no_update(capability: str) -> None:
    """Of infinite second moments, as AdamW does; and of an eps beyond all."""
    momentum, packed = (t.float() for t in moments(7, 3, seed=1))
    basis = rows(5, 3, seed=2).float().abs()  # so that no infinity is taken from another
    packed[2] = math.inf
    update = alone(kernels.projected_update)(momentum, packed, basis, quotient_of(basis))
    assert float(update[2].abs().max()) < 1e-15  # an infinity may count as the largest number
    assert update.isfinite().all()
    update = alone(kernels.projected_update)(momentum, packed, basis, quotient_of(basis, eps=1e30))
    assert float(update.abs().max()) < 1e-20


def test_nan_is_not_hidden(capability: str) -> None:
    momentum, packed = (t.float() for t in moments(4, 3, seed=1))
    momentum[1, 0] = math.nan
    basis = rows(5, 3, seed=2).float()
    update = alone(kernels.projected_update)(momentum, packed, basis, quotient_of(basis))
    assert update[1].isnan().all()
    assert update[[0, 2, 3]].isfinite().all()


def test_first_step_follows_the_sign() -> None:
    """After one gradient |M| = sqrt(V) after bias correction: AdamW's first step is the sign of the gradient."""
    gradient, basis = rows(200, 8, seed=3).float(), rows(100, 8, seed=4).float()
    packed = torch.zeros(200, 36)
    alone(kernels.accumulate_second_moment_)(packed, gradient, BETA2)
    quotient = Quotient(1 - BETA1, torch.full((100,), 1 - BETA2), 1e-12, cauchy_schwarz_bound(BETA1, BETA2, 1))
    update = alone(tiled.normalized_update)((1 - BETA1) * gradient, packed, basis, quotient)
    product = gradient @ basis.T
    clear = product.abs() > 1e-2 * product.abs().max()  # elsewhere V is a rounding error, and the clamp's business
    torch.testing.assert_close(update[clear], product.sign()[clear], rtol=0, atol=2e-2)
    assert float(update.abs().max()) <= 1 + 1e-6  # nowhere longer, whatever V is


def test_at_rank_one_it_is_adam_on_the_factor() -> None:
    """``V_ij = p_i q_j^2`` and ``M_ij = m_i q_j``: what is left of full fine-tuning is Adam's quotient on the factor,
    by ``sum |q_j|``, which no scale of the factors changes.
    """
    (momentum, packed), basis = moments(70, 1, seed=5), rows(131, 1, seed=6)
    corrections = torch.full((131,), 1 - BETA2**STEPS, dtype=torch.float64)
    quotient = Quotient(1 - BETA1**STEPS, corrections, 0.0, cauchy_schwarz_bound(BETA1, BETA2, STEPS))
    adam = (momentum / quotient.correction1) / (packed / (1 - BETA2**STEPS)).sqrt()
    update = alone(kernels.projected_update)(momentum, packed, basis, quotient)
    assert_close(update, adam * basis.abs().sum(), UPDATE_TOLERANCE[torch.float64])


@pytest.mark.parametrize("rank", [*RANKS, 128])
@DTYPES
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_accumulate(
    rank: int, capability: str, dtype: torch.dtype, pending: bool, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one pair, and of three together, of which two fit in a tile."""
    monkeypatch.setattr(tiled, "TILE_ROWS", 80)
    for seed, k in enumerate([0, 1, 37, 300] if rank <= 64 else [3]):
        pairs = []
        for i in range(3):
            packed, gradient = moments(k, rank, 10 * seed + i)[1], rows(k, rank, 200 + 10 * seed + i)
            optional = {"pending": rows(k, rank, 300 + seed + i)} if pending else {}
            optional |= {"rotation": contraction(rank, 10 * seed + i)} if rotated else {}
            pairs.append((packed, gradient, optional))
        for layout, count in itertools.product((torch.Tensor.contiguous, strided), (1, 3)):
            actual = [layout(packed.to(dtype).clone()) for packed, _, _ in pairs[:count]]
            gradients = torch.stack([gradient.to(dtype) for _, gradient, _ in pairs[:count]])
            optional = {key: torch.stack([o[key].to(dtype) for _, _, o in pairs[:count]]) for key in pairs[0][2]}
            kernels.accumulate_second_moment_(actual, gradients, BETA2, **optional)
            for result, (packed, gradient, own) in zip(actual, pairs, strict=False):
                expected = packed.clone()
                reference.accumulate_second_moment_(expected, gradient, BETA2, **own)
                assert result.dtype == dtype
                assert_close(result, expected, MOMENT_TOLERANCE[dtype])


def test_accumulate_across_tiles() -> None:
    _, packed = moments(2100, 20, seed=5)
    gradient, pending, rotation = rows(2100, 20, 6), rows(2100, 20, 7), contraction(20, 8)
    expected = packed.clone()
    reference.accumulate_second_moment_(expected, gradient, BETA2, pending=pending, rotation=rotation)
    alone(tiled.accumulate_second_moment_)(packed, gradient, BETA2, pending=pending, rotation=rotation)
    assert_close(packed, expected, MOMENT_TOLERANCE[torch.float64])


def test_bfloat16_is_only_storage(capability: str) -> None:
    """Arithmetic stays float32: the update is that of the stored numbers, an accumulation rounds once, at the end."""
    momentum, packed = moments(300, 16, seed=1)
    stored, basis = packed.bfloat16(), rows(200, 16, seed=2)
    expected = reference.projected_update(momentum, stored.double(), basis, quotient_of(basis))
    actual = alone(kernels.projected_update)(momentum.float(), stored, basis.float(), quotient_of(basis.float()))
    assert_close(actual, expected, UPDATE_TOLERANCE[torch.float32])

    gradient, pending, rotation = rows(300, 16, 3), rows(300, 16, 4), contraction(16, 5)
    expected = stored.double()
    reference.accumulate_second_moment_(expected, gradient, BETA2, pending=pending, rotation=rotation)
    cast = {"pending": pending.float(), "rotation": rotation.float()}
    alone(kernels.accumulate_second_moment_)(stored, gradient.float(), BETA2, **cast)
    assert stored.dtype == torch.bfloat16
    assert_close(stored, expected, 2**-7)  # one unit in the last of 8 bits


def test_rounding_keeps_the_mean() -> None:
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) + 1
    rounded = storage.round_stochastically(values, seed=3)
    error = rounded.double() - values.double()
    unit = 2**-7
    assert float(error.abs().max()) < unit
    assert abs(float(error.mean())) < 4 * unit / 2 / len(values) ** 0.5  # four standard deviations
    # One value, many seeds: its distance from the two neighbours decides.
    ups = [float(storage.round_stochastically(torch.tensor([1 + unit / 4]), seed)) > 1 for seed in range(4000)]
    assert abs(sum(ups) / 4000 - 0.25) < 0.03
    assert torch.equal(rounded, storage.round_stochastically(values, seed=3))
    assert not torch.equal(rounded, storage.round_stochastically(values, seed=4))


def test_rounding_leaves_what_bfloat16_has() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-120, 3e38, math.inf, -math.inf]).bfloat16().float()
    assert torch.equal(storage.round_stochastically(values, seed=1).float(), values)
    assert storage.round_stochastically(torch.tensor([math.nan]), seed=1).isnan().all()


def test_all_paths_round_the_same_bits(capability: str) -> None:
    """Of ``g * g``, which no order of sums changes."""
    gradient = torch.cat([rows(301, 1, seed=1).float(), torch.tensor([[math.inf], [0.0], [1e-30], [math.nan]])])
    stored = torch.zeros(len(gradient), 1, dtype=torch.bfloat16)
    alone(kernels.accumulate_second_moment_)(stored, gradient, 0.0, seed=7)
    assert stored[-1].isnan()  # which of its bits are set means nothing
    assert torch.equal(stored[:-1], storage.round_stochastically(gradient[:-1] ** 2, 7))


@pytest.mark.parametrize("capability", compiled.INSTRUCTIONS, indirect=True)
def test_compiled_rows_are_the_same_wherever_they_are_cut(capability: str) -> None:
    """To the last bit, on which resuming and sharding build."""
    momentum, packed = (t.float() for t in moments(431, 5, seed=1))
    basis, gradient, rotation = (t.float() for t in (rows(700, 5, seed=2), rows(431, 5, seed=3), contraction(5, 4)))
    whole, parts = packed.clone(), packed.clone()
    alone(kernels.accumulate_second_moment_)(whole, gradient, BETA2, rotation=rotation)
    update = alone(kernels.projected_update)(momentum, whole, basis, quotient_of(basis))
    for some in (slice(0, 7), slice(7, 200), slice(200, 431)):
        alone(kernels.accumulate_second_moment_)(parts[some], gradient[some], BETA2, rotation=rotation)
        part = alone(kernels.projected_update)(momentum[some], parts[some], basis, quotient_of(basis))
        assert torch.equal(part, update[some])
    assert torch.equal(parts, whole)


def test_where_nothing_can_be_compiled_plain_torch_takes_over(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "broken.cpp").write_text("#error no compiler takes this\n")
    monkeypatch.setattr(compiled, "SOURCE", tmp_path / "broken.cpp")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(compiled, "_library", functools.cache(compiled._library.__wrapped__))
    momentum, packed = (t.float() for t in moments(3, 2, seed=1))
    basis = rows(4, 2, seed=2).float()
    with caplog.at_level(logging.WARNING):
        update = alone(kernels.projected_update)(momentum, packed, basis, quotient_of(basis))
        alone(kernels.projected_update)(momentum, packed, basis, quotient_of(basis))
    building, said = (r.getMessage() for r in caplog.records if r.name == compiled.__name__)
    assert "builds its kernels for this CPU, once" in building
    assert "plain torch kernels on this CPU, which are slower: Error building extension 'loft_ds_avx2" in said
    assert torch.equal(update, alone(tiled.projected_update)(momentum, packed, basis, quotient_of(basis)))
    assert list((tmp_path / "extensions").iterdir()) == [], "what others would find is whole or not there"


def test_bfloat16_does_not_stall() -> None:
    """With beta2 = 0.999 most steps are below half a unit of bfloat16, and to the nearest nothing would ever move."""
    stored, exact = torch.zeros(500, 3, dtype=torch.bfloat16), torch.zeros(500, 3)
    stalled = stored.clone()
    generator = torch.Generator().manual_seed(1)
    for seed in range(1500):
        gradient = torch.randn(500, 2, generator=generator)
        alone(kernels.accumulate_second_moment_)(stored, gradient, 0.999, seed=seed)
        alone(kernels.accumulate_second_moment_)(exact, gradient, 0.999)
        nearest = stalled.float()
        alone(kernels.accumulate_second_moment_)(nearest, gradient, 0.999)
        stalled.copy_(nearest)
    diagonal = exact[:, [0, 2]].mean()
    assert abs(stored.float()[:, [0, 2]].mean() / diagonal - 1) < 0.01
    assert abs(stalled.float()[:, [0, 2]].mean() / diagonal - 1) > 0.05


class Allocations(TorchDispatchMode):
    """The high-water mark of the storages that operations create, in bytes, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                self._storages[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._storages.values()))
        return out


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("k", "n", "rank"), [(3000, 9000, 2), (2000, 3000, 16), (500, 600, 64), (140, 530, 128)])
def test_extra_memory(stored: torch.dtype, k: int, n: int, rank: int) -> None:
    """Of the shapes that fill the tiles; no larger shape takes more, since only tiles are ever allocated."""
    dtype = torch.float64 if stored == torch.float64 else torch.float32
    packed = torch.ones(k, rank * (rank + 1) // 2, dtype=stored)
    momentum, basis = torch.ones(k, rank, dtype=dtype), torch.ones(n, rank, dtype=dtype)
    with Allocations() as allocations:
        result = alone(tiled.projected_update)(momentum, packed, basis, quotient_of(basis))
    assert 0 < allocations.peak - result.nbytes <= tiled.WORKSPACE_BYTES
    if k * n * rank > 1e8:
        assert allocations.peak < k * n * rank  # let alone that many numbers
    with Allocations() as allocations:
        alone(tiled.accumulate_second_moment_)(
            packed, momentum, BETA2, pending=momentum, rotation=torch.eye(rank, dtype=dtype)
        )
    assert 0 < allocations.peak <= tiled.WORKSPACE_BYTES
