"""Section 3 of the LoFT paper (arXiv 2505.21289) as pure functions on rows.

Both factors of ``W = W0 + s * B @ A`` are treated alike, as *feature rows*:

======  ====================  ============================  ======================
factor  its rows ``X`` (k, r)  the other's rows ``T`` (l, r)  row gradient ``G`` (k, r)
======  ====================  ============================  ======================
``A``   ``A.T``, k = n        ``s * B``, l = m              ``A.grad.T``
``B``   ``B``, k = m          ``s * A.T``, l = n            ``B.grad``
======  ====================  ============================  ======================

The state lives in *orthonormal coordinates* of ``T``: with ``Q = T @ H`` orthonormal, momentum and
second moment are those of ``g = G @ H``. On paper this is the published method, which keeps them for
``G @ inv(T.T @ T)``; in float32 it is the difference between following AdamW and not, because no
inverse of a Gram matrix is ever formed and the calibration ``R = Q_prev.T @ Q`` is a contraction.

Nothing here knows of torch.distributed, DeepSpeed or PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Directions of T whose squared length is below this part of the largest are noise in float64 and are dropped.
RANK_TOLERANCE = 1e-14
# Squared pivots of a Cholesky factor that differ by more leave its last columns to rounding: eigenvectors then.
CHOLESKY_TOLERANCE = 1e-10


def gram(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` in float64, (b, r, r), of two batches of row blocks (b, k, r).

    float64 because its eigenvalues are squared singular values: in float32 every direction of ``T``
    shorter than 3e-4 of the longest would be lost.
    """
    return left.double().mT @ right.double()


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """How float32 matrix products are computed meanwhile: "ieee", or "tf32" where the hardware has it.

    A run may allow itself TF32 for its forward and backward passes. A basis of short factors has long columns, which
    would carry the ten bits of TF32 into the step. (Meanwhile torch refuses to read its older switch, ``allow_tf32``,
    of a run that has set it.)
    """
    kinds = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = []
    for kind in kinds:
        allowed, kind.fp32_precision = kind.fp32_precision, "none"
        before.append("none" if kind.fp32_precision == allowed else allowed)  # what is inherited is to stay so
    try:
        for kind in kinds:
            kind.fp32_precision = precision
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.fp32_precision = allowed


def pack(symmetric: Tensor) -> Tensor:
    """The upper triangles (..., r(r+1)/2) of symmetric matrices (..., r, r)."""
    i, j = torch.triu_indices(symmetric.shape[-1], symmetric.shape[-1], device=symmetric.device)
    return symmetric[..., i, j]


def unpack(packed: Tensor, rank: int) -> Tensor:
    """The symmetric matrices (..., r, r) whose upper triangles are ``packed`` (..., r(r+1)/2)."""
    i, j = torch.triu_indices(rank, rank, device=packed.device)
    full = packed.new_empty(*packed.shape[:-1], rank, rank)
    full[..., i, j] = packed
    full[..., j, i] = packed
    return full


def orthonormal_basis(grams: Tensor) -> Tensor:
    """``H`` (b, r, r) with ``T @ H`` orthonormal, from a batch of Gram matrices ``T.T @ T`` (b, r, r) in float64.

    ``inv(L).T`` of the Cholesky factor ``L``, many times as fast as eigenvectors; these where ``T`` is short of
    directions, as at PEFT's ``B = 0``. Columns of ``H`` for directions that ``T`` does not have are zero.

    Raises:
        torch.linalg.LinAlgError: a matrix that is not finite.
    """
    lower, info = torch.linalg.cholesky_ex(grams)
    pivots = torch.diagonal(lower, dim1=-2, dim2=-1).square()
    sound = (info == 0) & (pivots.amin(dim=-1) > CHOLESKY_TOLERANCE * pivots.amax(dim=-1))
    if bool(sound.all()):
        return _inverse_transposed(lower)
    if not bool(grams.isfinite().all()):  # not every library's eigenvectors fail then
        raise torch.linalg.LinAlgError("a Gram matrix is not finite")
    basis = torch.empty_like(grams)
    basis[sound] = _inverse_transposed(lower[sound])
    basis[~sound] = _eigenbasis(grams[~sound])
    return basis


def _inverse_transposed(lower: Tensor) -> Tensor:
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.mT, identity.expand_as(lower), upper=True)


def _eigenbasis(grams: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(grams)
    kept = eigenvalues > RANK_TOLERANCE * eigenvalues[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    lengths = torch.where(kept, eigenvalues, 1.0).rsqrt()
    return vectors * torch.where(kept, lengths, 0.0).unsqueeze(-2)


def unscaled_basis(basis: Tensor) -> Tensor:
    """``C @ H`` (b, r, r) from ``H`` alone: ``G @ C @ H`` are the coordinates of an *unscaled* gradient ``G``.

    ``H.T @ C @ H`` is the identity on the directions that ``T`` has.
    """
    return torch.linalg.pinv(basis).mT


def turned_weights(weights: Tensor, beta2: float, rotation: Tensor | None = None) -> Tensor:
    """What the weights ``S`` (b, r, r) of the second moments' average are after one more gradient.

    Not in the paper. Adam divides ``V`` by ``1 - beta2 ** t``, the sum of its weights, since it began at zero. But a
    rotation takes from ``P`` what lies outside the new subspace, as if it had never been seen, and where the subspace
    turns the sum is far less. ``S`` goes with ``P``: it is ``P`` of a row whose full gradients are white noise of unit
    variance, ``S <- beta2 R.T S R + (1 - beta2) I``. Where ``R`` is orthogonal, as in the full-rank limit, it is
    ``(1 - beta2 ** t) I``.

    Args:
        weights: the last step's; zeros at the start.
        beta2: decay.
        rotation: (b, r, r), from the last step's coordinates to this one's; None where they are the same.
    """
    if rotation is not None:
        weights = rotation.mT @ weights @ rotation
    identity = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    return beta2 * weights + (1 - beta2) * identity


def bias_corrections(directions: Tensor, weights: Tensor) -> Tensor:
    """What ``V_ij = q_j P_i q_j^T`` is to be divided by (b, l), of rows ``q_j`` (b, l, r): ``q_j S q_j^T / |q_j|^2``.

    See :func:`turned_weights`. One where ``q_j`` is zero, and with it ``V_ij``.
    """
    lengths = directions.square().sum(-1)
    kept = ((directions @ weights) * directions).sum(-1)
    return torch.where(lengths > 0, kept / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 1.0)


def cauchy_schwarz_bound(beta1: float, beta2: float) -> float:
    """``rho`` of ``|M_ij| <= rho * sqrt(V_ij)``, both before bias correction; infinite where no bound exists.

    Holds for any two exponential averages of the same sequence and its square. Rounding can break it where
    ``V`` is tiny, and then a division by ``eps`` would follow; clamping changes nothing in exact arithmetic.
    """
    if beta1**2 >= beta2:
        return math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


def adamw_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) in place, on tensors of one shape."""
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    param.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
