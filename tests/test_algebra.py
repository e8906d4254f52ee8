"""The pure functions: what they promise of any rows, also of rows that are short of directions."""

import math

import pytest
import torch

from loft_ds import algebra


def rows(kind, k=9, r=4):
    torch.manual_seed(0)
    t = torch.randn(k, r, dtype=torch.float64)
    if kind == "zero":
        return torch.zeros_like(t)
    if kind == "deficient":
        return t[:, :2] @ torch.randn(2, r, dtype=torch.float64)
    if kind == "duplicate":
        return torch.cat([t[:, :1]] * r, dim=1)
    if kind == "ill_conditioned":
        return t @ torch.diag(torch.logspace(0, -5, r, dtype=torch.float64))
    if kind == "fewer_rows":
        return t[:2]
    return t


KINDS = {"random": 4, "ill_conditioned": 4, "deficient": 2, "duplicate": 1, "fewer_rows": 2, "zero": 0}


@pytest.mark.parametrize(("kind", "directions"), KINDS.items())
def test_basis_is_orthonormal_on_the_directions_there_are(kind, directions):
    t = rows(kind)
    (h,) = algebra.orthonormal_basis(algebra.gram(t, t)[None])
    q = t @ h
    # 1e-5: rounding 1e-16 of the Gram matrix against its smallest eigenvalue, 1e-10 of the largest at worst here.
    assert torch.linalg.matrix_rank(q, tol=1e-5) == directions
    singular = torch.linalg.svdvals(q)
    assert torch.allclose(singular, (singular > 0.5).double(), atol=1e-5)
    assert torch.allclose(q @ (q.T @ t), t, atol=1e-5 * float(t.abs().max())), "Q spans what T spans"


def test_a_batch_may_mix_them():
    """One matrix of a batch that needs eigenvectors changes nothing for the others."""
    grams = torch.stack([algebra.gram(t, t) for t in map(rows, ["random", "zero", "deficient", "ill_conditioned"])])
    together = algebra.orthonormal_basis(grams)
    for gram, basis in zip(grams, together, strict=True):
        assert torch.allclose(algebra.orthonormal_basis(gram[None])[0], basis)


@pytest.mark.parametrize("kind", ["random", "deficient", "zero"])
def test_unscaled_basis_is_c_times_h(kind):
    t = rows(kind)
    gram = algebra.gram(t, t)
    (h,) = algebra.orthonormal_basis(gram[None])
    assert torch.allclose(algebra.unscaled_basis(h), gram @ h, atol=1e-9)


def test_what_is_not_finite_raises():
    with pytest.raises(torch.linalg.LinAlgError):
        algebra.orthonormal_basis(torch.full((1, 3, 3), math.nan, dtype=torch.float64))


@pytest.mark.parametrize("turns", [True, False])
def test_bias_corrections_keep_the_second_moment_unbiased(turns):
    """Of white noise V is ``|q_j|^2`` on average, however far the basis turns, and ``1 - beta2^t`` too small for it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    beta2, steps, k, width, r = 0.99, 30, 4000, 7, 3
    basis, weights, moments = None, torch.zeros(1, r, r, dtype=torch.float64), torch.zeros(k, r, r, dtype=torch.float64)
    for _ in range(steps):
        last = basis
        basis = torch.linalg.qr(normal(width, r))[0] if last is None or turns else last
        rotation = last.T @ basis if last is not None and turns else torch.eye(r, dtype=torch.float64)
        gradients = normal(k, width) @ basis
        moments = beta2 * rotation.T @ moments @ rotation
        moments += (1 - beta2) * gradients[:, :, None] * gradients[:, None, :]
        weights = beta2 * algebra.turned_weights(weights, rotation[None]) + (1 - beta2) * torch.eye(r)
    second = torch.einsum("jr,krs,js->kj", basis, moments, basis).mean(0)
    corrections = algebra.bias_corrections(basis[None], weights, beta2)[0]
    published = 1 - beta2**steps
    lengths = basis.square().sum(-1)
    # A squared normal number has a relative deviation of sqrt(2); the latest of the 4000 weighs all where it turns: 2%.
    assert torch.allclose(second / corrections, lengths, rtol=0.1)
    if turns:
        assert float((second / published / lengths).max()) < 0.2
    else:
        assert torch.allclose(corrections, torch.full_like(corrections, published), rtol=1e-12)


def test_a_direction_that_is_not_there_needs_no_correction():
    corrections = algebra.bias_corrections(torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), 0.1 * torch.eye(2)[None], 0.9)
    assert torch.allclose(corrections, torch.tensor([[1.0, 0.1]]))


def test_a_direction_that_has_not_been_seen_is_not_divided_by_zero():
    """What rounding leaves of its weight may even be below zero, and a root is taken of it."""
    weights = torch.diag(torch.tensor([0.1, -1e-20], dtype=torch.float64))[None]
    corrections = algebra.bias_corrections(torch.eye(2, dtype=torch.float64)[None], weights, 0.9)[0]
    assert corrections.tolist() == pytest.approx([0.1, algebra.LEAST_WEIGHT * 0.1])


def grams_of(left, right):
    return algebra.gram(left, left)[None], algebra.gram(right, right)[None]


def balanced(left, right):
    """Both rows after :func:`algebra.balance`, which is checked to give inverses."""
    c, d, c_inverse, d_inverse = (each[0] for each in algebra.balance(*grams_of(left, right)))
    identity = torch.eye(len(c), dtype=torch.float64)
    # 1e-16 of rounding times the condition of C, which is the root of that of the Gram matrices: 1e6 where one is
    # short of directions.
    for product in (c @ d.T, c @ c_inverse, d @ d_inverse):
        assert torch.allclose(product, identity, atol=1e-8)
    return left @ c, right @ d


def singular_values(left, right):
    """Of ``X @ Y.T``, the largest r."""
    return torch.linalg.svdvals(left @ right.T)[: left.shape[1]]


@pytest.mark.parametrize("kind", ["random", "lopsided", "loose", "one column"])
@pytest.mark.parametrize("swapped", [False, True])
def test_balanced_factors_are_the_shortest_of_their_product(kind, swapped):
    torch.manual_seed(1)
    left, right = torch.randn(9, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    tolerance = 1e-12
    if kind == "one column":
        left, right = left[:, :1], 1e-3 * right[:, :1]
    if kind == "lopsided":
        left, right = 1e-6 * left, 1e6 * right
    if kind == "loose":  # long where their product is not
        mixing = torch.eye(4, dtype=torch.float64)
        mixing[0, 1] = mixing[2, 3] = 100.0
        left, right = left @ mixing, right @ torch.linalg.inv(mixing).T
        tolerance = 1e-7  # the rounding of a Gram matrix, 1e-16, times its condition
    left, right = (right, left) if swapped else (left, right)
    assert kind == "random" or algebra.unbalanced(*grams_of(left, right))
    short_left, short_right = balanced(left, right)
    product, lengths = left @ right.T, singular_values(left, right)
    assert torch.allclose(short_left @ short_right.T, product, rtol=0, atol=tolerance * float(lengths[0]))
    grams = [each[0] for each in grams_of(short_left, short_right)]
    assert torch.allclose(*grams, rtol=0, atol=tolerance * float(lengths[0]))
    for gram in grams:  # no factors of this product are shorter than its singular values together
        assert float(gram.trace()) == pytest.approx(float(lengths.sum()), rel=tolerance)
        assert torch.allclose(torch.linalg.eigvalsh(gram).flip(0), lengths, atol=tolerance * float(lengths[0]))
    assert not algebra.unbalanced(*grams_of(short_left, short_right))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", ["deficient", "duplicate"])
def test_balancing_keeps_what_only_one_factor_has(kind, swapped):
    """As at PEFT's start, where ``B`` grows out of zero: ``A`` keeps all its directions, at ``FLOOR`` of the largest
    length, and the other one gets none that it does not have.
    """
    torch.manual_seed(1)
    whole, lacking = torch.randn(6, 4, dtype=torch.float64), rows(kind)
    left, right = balanced(lacking, whole) if swapped else balanced(whole, lacking)
    whole_now, lacking_now = (right, left) if swapped else (left, right)
    lengths = singular_values(whole, lacking)
    # The square root of what a Gram matrix rounds, 1e-16 of it: a direction that is not there has that length.
    tolerance = 1e-6 * float(lengths[0])
    assert torch.allclose(whole_now @ lacking_now.T, whole @ lacking.T, rtol=0, atol=tolerance)
    there = KINDS[kind]
    kept = torch.linalg.svdvals(whole_now).square()
    assert torch.allclose(kept[:there], lengths[:there], rtol=1e-6)
    assert torch.allclose(kept[there:], algebra.FLOOR * lengths[:1].expand(4 - there), rtol=1e-6)
    own = torch.linalg.svdvals(lacking_now).square()
    assert torch.allclose(own[:there], lengths[:there], rtol=1e-6)
    assert float(own[there:].max()) < tolerance


def test_a_batch_is_balanced_one_by_one():
    """Those that swap sides and those that do not, together."""
    torch.manual_seed(1)
    whole = torch.randn(6, 4, dtype=torch.float64)
    pairs = [(whole, rows("deficient")), (rows("deficient"), whole), (whole, rows("random"))]
    grams = [torch.cat(each) for each in zip(*(grams_of(*pair) for pair in pairs), strict=True)]
    together = algebra.balance(*grams)
    for i, pair in enumerate(pairs):
        for joined, alone in zip(together, algebra.balance(*grams_of(*pair)), strict=True):
            assert torch.allclose(joined[i], alone[0], rtol=1e-9)


def test_who_is_to_be_balanced():
    """All others have ``|X| |Y| <= 2 sqrt(r) |X Y.T|`` and lengths within a factor of two; of each kind there are
    many here.
    """
    torch.manual_seed(0)
    seen, r = set(), 3
    for _ in range(300):
        left, right = torch.randn(5, r, dtype=torch.float64), torch.randn(7, r, dtype=torch.float64)
        mixing = torch.eye(r, dtype=torch.float64) + 3 * torch.rand(()) * torch.randn(r, r, dtype=torch.float64)
        left, right = left @ mixing, 2 ** torch.randn(()) * right @ torch.linalg.inv(mixing).T
        lengths = float(left.norm()), float(right.norm())
        loose = lengths[0] * lengths[1] > 2 * r**0.5 * float((left @ right.T).norm())
        lopsided = max(lengths) > 2 * min(lengths)
        assert bool(algebra.unbalanced(*grams_of(left, right))) == (loose or lopsided)
        seen.add((loose, lopsided))
    assert len(seen) == 4


def test_a_zero_product_has_no_balance():
    """Its shortest factors are zero, and nothing would move again."""
    some, zero = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    apart = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0, 1.0, 0.0], [0.0, 0.0, 1.0])]
    for left, right in [(some, zero), (zero, some), (zero, zero), apart]:
        assert not algebra.unbalanced(*grams_of(left, right))


BETAS = [(0.9, 0.99), (0.9, 0.999), (0.5, 0.3), (0.9, 0.81), (0.9, 0.8), (0.0, 0.9), (0.0, 0.0)]


def ages(step):
    """Of so many gradients, the oldest first."""
    return torch.arange(step - 1, -1, -1, dtype=torch.float64)


def extremal(beta1, beta2, step):
    """The gradients after which momentum is the longest against the second moment: weights ``w_s / v_s``."""
    return (beta1 / beta2 if beta2 else 0.0) ** ages(step)


def quotient(sequence, beta1, beta2):
    """``|M| / sqrt(V)`` after a sequence, both before bias correction."""
    first, second = (1 - beta1) * beta1 ** ages(len(sequence)), (1 - beta2) * beta2 ** ages(len(sequence))
    return float((first @ sequence).abs() / (second @ sequence.square()).sqrt())


@pytest.mark.parametrize("step", [1, 2, 10, 100])
@pytest.mark.parametrize("betas", BETAS)
def test_cauchy_schwarz_bound_holds_and_is_reached(betas, step):
    """No sequence beats it, and the one that is built to reach it does."""
    bound = algebra.cauchy_schwarz_bound(*betas, step)
    assert quotient(extremal(*betas, step), *betas) == pytest.approx(bound, rel=1e-12)
    torch.manual_seed(0)
    for growth in (0.5, 1.0, 1.1):
        for _ in range(50):
            sequence = torch.randn(step, dtype=torch.float64) * growth ** -ages(step)
            assert quotient(sequence, *betas) <= bound * (1 + 1e-12)


def test_cauchy_schwarz_bound_of_many_steps():
    beta1, beta2 = 0.9, 0.99
    limit = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    bounds = [algebra.cauchy_schwarz_bound(beta1, beta2, step) for step in (1, 2, 10, 100, 10_000)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(limit, rel=1e-12)
    assert algebra.cauchy_schwarz_bound(beta1, beta2, 10**9) == pytest.approx(limit, rel=1e-12)


def test_cauchy_schwarz_bound_where_one_gradient_counts():
    """``beta2 = 0``: V is the last gradient's square alone, and M may be of others."""
    assert algebra.cauchy_schwarz_bound(0.9, 0.0, 1) == pytest.approx(0.1)
    assert algebra.cauchy_schwarz_bound(0.9, 0.0, 2) == math.inf
    assert algebra.cauchy_schwarz_bound(0.0, 0.0, 2) == 1.0


@pytest.mark.parametrize("step", [100, 500, 5_000, 10**7])
def test_cauchy_schwarz_bound_is_a_float32_or_none(step):
    """Where it grows with the steps without end it is at last beyond what a kernel can clamp by."""
    bound = algebra.cauchy_schwarz_bound(0.9, 0.5, step)
    assert bound == math.inf or bound < torch.finfo(torch.float32).max
    assert algebra.longest_quotient(0.9, 0.5, step) > 1


@pytest.mark.parametrize("step", [1, 2, 10, 100])
@pytest.mark.parametrize("betas", BETAS)
def test_longest_quotient_is_what_adamw_reaches(betas, step):
    """At first the sign of the gradient."""
    longest = algebra.longest_quotient(*betas, step)
    assert longest == pytest.approx(1, rel=1e-12) if step == 1 else longest >= 1 - 1e-12
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    adamw = torch.optim.AdamW([param], lr=1.0, betas=betas, eps=1e-300, weight_decay=0.0)
    for gradient in extremal(*betas, step):
        before, param.grad = param.detach().clone(), gradient.reshape(1)
        adamw.step()
    # 1e-9: a step is read off as a difference of sums of up to a hundred such steps.
    assert float((before - param.detach()).abs()) == pytest.approx(longest, rel=1e-9)


def test_adamw_is_torchs():
    param = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    ours, moments = param.detach().clone(), (torch.zeros(5).double(), torch.zeros(5).double())
    theirs = torch.optim.AdamW([param], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(1, 6):
        param.grad = torch.randn(5, dtype=torch.float64)
        settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        algebra.adamw_update_(ours, param.grad, *moments, step=step, **settings)
        theirs.step()
    assert torch.allclose(ours, param.detach(), rtol=1e-13)
