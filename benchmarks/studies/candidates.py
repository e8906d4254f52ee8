"""Optimizers of the studies alone: what LoFT might do besides, and what tells why it falls short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from loft_ds import LoFTAdamW
from loft_ds.adapters import find_trainable
from loft_ds.algebra import gram


class TrustRegionLoFT(LoFTAdamW):
    """LoFT in a trust region of weight space: no step of a matrix is longer than ``RADIUS * lr`` of the matrix itself.

    A longer one is taken back on the line between the factors before and after it. The radius falls with the learning
    rate, so that a sweep of rates is one of radii too.
    """

    RADIUS = 10.0  # a step of 3e-3 of the matrix at a rate of 3e-4

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """LoFT's step, shortened where it leaves the region."""
        before = {factor: factor.param.clone() for factor in self.trainable.factors}
        loss = super().step(closure)
        lr = self.param_groups[0]["lr"]
        for a, b in self.trainable.pairs:
            # s (B1 A1 - B0 A0) as one product of (m, 2 r) and (2 r, n): its norm from two Gram matrices.
            left, right = torch.cat([b.param, -before[b]], dim=1), torch.cat([a.param, before[a]]).T
            square = (gram(left, left) * gram(right, right)).sum().clamp_min(0)
            length = a.scaling * float(square) ** 0.5
            radius = self.RADIUS * lr * float(a.layer.get_base_layer().weight.norm())
            if length > radius:
                for factor in (a, b):
                    factor.param.copy_(before[factor].lerp(factor.param, radius / length))
        return loss


class LateLoFT(LoFTAdamW):
    """LoFT that only gathers its moments in the first ``HOLD`` steps, and moves the adapters after them."""

    HOLD = 10

    def step(self, closure: Any = None) -> Any:
        """LoFT's step, of no length at first; the head, which is no part of what is compared, moves from the start."""
        adapters, self._taken = self.param_groups[0], getattr(self, "_taken", 0) + 1
        lr = adapters["lr"]
        adapters["lr"] = lr if self._taken > self.HOLD else 0.0
        loss = super().step(closure)
        adapters["lr"] = lr
        return loss


class ClippedAdamW(AdamW):
    """AdamW on whole matrices whose steps are bounded as LoFT's are by ``max_step_rms``."""

    def __init__(self, groups: list[dict[str, Any]], rms: float) -> None:
        super().__init__(groups, weight_decay=0.0)
        self._rms = rms

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """AdamW's step, shortened where it is longer."""
        moved = [(group["lr"], p, p.clone()) for group in self.param_groups for p in group["params"]]
        loss = super().step(closure)
        for lr, p, before in moved:
            rms = float((p - before).square().mean().sqrt())
            if rms > self._rms * lr:
                p.copy_(before.lerp(p, self._rms * lr / rms))
        return loss


class TruncatedAdamW(AdamW):
    """AdamW on whole matrices whose change is cut to rank r after every step: all of it, or only the step's.

    With AdamW's exact moments and the nearest matrix of that rank it tells why a rank falls short of full fine-tuning.
    All of the change cut is what an adapter could follow at best; only the step cut, and the change of any rank, tells
    the adapter's rank from the number of directions that one step moves in.
    """

    def __init__(self, groups: list[dict[str, Any]], rank: int, accumulated: bool) -> None:
        super().__init__(groups, weight_decay=0.0)
        self._accumulated = accumulated
        matrices = [p for p in groups[0]["params"] if p.dim() == 2]
        self._matrices = [[p, p.detach().clone(), torch.randn(p.shape[1], rank)] for p in matrices]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """AdamW's step, then the truncation."""
        loss = super().step(closure)
        for entry in self._matrices:
            p, start, right = entry
            change = p - start
            for _ in range(3):  # subspace iteration, from where the last step left it
                left = torch.linalg.qr(change @ right)[0]
                right = change.T @ left
            p.copy_(start + left @ right.T)
            entry[2] = right
            if not self._accumulated:
                start.copy_(p)
        return loss


def aim(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Turn ``A`` to the leading right singular vectors of the loss's gradient ``G`` by the gradients of factors alone.

    With ``B = 0`` the gradient of ``B`` is ``s G A^T``, with ``A = 0`` that of ``A`` is ``s B^T G``: a step of
    subspace iteration, in which the weights never change and no matrix of their size is built.
    """
    pairs = find_trainable(model).pairs
    of_b = torch.autograd.grad(loss(), [b.param for _, b in pairs])
    with torch.no_grad():
        for (a, b), gradient in zip(pairs, of_b, strict=True):
            b.param.copy_(torch.linalg.qr(gradient)[0])
            a.param.zero_()
    of_a = torch.autograd.grad(loss(), [a.param for a, _ in pairs])
    with torch.no_grad():
        for (a, b), gradient in zip(pairs, of_a, strict=True):
            a.param.copy_(torch.linalg.qr(gradient.T)[0].T)
            b.param.zero_()
