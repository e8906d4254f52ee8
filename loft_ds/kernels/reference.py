"""The two passes over the second moment, written as in the paper. Slow, dense, obviously right.

The second moment of a factor is one symmetric (r, r) matrix a feature row, kept as its upper triangle
in the order of ``torch.triu_indices(r, r)``: (k, r * (r + 1) / 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..algebra import pack, unpack

Precision = Literal["ieee", "tf32", "bf16"]


@dataclass(frozen=True)
class Quotient:
    """AdamW's quotient ``M / correction1 / (sqrt(V / correction2) + eps)`` in one step.

    Attributes:
        correction1: the weights that momentum's average is short of one: ``1 - beta1 ** t``.
        correction2: the same of the second moment, for each row of the basis: (b, l), or (l,) of one pair. See
            :func:`loft_ds.algebra.bias_corrections`.
        eps: AdamW's.
        bound: of ``|M|`` against ``sqrt(V)``, :func:`loft_ds.algebra.cauchy_schwarz_bound`.
        precision: the least that the products for ``V`` may have, as torch names them: "ieee", "tf32" or "bf16". What
            the hardware cannot do is done in full.
    """

    correction1: float
    correction2: Tensor
    eps: float
    bound: float
    precision: Precision = "ieee"

    def keys_and_values(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Two scalings of the basis (b, l, r) that carry both corrections, so that no pass over (k, l) numbers does.

        With keys ``q_j / c_j`` and values ``q_j c_j / correction1``, ``c = sqrt(correction2)``, and ``M`` and ``V``
        made of the keys, the quotient is ``M / (sqrt(V) + eps)``, clamped to ``bound``, and what it is multiplied with
        are the values.
        """
        root = self.correction2.sqrt().unsqueeze(-1)
        return basis / root, basis * (root / self.correction1)


def accumulate_second_moment_(
    packed: Tensor, gradient: Tensor, beta2: float, *, pending: Tensor | None = None, rotation: Tensor | None = None
) -> None:
    """``P <- R.T P R`` where a ``rotation`` R is given, ``P <- b2 P + (1-b2) h h.T`` where a ``pending`` h is, then
    ``P <- b2 P + (1-b2) g g.T``, for every row, in place.

    Args:
        packed: second moments (k, r(r+1)/2).
        gradient: this step's scaled gradient (k, r), in this step's coordinates.
        beta2: decay.
        pending: scaled gradient (k, r) of the resting step before, in this step's coordinates too.
        rotation: (r, r), from the coordinates before to this step's; None where they are the same.
    """
    full = unpack(packed)
    if rotation is not None:
        full = rotation.T @ full @ rotation
    if pending is not None:
        full = beta2 * full + (1 - beta2) * pending[:, :, None] * pending[:, None, :]
    full = beta2 * full + (1 - beta2) * gradient[:, :, None] * gradient[:, None, :]
    packed.copy_(pack(full))


def normalized_update(
    momentum: Tensor,
    packed: Tensor,
    basis: Tensor,
    quotient: Quotient,
) -> Tensor:
    """AdamW's step on the full matrix, ``U`` (k, l), before the learning rate.

    ``U_ij = M_ij / correction1 / (sqrt(V_ij / correction2_j) + eps)`` with ``M = momentum @ basis.T``,
    ``V_ij = q_j P_i q_j.T`` and ``|M_ij|`` clamped to ``bound * sqrt(V_ij)``.

    Args:
        momentum: (k, r).
        packed: second moments (k, r(r+1)/2).
        basis: rows ``q_j`` (l, r).
        quotient: this step's corrections, eps and bound.
    """
    full = unpack(packed)
    second = torch.einsum("jr,krs,js->kj", basis, full, basis).clamp_min_(0).sqrt_()
    first = momentum @ basis.T
    if quotient.bound != math.inf:
        first = torch.minimum(torch.maximum(first, -quotient.bound * second), quotient.bound * second)
    return (first / quotient.correction1) / (second / quotient.correction2.sqrt() + quotient.eps)


def projected_update(
    momentum: Tensor,
    packed: Tensor,
    basis: Tensor,
    quotient: Quotient,
) -> Tensor:
    """``U @ basis`` (k, r): :func:`normalized_update` projected onto the rows' coordinates."""
    return normalized_update(momentum, packed, basis, quotient) @ basis
