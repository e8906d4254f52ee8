"""Optimizers of adapters that LoFT is compared with and that PEFT does not have, plainly.

Each is written from its paper, on one pair of factors at a time, without weight decay. A factor is seen as its rows
``X`` (k, r), the other one as ``T`` (l, r): ``A.T`` and ``B``, or ``B`` and ``A.T``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loft_ds.adapters import find_trainable
from loft_ds.factors import Factor

BETAS = 0.9, 0.999
EPS = 1e-8


class PairOptimizer(Optimizer):
    """An optimizer that moves the factor pairs of a PEFT model, each by :meth:`move`. It takes no closure."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self._pairs = find_trainable(model).pairs
        super().__init__([factor.param for pair in self._pairs for factor in pair], {"lr": lr})
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every pair."""
        self._steps += 1
        self.move_all(self.param_groups[0]["lr"])

    def move_all(self, lr: float) -> None:
        """Move every pair in place by its gradients, one after the other."""
        for a, b in self._pairs:
            self.move(a, b, lr)

    def move(self, a: Factor, b: Factor, lr: float) -> None:
        """Move one pair."""
        raise NotImplementedError


def _gradient(factor: Factor) -> Tensor:
    return factor.rows_of(cast(Tensor, factor.param.grad))


def _adam(state: dict[str, Tensor], gradient: Tensor, step: int) -> Tensor:
    """Adam's direction; its moments ``first`` and ``second`` take the gradient in."""
    for moment in ("first", "second"):
        state.setdefault(moment, torch.zeros_like(gradient))
    state["first"].lerp_(gradient, 1 - BETAS[0])
    state["second"].lerp_(gradient.square(), 1 - BETAS[1])
    denominator = (state["second"] / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
    return state["first"] / (1 - BETAS[0] ** step) / denominator


class LoRAPro(PairOptimizer):
    """LoRA-Pro (Wang et al., ICLR 2025, arXiv 2407.18242), with Adam's moments of the whole matrix.

    The part of the full gradient that both factors can reach goes into moments of the matrix's size, and Adam's
    direction is brought back to the factors; of all moves that change ``B A`` alike, that nearest to the factors' own
    gradients. Its memory is full fine-tuning's, and so are its learning rates.
    """

    def move(self, a: Factor, b: Factor, lr: float) -> None:
        """The equivalent gradient, Adam on it, and of that direction the moves of both factors."""
        down, up, scaling = a.param, b.param, a.scaling
        of_down, of_up = torch.linalg.pinv(up), torch.linalg.pinv(down)  # (r, m), (n, r)
        left = of_down.mT @ down.grad
        right = (up.grad - up @ (of_down @ up.grad)) @ of_up.mT
        direction = _adam(self.state[down], (left + right) / scaling, self._steps)
        to_down, to_up = of_down @ direction / scaling, direction @ of_up / scaling
        to_up -= up @ (of_down @ to_up)
        free = _sylvester(up.mT @ up, down @ down.mT, -to_down @ down.mT)
        step_down, step_up = to_down + free @ down, to_up - up @ free
        down.sub_(step_down, alpha=lr)
        up.sub_(step_up, alpha=lr)


def _sylvester(left: Tensor, right: Tensor, value: Tensor) -> Tensor:
    """``X`` of ``left X + X right = value``, both positive semidefinite and one of them definite."""
    (x, u), (y, w) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    return u @ ((u.mT @ value @ w) / (x[:, None] + y)) @ w.mT


class AltLoRAPlus(PairOptimizer):
    """AltLoRA+ (Yu et al., NeurIPS 2025, arXiv 2505.12455): scaled gradients, momentum aligned with the other factor.

    As in the authors' code both factors move on every step, ``A`` first and ``B`` by the ``A`` that has moved. The
    second moment is of the factor's own numbers and is not turned. Other than there, momentum is kept as it was
    aligned, which is the paper's, and both bias corrections are Adam's.
    """

    REGULARISATION = 1e-6

    def move(self, a: Factor, b: Factor, lr: float) -> None:
        """One factor after the other."""
        for factor, other in ((a, b), (b, a)):
            rows, fixed = factor.rows_of(factor.param), other.rows_of(other.param)
            state = self.state[factor.param]
            identity = torch.eye(fixed.shape[1], dtype=fixed.dtype)
            inverse = torch.linalg.inv(fixed.mT @ fixed + self.REGULARISATION * identity)
            if state:
                state["first"] = state["first"] @ (state["fixed"].mT @ fixed @ inverse)
            state["fixed"] = fixed.clone()
            rows.sub_(_adam(state, _gradient(factor) @ inverse, self._steps), alpha=lr)


class LoRARITE(PairOptimizer):
    """LoRA-RITE (Yen et al., ICLR 2025, arXiv 2410.20625): r x r second moments in the other factor's own basis.

    The same for every pair with the same product ``B A``. It clips by the norm of its "unmagnified" gradients, as the
    authors' code does; what has escaped from a basis is kept, as in the paper, which that code leaves out by default.
    """

    EPS = 1e-6

    def __init__(self, model: nn.Module, lr: float, max_grad_norm: float = torch.inf) -> None:
        super().__init__(model, lr)
        self._max_grad_norm = max_grad_norm

    def move_all(self, lr: float) -> None:
        """Both factors of all pairs, each by the other as it was, once the norm of all gradients is known."""
        seen = [self._see(*pair) for a, b in self._pairs for pair in ((a, b), (b, a))]
        norm = sum(float(gradient.square().sum()) for *_, gradient in seen) ** 0.5
        clip = min(1.0, self._max_grad_norm / norm) if norm else 1.0
        for factor, basis, inverse, gradient in seen:
            factor.rows_of(factor.param).sub_(self._step(factor, basis, inverse, clip * gradient), alpha=lr)

    @staticmethod
    def _see(factor: Factor, other: Factor) -> tuple[Factor, Tensor, Tensor, Tensor]:
        """A factor, the other's basis (l, r) and inverse magnitude (r, r), and the "unmagnified" gradient (k, r)."""
        basis, magnitude = torch.linalg.qr(other.rows_of(other.param))
        inverse = torch.linalg.pinv(magnitude)
        return factor, basis, inverse, _gradient(factor) @ inverse

    def _step(self, factor: Factor, basis: Tensor, inverse: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[factor.param]
        if not state:
            rank = basis.shape[1]
            state.update(first=torch.zeros_like(gradient), second=basis.new_zeros(rank, rank), basis=basis)
            state["escaped"] = basis.new_zeros(())
        turn = basis.mT @ state["basis"]
        turned = turn @ state["second"] @ turn.mT
        lost = torch.linalg.eigvalsh(state["second"]) - torch.linalg.eigvalsh(turned)
        escaped = torch.minimum(lost.max(), lost.sum()).clamp_min(0)
        decay1, decay2 = (beta * (1 - beta ** (self._steps - 1)) / (1 - beta**self._steps) for beta in BETAS)
        state["second"] = decay2 * turned + (1 - decay2) * (gradient.mT @ gradient) / len(gradient)
        state["escaped"] = decay2 * (state["escaped"] + escaped)
        values, vectors = torch.linalg.eigh(state["second"])
        lengths = 1 / ((values.clamp_min(0) + state["escaped"]).sqrt() + self.EPS)
        normal = gradient @ (vectors * lengths) @ vectors.mT
        state["first"] = decay1 * state["first"] @ turn.mT + (1 - decay1) * normal
        state["basis"] = basis
        return state["first"] @ inverse.mT
