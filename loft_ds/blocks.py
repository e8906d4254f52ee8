"""The building blocks of the paper as switches. What each does when it is off stands here, not on the step's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import algebra

if TYPE_CHECKING:
    from .pairs import Side

# Up to this rank both factors of a pair move on every step by default: docs/results/quality/classification.md has both.
JOINT_RANK = 16


@dataclass(frozen=True)
class Blocks:
    """Which of the method's building blocks are on. The default is LoFT as this package means it.

    Attributes:
        turns: block 1 of the paper. "alternate": ``B`` moves on odd steps, ``A`` on even ones, as published. "joint":
            the factor whose turn it is moves first, then the other one by what lies outside of what the first one can
            reach. "auto": jointly up to rank ``JOINT_RANK``, alternately above.
        gradient_scaling: block 2. Off: momentum and second moment are those of the plain factor gradient.
        momentum_calibration: block 3. Off: momentum stays as it is when the other factor moves.
        second_moment_calibration: block 4. Off: the second moment stays as it is, and in the full-rank limit this is
            not AdamW.
        projected_update: block 5. Off: AdamW's quotient is taken on the factor, not on the projected full matrix.
        projected_clipping: block 6. Off: ``max_grad_norm`` bounds the norm of the plain factor gradients.
        bias_calibration: not in the paper. The second moment's bias correction follows its calibration: see
            :func:`loft_ds.algebra.turned_weights`. Off, it is Adam's ``1 - beta2 ** t``.
        balancing: not in the paper. ``B @ A`` is split anew when its factors have become longer than it needs: see
            :func:`loft_ds.algebra.balance`. ``W`` is the same without it but for rounding.
        second_moment: "matrix", one (r, r) a feature row; "elementwise", the paper's simpler variant with AdamW's own.
    """

    turns: Literal["auto", "joint", "alternate"] = "auto"
    gradient_scaling: bool = True
    momentum_calibration: bool = True
    second_moment_calibration: bool = True
    projected_update: bool = True
    projected_clipping: bool = True
    second_moment: Literal["matrix", "elementwise"] = "matrix"
    bias_calibration: bool = True  # these two depend on those above: of variants that differ the first is named
    balancing: bool = True

    def __post_init__(self) -> None:
        if self.turns not in ("auto", "joint", "alternate"):
            raise ValueError(f'turns must be "auto", "joint" or "alternate", not {self.turns!r}')
        if self.second_moment not in ("matrix", "elementwise"):
            raise ValueError(f'second_moment must be "matrix" or "elementwise", not {self.second_moment!r}')
        # It belongs to the second moment of full gradients that a turn projects, and to no other.
        turned = self.in_matrices and self.gradient_scaling and self.second_moment_calibration
        object.__setattr__(self, "bias_calibration", self.bias_calibration and turned)
        # A second moment of single numbers belongs to the columns that the factors have.
        object.__setattr__(self, "balancing", self.balancing and self.in_matrices)

    @classmethod
    def published(cls, **changes: Any) -> Blocks:
        """The method of the paper, without what this package adds to it."""
        return replace(cls(turns="alternate", bias_calibration=False, balancing=False), **changes)

    @property
    def in_matrices(self) -> bool:
        """Whether a second moment is an (r, r) matrix a feature row."""
        return self.second_moment == "matrix"

    @property
    def projects(self) -> bool:
        """Whether a step is the projection of a full one."""
        return self.projected_update and self.in_matrices

    @property
    def bounded(self) -> bool:
        """Whether no step is longer than AdamW's can be: momentum and second moment must be of the same gradients."""
        return self.projects and self.momentum_calibration == self.second_moment_calibration

    def moves_jointly(self, rank: int) -> bool:
        """Whether both factors of a pair of this rank move on every step."""
        return self.turns == "joint" or (self.turns == "auto" and rank <= JOINT_RANK)

    def state_width(self, rank: int) -> int:
        """Numbers of the second moment of a feature row."""
        return rank * (rank + 1) // 2 if self.in_matrices else rank

    def coordinates(self, basis: Tensor) -> Tensor:
        """What takes a factor's gradient (b, k, r) into the coordinates that its state is kept in (b, r, r)."""
        return basis if self.gradient_scaling else algebra.unscaled_basis(basis)

    def turned(
        self, old: Tensor, gram: Tensor, cross: Tensor, weights: Tensor, s: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The basis of ``T'``, what takes momentum and second moment there, and the second moment's weights, (b, r, r).

        All in float64. ``T`` and ``T'`` are the partner's rows as they were and are, scaled by ``s``.

        Args:
            old: the basis ``H`` of ``T``.
            gram: products of the present rows with themselves, packed (b, r(r+1)/2).
            cross: products of the rows as they were with the present ones.
            weights: ``S``: see :func:`loft_ds.algebra.turned_weights`.
            s: the scaling.
            dtype: of the rows.
        """
        new = algebra.orthonormal_basis(s**2 * algebra.unpack(gram), dtype)
        calibrated = s**2 * (old.mT @ cross @ new)
        # Without calibration the factor's own coordinates stay as they are.
        both = self.momentum_calibration and self.second_moment_calibration
        kept = calibrated if both else old.mT @ algebra.unscaled_basis(new)
        of_momentum = calibrated if self.momentum_calibration else kept
        of_second_moment = calibrated if self.second_moment_calibration else kept
        return new, of_momentum, of_second_moment, algebra.turned_weights(weights, of_second_moment)

    def clipped(
        self, sides: Sequence[Side], scaled: Sequence[Tensor], inner: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Whose norm ``max_grad_norm`` bounds: of this rank's rows, and what all ranks have alike, to be taken off.

        Args:
            sides: both factors, with their plain gradients.
            scaled: the gradients of those about to move, in orthonormal coordinates.
            inner: the part of the last one that the first one moves already (b, r, r), in orthonormal coordinates.
        """
        return (list(scaled), inner) if self.projected_clipping else ([x.gradient for x in sides], None)

    def corrections(self, x: Side, directions: Tensor, piece: slice, step: int) -> Tensor:
        """What the denominators of ``directions`` (b, l, r) are to be corrected by (b, l)."""
        if self.bias_calibration:
            return algebra.bias_corrections(directions, x.weights[piece], x.betas[1])
        return directions.new_full(directions.shape[:2], 1 - x.betas[1] ** step)

    def accumulate(self, x: Side, gradient: Tensor) -> None:
        """Take a scaled gradient (b, k, r) into momentum and, now or on the factor's next pass, into second moments."""
        beta1, beta2 = x.betas
        x.momentum.lerp_(gradient, 1 - beta1)
        if self.bias_calibration:
            x.weights = x.weights.mul(beta2)
            x.weights.diagonal(dim1=-2, dim2=-1).add_(1 - beta2)
        if self.in_matrices:
            x.pending.append(gradient)
        else:
            published = list((gradient @ x.basis.mT.to(gradient)).unbind())
            torch._foreach_mul_(x.packed, beta2)
            torch._foreach_addcmul_(x.packed, published, published, value=1 - beta2)

    def elementwise_step(self, x: Side, step: int) -> Tensor:
        """The simpler variant's step (b, k, r): AdamW's own quotient on the factor, as coordinates of the full step."""
        (beta1, beta2), momentum = x.betas, x.momentum @ x.basis.mT.to(x.momentum)
        denominator = (torch.stack(x.packed) / (1 - beta2**step)).sqrt_().add_(x.group["eps"])
        return (momentum / (1 - beta1**step) / denominator) @ algebra.unscaled_basis(x.basis).to(momentum)
