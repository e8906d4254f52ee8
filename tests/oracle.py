"""Section 3 of the LoFT paper, transcribed: dense, in float64, in the paper's own coordinates, with no thought of cost.

Every matrix that the optimizer avoids is built here: inverse Gram matrices, full gradients, full second moments.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Oracle:
    """LoFT on one pair. ``A`` (r, n) and ``B`` (m, r) are changed by :meth:`step`."""

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
        turns: str = "auto",
        gradient_scaling: bool = True,
        momentum_calibration: bool = True,
        second_moment_calibration: bool = True,
        projected_update: bool = True,
        projected_clipping: bool = True,
        bias_calibration: bool = True,
        max_step_rms: float | None = None,
        second_moment: str = "matrix",
    ) -> None:
        self.s, self.lr, self.betas, self.eps, self.wd, self.clip = scaling, lr, betas, eps, weight_decay, max_grad_norm
        self.turns, self.scale, self.turn_m, self.turn_p = (
            {"auto": "joint" if len(A) <= 16 else "alternate"}.get(turns, turns),
            gradient_scaling,
            momentum_calibration,
            second_moment_calibration,
        )
        self.project, self.project_clip, self.matrix = projected_update, projected_clipping, second_moment == "matrix"
        self.X = {"A": A.double().T.clone(), "B": B.double().clone()}
        self.T_prev: dict[str, Tensor] = {}
        self.M = {side: torch.zeros_like(X) for side, X in self.X.items()}
        r = A.shape[0]
        self.P = {side: X.new_zeros(len(X), r, r) for side, X in self.X.items()}
        self.V = {side: torch.zeros_like(X) for side, X in self.X.items()}
        self.turn_bias = bias_calibration and second_moment_calibration and gradient_scaling
        # What P of a row is whose full gradients are white noise of unit variance.
        self.S = {side: X.new_zeros(r, r) for side, X in self.X.items()}
        self.max_step_rms = max_step_rms
        self.t = 0
        self.norm = 0.0

    def step(self, grad_A: Tensor, grad_B: Tensor) -> None:
        self.t += 1
        (b1, b2), t = self.betas, self.t
        leading, following = "BA" if t % 2 else "AB"
        moving = [leading] if self.turns == "alternate" else ["A", "B"]
        G = {"A": grad_A.double().T, "B": grad_B.double()}
        T = {"A": self.s * self.X["B"], "B": self.s * self.X["A"]}
        C = {side: T[side].T @ T[side] for side in T}
        inverse = {side: torch.linalg.pinv(C[side], hermitian=True) for side in T}
        # 1. gradient scaling
        g = {side: G[side] @ inverse[side] if self.scale else G[side] for side in G}
        # Nothing of what the leading factor can move is left to the following one.
        own = self.X[following]
        outside = torch.eye(len(own), dtype=own.dtype) - own @ torch.linalg.pinv(own)
        left = {leading: torch.eye(len(self.X[leading]), dtype=own.dtype), following: outside}
        if self.turns != "joint":
            left[following] = torch.eye(len(own), dtype=own.dtype)
        # 2. clipping
        full = [left[side] @ g[side] @ T[side].T for side in moving] if self.project_clip else list(G.values())
        self.norm = float(sum(f.square().sum() for f in full).sqrt())
        if self.clip is not None:
            coefficient = min(1.0, self.clip / (self.norm + 1e-6))
            g = {side: coefficient * g[side] for side in g}
        update = {}
        for side in "AB":
            # 3. calibration
            if side in self.T_prev:
                R = self.T_prev[side].T @ T[side] @ inverse[side]
                if self.turn_m:
                    self.M[side] = self.M[side] @ R
                if self.turn_p:
                    self.P[side] = R.T @ self.P[side] @ R
                    self.S[side] = R.T @ self.S[side] @ R
            self.T_prev[side] = T[side].clone()
            # 4. accumulation
            self.M[side] = b1 * self.M[side] + (1 - b1) * g[side]
            self.P[side] = b2 * self.P[side] + (1 - b2) * g[side][:, :, None] * g[side][:, None, :]
            self.V[side] = b2 * self.V[side] + (1 - b2) * g[side] ** 2
            self.S[side] = b2 * self.S[side] + (1 - b2) * inverse[side]
            # 5. projected full update
            if not self.matrix:
                update[side] = (self.M[side] / (1 - b1**t)) / ((self.V[side] / (1 - b2**t)).sqrt() + self.eps)
            elif not self.project:
                diagonal = torch.diagonal(self.P[side], dim1=1, dim2=2).clamp_min(0)
                correction2 = self.S[side].diag() / inverse[side].diag() if self.turn_bias else 1 - b2**t
                update[side] = (self.M[side] / (1 - b1**t)) / ((diagonal / correction2).sqrt() + self.eps)
            else:
                V = torch.einsum("jr,krs,js->kj", T[side], self.P[side], T[side]).clamp_min(0)
                kept, whole = (torch.einsum("jr,rs,js->j", T[side], N, T[side]) for N in (self.S[side], inverse[side]))
                # Where T is zero V is, too.
                correction2 = torch.where(whole > 0, kept / whole, 1.0) if self.turn_bias else 1 - b2**t
                U = (self.M[side] @ T[side].T / (1 - b1**t)) / ((V / correction2).sqrt() + self.eps)
                update[side] = U @ T[side] @ inverse[side]
        lr = self.lr
        if self.max_step_rms is not None:
            whole = {side: left[side] @ update[side] @ T[side].T for side in moving}
            moved = sum(w if side == "B" else w.T for side, w in whole.items())
            lr *= float((self.max_step_rms / moved.square().mean().sqrt()).clamp(max=1.0))
        for side in moving:
            decay = 1 - self.lr * self.wd if side == leading or self.turns == "both" else 1.0
            self.X[side] = decay * self.X[side] - lr * left[side] @ update[side]
