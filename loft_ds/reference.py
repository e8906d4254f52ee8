"""LoFT on one pair, dense, in float64 and in the paper's own coordinates: the place to learn the method.

Every matrix that the optimizer avoids is built here: inverse Gram matrices, full gradients, full second moments. There
are no ranks, no stacks and no orthonormal bases. :mod:`loft_ds.step` does the same without these matrices, and the
tests hold it against this, with each block on and off.

In the paper's terms, of ``W = W0 + s * B @ A`` the factor ``X`` (k, r) with the other one's scaled rows ``T`` (l, r)
stands for the full matrix ``X @ T.T`` (k, l), of ``B`` that is ``W`` and of ``A`` its transpose:

1. *Alternating turns*: ``B`` leads on odd steps, ``A`` on even ones.
2. *Gradient scaling*: ``g = G @ inv(T.T @ T)``, so that ``g @ T.T`` is the full gradient, projected.
3. and 4. *Calibration*: where ``T`` has become ``T'``, ``R = T.T @ T' @ inv(T'.T @ T')`` takes moments along.
5. *Projected full update*: AdamW's quotient ``U`` on the full matrix, then ``U @ T @ inv(T.T @ T)``.
6. *Clipping* by the norm of the projected full gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import algebra
from .blocks import Blocks

OTHER = {"A": "B", "B": "A"}


class Reference:
    """LoFT on one pair. Its rows ``X["A"]`` (n, r) and ``X["B"]`` (m, r) are moved by :meth:`step`.

    Args:
        A: (r, n).
        B: (m, r).
        scaling: PEFT's ``s``.
        lr: learning rate.
        betas: decay of momentum and second moment.
        eps: AdamW's.
        weight_decay: decoupled.
        max_grad_norm: see :class:`loft_ds.LoFTAdamW`.
        blocks: the switches of the method.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scaling: float,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        blocks: Blocks | None = None,
    ) -> None:
        self.s, self.lr, self.betas, self.eps, self.decay = scaling, lr, betas, eps, lr * weight_decay
        self.clip, self.blocks = max_grad_norm, blocks or Blocks()
        self.joint = self.blocks.moves_jointly(len(A))
        self.X = {"A": A.double().T.clone(), "B": B.double().clone()}
        r = len(A)
        self.T = {side: self.s * self.X[OTHER[side]] for side in self.X}  # as the state of each side has it
        self.M = {side: torch.zeros_like(X) for side, X in self.X.items()}
        self.P = {side: X.new_zeros(len(X), r, r) for side, X in self.X.items()}
        self.V = {side: torch.zeros_like(X) for side, X in self.X.items()}
        self.S = {side: X.new_zeros(r, r) for side, X in self.X.items()}  # P of a row of white noise
        self.t = 0
        self.norm = 0.0

    @property
    def change(self) -> Tensor:
        """Of ``W``: ``s * B @ A`` (m, n)."""
        return self.s * self.X["B"] @ self.X["A"].T

    def step(self, grad_A: Tensor, grad_B: Tensor) -> None:
        """One step.

        Args:
            grad_A: gradient of ``A`` (r, n).
            grad_B: gradient of ``B`` (m, r).
        """
        self.t += 1
        lead, follow = "BA" if self.t % 2 else "AB"
        moving = (lead, follow) if self.joint else (lead,)
        gradient = {"A": grad_A.double().T, "B": grad_B.double()}
        for side in "AB":
            self.calibrate(side)
        g = {side: G @ self.inverse(side) if self.blocks.gradient_scaling else G for side, G in gradient.items()}

        own = self.X[follow]
        outside = torch.eye(len(own), dtype=own.dtype) - own @ torch.linalg.pinv(own)  # of what the leading one moves
        full = {side: g[side] @ self.T[side].T for side in moving}
        if self.joint:
            full[follow] = outside @ full[follow]
        clipped = full if self.blocks.projected_clipping else gradient
        self.norm = math.sqrt(sum(float(each.square().sum()) for each in clipped.values()))
        coefficient = 1.0 if self.clip is None else min(1.0, self.clip / (self.norm + 1e-6))
        for side in "AB":
            self.accumulate(side, coefficient * g[side])

        step = self.quotient(lead)
        length = (step @ self.T[lead].T).square().sum()
        self.X[lead] = (1 - self.decay) * self.X[lead] - self.lr * step
        self.calibrate(follow)
        if self.joint:
            step = outside @ self.quotient(follow)
            step = self.within_bound(length, (step @ self.T[follow].T).square().sum()) * step
            self.X[follow] = self.X[follow] - self.lr * step
        if self.blocks.balancing:
            self.balance()

    def inverse(self, side: str) -> Tensor:
        """``inv(T.T @ T)`` (r, r), of the directions that ``T`` has."""
        return torch.linalg.pinv(self.T[side].T @ self.T[side], hermitian=True)

    def calibrate(self, side: str) -> None:
        """Blocks 3 and 4: to where the partner is now."""
        before, self.T[side] = self.T[side], self.s * self.X[OTHER[side]]
        R = before.T @ self.T[side] @ self.inverse(side)
        if self.blocks.momentum_calibration:
            self.M[side] = self.M[side] @ R
        if self.blocks.second_moment_calibration:
            self.P[side] = R.T @ self.P[side] @ R
            self.S[side] = R.T @ self.S[side] @ R

    def accumulate(self, side: str, g: Tensor) -> None:
        """One more gradient (k, r) in all averages."""
        b1, b2 = self.betas
        self.M[side] = b1 * self.M[side] + (1 - b1) * g
        self.P[side] = b2 * self.P[side] + (1 - b2) * g[:, :, None] * g[:, None, :]
        self.V[side] = b2 * self.V[side] + (1 - b2) * g**2
        self.S[side] = b2 * self.S[side] + (1 - b2) * self.inverse(side)

    def quotient(self, side: str) -> Tensor:
        """Block 5: what the factor moves by (k, r), before the learning rate."""
        (b1, b2), T, inverse = self.betas, self.T[side], self.inverse(side)
        M, P, S = self.M[side], self.P[side], self.S[side]
        first, second = 1 - b1**self.t, 1 - b2**self.t
        if not self.blocks.in_matrices:
            return (M / first) / ((self.V[side] / second).sqrt() + self.eps) @ (T.T @ T @ inverse)
        keys = T if self.blocks.projects else torch.eye(len(S), dtype=T.dtype)
        V = torch.einsum("jr,krs,js->kj", keys, P, keys).clamp_min(0)
        if self.blocks.bias_calibration:
            kept, whole = (torch.einsum("jr,rs,js->j", keys, N, keys) for N in (S, inverse))
            least = algebra.LEAST_WEIGHT * (1 - b2)
            corrections = torch.where(whole > 0, (kept / whole).clamp_min(least), 1.0)  # where T is zero V is, too
        else:
            corrections = torch.full_like(V[0], second) if len(V) else V.new_zeros(len(keys))
        U = (M @ keys.T / first) / ((V / corrections).sqrt() + self.eps)
        return U @ T @ inverse if self.blocks.projects else U @ (T.T @ T @ inverse)

    def within_bound(self, length: Tensor, other: Tensor) -> float:
        """What shortens the second move so that both, of these squared lengths, are no longer than AdamW's step."""
        if not self.blocks.bounded or other == 0:
            return 1.0
        limit = algebra.longest_quotient(*self.betas, self.t) ** 2 * len(self.X["A"]) * len(self.X["B"])
        return math.sqrt(min(1.0, max(0.0, limit - float(length)) / float(other)))

    def balance(self) -> None:
        """The same ``W`` as its shortest factors, all state in the coordinates of these."""
        grams = {side: (X.T @ X)[None] for side, X in self.X.items()}
        short = min(int(torch.linalg.matrix_rank(T, rtol=1e-7)) for T in self.T.values()) < len(self.S["A"])
        if not bool(algebra.unbalanced(grams["A"], grams["B"])) and not (short and bool(self.change.any())):
            return
        changes: Mapping[str, Tensor] = dict(
            zip("AB", (c[0] for c in algebra.balance(grams["A"], grams["B"])), strict=False)
        )
        for side in "AB":
            self.X[side] = self.X[side] @ changes[side]
            of_partner, back = changes[OTHER[side]], torch.linalg.inv(changes[OTHER[side]])
            self.T[side] = self.T[side] @ of_partner
            self.M[side] = self.M[side] @ back.T
            self.P[side], self.S[side] = (back @ each @ back.T for each in (self.P[side], self.S[side]))
