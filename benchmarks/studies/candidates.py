"""Optimizers of the studies alone: what LoFT might do besides, and what tells why it falls short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from loft_ds.adapters import find_trainable


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
