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
        weights = algebra.turned_weights(weights, beta2, rotation[None] if turns else None)
    second = torch.einsum("jr,krs,js->kj", basis, moments, basis).mean(0)
    corrections = algebra.bias_corrections(basis[None], weights)[0]
    published = 1 - beta2**steps
    lengths = basis.square().sum(-1)
    # A squared normal number has a relative deviation of sqrt(2); the latest of the 4000 weighs all where it turns: 2%.
    assert torch.allclose(second / corrections, lengths, rtol=0.1)
    if turns:
        assert float((second / published / lengths).max()) < 0.2
    else:
        assert torch.allclose(corrections, torch.full_like(corrections, published), rtol=1e-12)


def test_a_direction_that_is_not_there_needs_no_correction():
    weights = algebra.turned_weights(torch.zeros(1, 2, 2), 0.9)
    corrections = algebra.bias_corrections(torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), weights)
    assert torch.allclose(corrections, torch.tensor([[1.0, 0.1]]))


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.999), (0.5, 0.3)])
def test_cauchy_schwarz_bound_holds_and_is_reached(betas):
    """No sequence beats it, and the one that is built to reach it does."""
    beta1, beta2 = betas
    bound = algebra.cauchy_schwarz_bound(beta1, beta2)
    n = 400
    ages = torch.arange(n - 1, -1, -1, dtype=torch.float64)
    first, second = (1 - beta1) * beta1**ages, (1 - beta2) * beta2**ages
    torch.manual_seed(0)
    for sequence in (torch.randn(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64), (beta1 / beta2) ** ages):
        ratio = float((first @ sequence).abs() / (second @ sequence.square()).sqrt())
        assert ratio <= bound * (1 + 1e-12)
    assert ratio == pytest.approx(bound, rel=1e-6)  # the last sequence, but for what lies before its 400 terms
    assert algebra.cauchy_schwarz_bound(0.9, 0.8) == math.inf


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
