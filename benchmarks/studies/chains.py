"""Chained pairs: every few steps the pair is frozen into its weight, and a new one starts from the present gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loft_ds import LoFTAdamW


class ChainedLoFT(LoFTAdamW):
    """LoFT whose pairs begin anew every few steps; n of them in turn are one adapter of rank n r.

    ``A`` takes the first directions of the weight's gradient at its old length, and ``B`` is zero. Moments turn to the
    new pair as they do to factors that have moved. It holds whole gradients, and so shows what a sketch could at most.

    Args:
        model: a PEFT model.
        every: steps of a pair.
        settings: of :class:`loft_ds.LoFTAdamW`.
    """

    def __init__(self, model: nn.Module, every: int, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._every, self._steps = every, 0
        self._weights = [a.layer.get_base_layer().weight for a, _ in self.trainable.pairs]
        for weight in self._weights:
            weight.requires_grad_(True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step; before it, where a pair ends, the next one takes its place."""
        if self._steps and not self._steps % self._every:
            self._keep_rows()
            for (a, b), weight in zip(self.trainable.pairs, self._weights, strict=True):
                gradient = weight.grad
                weight += a.scaling * b.param @ a.param
                _, _, right = torch.svd_lowrank(gradient, q=min(4 * a.rank + 2, *gradient.shape), niter=4)
                a.param.copy_(right[:, : a.rank].T * (a.param.norm() / a.rank**0.5))
                b.param.zero_()
                b.param.grad = a.scaling * gradient @ a.param.T
                a.param.grad = torch.zeros_like(a.param)
        self._steps += 1
        for weight in self._weights:
            weight.grad = None
        return super().step(closure)

    def _keep_rows(self) -> None:
        """The rows that the moments' coordinates belong to, as if the factors had moved from there."""
        for stack in self._runtime._stacks:
            for side in stack.sides:
                if side.before is None:
                    side.before = torch.stack([f.rows_of(f.param.detach()) for f in side.factors])
