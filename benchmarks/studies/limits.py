"""What no adapter can do better than: AdamW's exact steps on whole matrices, cut to a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


@dataclass
class _Matrix:
    """A matrix that trains.

    Attributes:
        param: its values.
        start: what the change counts from.
        whole: the change without any cut, where the remainder is kept.
        right: the directions (n, r) of the last cut, from which the next one begins.
    """

    param: Tensor
    start: Tensor
    whole: Tensor
    right: Tensor


class TruncatedAdamW(AdamW):
    """AdamW on whole matrices whose change is cut to rank r after every step.

    With AdamW's exact moments and the nearest matrix of that rank it tells why a rank falls short of full fine-tuning.
    All of the change cut is what an adapter of rank r can follow. Only the steps cut, and their sum of any rank, is
    what a chain of adapters can, each of which begins where the last one ended.

    Args:
        groups: parameter groups; the matrices of the first are cut.
        rank: r.
        accumulated: cut all of the change, and not each step.
        remainder_kept: offer what a cut leaves out to the next one: error feedback, by a remainder of full size.
    """

    def __init__(self, groups: list[dict[str, Any]], rank: int, accumulated: bool, remainder_kept: bool) -> None:
        super().__init__(groups, weight_decay=0.0)
        self._accumulated, self._remainder_kept = accumulated, remainder_kept
        self._matrices = [
            _Matrix(p, p.detach().clone(), torch.zeros_like(p), torch.randn(p.shape[1], rank, dtype=p.dtype))
            for p in groups[0]["params"]
            if p.dim() == 2
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """AdamW's step, then the cut."""
        before = [matrix.param.clone() for matrix in self._matrices]
        loss = super().step(closure)
        for matrix, last in zip(self._matrices, before, strict=True):
            matrix.whole += matrix.param - last
            change, matrix.right = cut(matrix.whole, matrix.right)
            matrix.param.copy_(matrix.start + change)
            if not self._accumulated:
                matrix.start.copy_(matrix.param)
                matrix.whole -= change
            if not self._remainder_kept:
                matrix.whole.copy_(change if self._accumulated else torch.zeros_like(change))
        return loss


def cut(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest matrix of a rank, and its right directions: subspace iteration, from where the last one ended."""
    for _ in range(3):
        left = torch.linalg.qr(matrix @ right)[0]
        right = matrix.T @ left
    return left @ right.T, right
