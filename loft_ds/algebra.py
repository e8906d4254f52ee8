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
``G @ inv(T.T @ T)``. Here no inverse of a Gram matrix is ever formed, and the calibration
``R = Q_prev.T @ Q`` is a contraction: what that is worth in float32 is in docs/results/full_rank.md.

Nothing here knows of torch.distributed, DeepSpeed or PEFT.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Directions of T whose squared length is below this part of the largest are noise and are dropped: in float64 the Gram
# matrix's own (which leaves a basis orthonormal to eps over this), in float32 that of the rows. Balanced factors have
# lengths like the square roots of those of W: what is dropped is below 1e-8 of W's largest.
RANK_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-8}
# Squared pivots of a Cholesky factor that differ by more leave its last columns to rounding: eigenvectors then.
CHOLESKY_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-6}
# A pair is balanced anew when its factors are so much longer than their product demands, or one so much longer than the
# other (both of squared lengths).
SLACK, LOPSIDED = 4.0, 4.0
# The part of the largest length of W that balancing keeps a direction at which W does not have: it must be well above
# RANK_TOLERANCE, since the factor that has it is to go on moving W there.
FLOOR = 1e-2
# Of one gradient's weight: what of the second moments' average is left in a direction counts as no less.
LEAST_WEIGHT = 1e-6


def gram(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` in float64, (b, r, r), of two batches of row blocks (b, k, r).

    float64 because its eigenvalues are squared singular values: in float32 every direction of ``T``
    shorter than 3e-4 of the longest would be lost.
    """
    return left.double().mT @ right.double()


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """How float32 matrix products are computed meanwhile: "ieee", or "tf32" and "bf16" where the hardware has it.

    A run may allow itself TF32 for its forward and backward passes. A basis of short factors has long columns, which
    would carry the ten bits of TF32 into the step. (Meanwhile torch refuses to read its older switch, ``allow_tf32``,
    of a run that has set it.)
    """
    kinds = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    chosen = "tf32" if precision == "bf16" else precision, precision  # CUDA multiplies no float32 as bfloat16
    before = []
    for kind in kinds:
        allowed, kind.fp32_precision = kind.fp32_precision, "none"
        before.append("none" if kind.fp32_precision == allowed else allowed)  # what is inherited is to stay so
    try:
        for kind, each in zip(kinds, chosen, strict=True):
            kind.fp32_precision = each
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.fp32_precision = allowed


@functools.lru_cache(maxsize=64)
def _triangle(rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the packed upper triangle (p,) lies in a flat matrix, and where each of the matrix's entries lies in it."""
    i, j = torch.triu_indices(rank, rank, device=device)
    of_entry = torch.empty(rank, rank, dtype=torch.long, device=device)
    of_entry[i, j] = of_entry[j, i] = torch.arange(len(i), device=device)
    return i * rank + j, of_entry.flatten()


def pack(symmetric: Tensor) -> Tensor:
    """The upper triangles (..., r(r+1)/2) of symmetric matrices (..., r, r)."""
    return symmetric.flatten(-2).index_select(-1, _triangle(symmetric.shape[-1], symmetric.device)[0])


def unpack(packed: Tensor) -> Tensor:
    """The symmetric matrices (..., r, r) whose upper triangles are ``packed`` (..., r(r+1)/2)."""
    rank = math.isqrt(2 * packed.shape[-1])
    return packed.index_select(-1, _triangle(rank, packed.device)[1]).unflatten(-1, (rank, rank))


def orthonormal_basis(grams: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``H`` (b, r, r) with ``T @ H`` orthonormal, from a batch of Gram matrices ``T.T @ T`` (b, r, r) in float64.

    ``inv(L).T`` of the Cholesky factor ``L``, which takes less work than eigenvectors; these where ``T`` is short of
    directions, as at PEFT's ``B = 0``. Columns of ``H`` for directions that ``T`` does not have are zero.

    Args:
        grams: the Gram matrices.
        dtype: of the rows that they are of: it decides what is a direction and what is rounding.

    Raises:
        torch.linalg.LinAlgError: a matrix that is not finite.
    """
    lower, info = torch.linalg.cholesky_ex(grams)
    pivots = torch.diagonal(lower, dim1=-2, dim2=-1).square()
    sound = (info == 0) & (pivots.amin(dim=-1) > CHOLESKY_TOLERANCE[dtype] * pivots.amax(dim=-1))
    if bool(sound.all()):
        return _inverse(lower).mT.contiguous()
    if not bool(grams.isfinite().all()):  # not every library's eigenvectors fail then
        raise torch.linalg.LinAlgError("a Gram matrix is not finite")
    basis = torch.empty_like(grams)
    basis[sound] = _inverse(lower[sound]).mT
    basis[~sound] = _eigenbasis(grams[~sound], RANK_TOLERANCE[dtype])
    return basis


def _inverse(lower: Tensor) -> Tensor:
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)


def _eigenbasis(grams: Tensor, tolerance: float) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(grams)
    kept = eigenvalues > tolerance * eigenvalues[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    lengths = torch.where(kept, eigenvalues, 1.0).rsqrt()
    return vectors * torch.where(kept, lengths, 0.0).unsqueeze(-2)


def unbalanced(left: Tensor, right: Tensor) -> Tensor:
    """Which pairs (b,) are to be balanced anew, from the Gram matrices (b, r, r) of both factors; none whose product is
    zero.

    ``|X| |Y| <= 2 sqrt(r) |X Y.T|`` holds for the others, so that rounding the factors rounds the product by no more
    than that many units; balanced, it is ``sqrt(r)`` at most, and no factors of that product do better.
    """
    squares = torch.stack([left, right]).diagonal(dim1=-2, dim2=-1).sum(-1)
    product = (left * right).sum((-2, -1))
    loose = squares.prod(0) > SLACK * left.shape[-1] * product
    lopsided = squares.amax(0) > LOPSIDED * squares.amin(0)
    return (loose | lopsided) & (product > 0)


def to_balance(
    gram: Tensor, own: Tensor, growth: Tensor, basis: Tensor, other_basis: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Which pairs (b,) are to be balanced anew, with both Gram matrices (b, r, r); None where none of them is.

    Those that are :func:`unbalanced`, and those of which a factor lacks a direction: the other one keeps it at a part
    of its largest length, which grows.

    Args:
        gram: of the leading factor's rows, packed (b, r(r+1)/2).
        own: of the following one's before its move, packed.
        growth: what its move adds to that (b, r, r).
        basis: of the leading side (b, r, r).
        other_basis: of the following side.
    """
    of_lead, of_follow = unpack(gram), unpack(own) + growth
    lacks = (torch.stack([basis, other_basis]) == 0).all(dim=-2).any(dim=-1).any(dim=0)
    chosen = unbalanced(of_lead, of_follow) | (lacks & ((of_lead * of_follow).sum((1, 2)) > 0))
    return (chosen, of_lead, of_follow) if bool(chosen.any()) else None


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``C`` and ``D``, with ``C @ D.T = I``, and their inverses (b, r, r): ``X C`` and ``Y D`` have the same product as
    ``X`` and ``Y``, and equal Gram matrices, those of the square root of the product.

    Of all factors of a product these are the shortest. With ``K`` the square root of ``X.T X`` and ``N = K Y.T Y K``,
    ``C = inv(K) N^(1/4)`` and ``D = K N^(-1/4)``: functions of the matrices, whose eigenvectors are nobody's choice, so
    that ranks which find them each by themselves agree. Lengths of the product below ``FLOOR`` of the largest count as
    that much: ``X`` keeps the directions that the product does not have. It is the factor that has more of them.

    Args:
        left: ``X.T X`` (b, r, r) in float64.
        right: ``Y.T Y``.
    """
    grams = torch.stack([left, right])
    squares, vectors = torch.linalg.eigh(grams)
    largest = squares[..., -1:].clamp_min(torch.finfo(left.dtype).tiny)
    least = (squares / largest)[..., 0]
    swapped = least[1] > 4 * least[0]  # where neither has more of them, no rank's rounding is to decide
    of_x = swapped.long(), torch.arange(len(left), device=left.device)
    of_y = 1 - of_x[0], of_x[1]
    roots = torch.maximum(squares[of_x], 1e-12 * largest[of_x]).sqrt().unsqueeze(-2)
    root, inverse_root = ((vectors[of_x] * part) @ vectors[of_x].mT for part in (roots, 1 / roots))

    squares, vectors = torch.linalg.eigh(root @ grams[of_y] @ root)
    floor = FLOOR**2 * squares[..., -1:].clamp_min(torch.finfo(left.dtype).tiny)
    roots = torch.maximum(squares, floor).pow(0.25).unsqueeze(-2)
    fourth, inverse_fourth = ((vectors * part) @ vectors.mT for part in (roots, 1 / roots))
    changes = torch.stack([inverse_root @ fourth, root @ inverse_fourth])
    inverses = torch.stack([inverse_fourth @ root, fourth @ inverse_root])
    return changes[of_x], changes[of_y], inverses[of_x], inverses[of_y]


def unscaled_basis(basis: Tensor) -> Tensor:
    """``C @ H`` (b, r, r) from ``H`` alone: ``G @ C @ H`` are the coordinates of an *unscaled* gradient ``G``.

    ``H.T @ C @ H`` is the identity on the directions that ``T`` has.
    """
    return torch.linalg.pinv(basis).mT


def turned_weights(weights: Tensor, rotation: Tensor) -> Tensor:
    """What the weights ``S`` (b, r, r) of the second moments' average are in the coordinates that ``R`` leads to.

    Not in the paper. Adam divides ``V`` by ``1 - beta2 ** t``, the sum of its weights, since it began at zero. But a
    rotation takes from ``P`` what lies outside the new subspace, as if it had never been seen, and where the subspace
    turns the sum is far less. ``S`` goes with ``P``: it is ``P`` of a row whose full gradients are white noise of unit
    variance, ``R.T S R``, and ``beta2 S + (1 - beta2) I`` after one more gradient. Where ``R`` is orthogonal, as in the
    full-rank limit, it is ``(1 - beta2 ** t) I``.
    """
    return rotation.mT @ weights @ rotation


def bias_corrections(directions: Tensor, weights: Tensor, beta2: float) -> Tensor:
    """What ``V_ij = q_j P_i q_j^T`` is to be divided by (b, l), of rows ``q_j`` (b, l, r): ``q_j S q_j^T / |q_j|^2``.

    See :func:`turned_weights`. One where ``q_j`` is zero, and with it ``V_ij``. No less than ``LEAST_WEIGHT`` of one
    gradient's: a direction of which nothing has been seen has neither momentum nor second moment.
    """
    lengths = directions.square().sum(-1)
    kept = ((directions @ weights) * directions).sum(-1)
    part = kept / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
    return torch.where(lengths > 0, part.clamp_min(LEAST_WEIGHT * (1 - beta2)), 1.0)


def cauchy_schwarz_bound(beta1: float, beta2: float, step: int) -> float:
    """``rho`` of ``|M_ij| <= rho * sqrt(V_ij)`` after so many gradients, both before bias correction.

    Holds for any two exponential averages of the same sequence and its square: with weights ``w_s = (1 - beta1)
    beta1^s`` and ``v_s = (1 - beta2) beta2^s`` Cauchy and Schwarz give ``rho^2 = sum_s w_s^2 / v_s``, and the sequence
    ``w_s / v_s`` attains it. Rounding can break it where ``V`` is tiny, and then a division by ``eps`` would follow;
    clamping changes nothing in exact arithmetic.
    """
    ratio = beta1**2 / beta2 if beta2 else math.inf if beta1 else 0.0
    if ratio == math.inf:  # only the last gradient counts in V
        return (1 - beta1) if step == 1 else math.inf
    if ratio > 1 and step * math.log(ratio) > 100:  # nothing is left of a bound, and float32 would soon not hold it
        return math.inf
    terms = step if ratio == 1 else (1 - ratio**step) / (1 - ratio)
    return (1 - beta1) * math.sqrt(terms / (1 - beta2))


def longest_quotient(beta1: float, beta2: float, step: int) -> float:
    """What no number of AdamW's step exceeds before the learning rate, whatever the gradients were; 1 at first."""
    return cauchy_schwarz_bound(beta1, beta2, step) * math.sqrt(1 - beta2**step) / (1 - beta1**step)


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
