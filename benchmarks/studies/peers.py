"""Optimizers of adapters that LoFT is compared with and that PEFT does not have, plainly.

Each is written from its paper, on one pair of factors at a time, without weight decay. A factor is seen as its rows
``X`` (k, r), the other one as ``T`` (l, r): ``A.T`` and ``B``, or ``B`` and ``A.T``.
"""

from __future__ import annotations

from functools import partial
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


class LoRAMuon(PairOptimizer):
    """LoRA-Muon (Cesista et al., 2026, arXiv 2606.12921): Muon's step, tangent to the matrices of rank r.

    Momentum is an average of the factor's own gradients. It is whitened by the other factor's Gram matrix, its singular
    values become one, and it is whitened again. So each factor moves the weight by half the learning rate in spectral
    norm, and both move at once. The matrix sign is exact, where the paper iterates polynomials. The paper's optional
    rescaling of the factors is left out: it changes no product. PEFT's start, where ``B`` is zero, is not in the paper:
    ``A`` has no gradient then and stays, for the sign of zero is zero.
    """

    REGULARISATION = 1e-5  # of the Gram matrix's norm

    def move(self, a: Factor, b: Factor, lr: float) -> None:
        """Both factors, each by the other as it was."""
        directions = [(factor, self._direction(factor, other)) for factor, other in ((a, b), (b, a))]
        for factor, direction in directions:
            factor.rows_of(factor.param).sub_(direction, alpha=lr / 2 / factor.scaling)

    def _direction(self, factor: Factor, other: Factor) -> Tensor:
        state, gradient, fixed = self.state[factor.param], _gradient(factor), other.rows_of(other.param)
        first = state.setdefault("first", torch.zeros_like(gradient)).lerp_(gradient, 1 - BETAS[0])
        gram = fixed.mT @ fixed
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0) + self.REGULARISATION * gram.norm()
        root = vectors * torch.where(values > 0, values.rsqrt(), 0) @ vectors.mT
        return cast(Tensor, _sign(first @ root) @ root)


def _sign(matrix: Tensor) -> Tensor:
    """The matrix with its singular values set to one, those of zero excepted."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > torch.finfo(values.dtype).eps * max(matrix.shape) * values[0]
    return left * kept @ right


class PSILoRA(PairOptimizer):
    """PSI-LoRA (Almansoori et al., 2026, arXiv 2602.16456): F-LoRSum, with the square root of K-FAC's diagonal metric.

    The new factors are those of the weight after a step of the whole matrix, by one round of proximal alternating least
    squares in that metric. Momentum is kept as factors of the same rank, by the same rounds without the metric. Numbers
    are those of the authors' scripts, which solve for both factors at once; here, as in the paper, ``B`` is solved for
    with the new ``A``. Their metrics start at one, which short trainings never forget; these are corrected as Adam's
    moments are. Hooks see the layers' inputs and their outputs' gradients, and form the gradient in full size.
    """

    BETAS = 0.9, 0.99
    DAMPING = 1e-5
    PROXIMITY = 1e-2  # times the learning rate
    LEAST_PROXIMITY = 1e-5

    def __init__(self, model: nn.Module, lr: float, max_grad_norm: float = torch.inf) -> None:
        super().__init__(model, lr)
        self._max_grad_norm = max_grad_norm
        self._gradients: dict[nn.Parameter, Tensor] = {}
        for a, b in self._pairs:
            self.state[a.param].update(metric=torch.zeros_like(a.param[0]), momentum=torch.randn_like(a.param))
            self.state[b.param].update(metric=torch.zeros_like(b.param[:, 0]), momentum=torch.zeros_like(b.param))
            a.layer.register_forward_hook(partial(self._watch, a, b))

    def _watch(self, a: Factor, b: Factor, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._see, a, b, inputs[0].detach().flatten(0, -2)))

    def _see(self, a: Factor, b: Factor, inputs: Tensor, output_gradient: Tensor) -> None:
        outer = output_gradient.flatten(0, -2)  # of a mean over the rows, so each is the row's own over their number
        self._gradients[a.param] = self._gradients.get(a.param, 0) + outer.mT @ inputs
        for factor, squares in ((a, inputs.square().mean(0)), (b, len(outer) * outer.square().sum(0))):
            self.state[factor.param]["metric"].lerp_(squares, 1 - self.BETAS[1])

    def move_all(self, lr: float) -> None:
        """All pairs, once the norm of all full gradients is known."""
        norm = sum(float(gradient.square().sum()) for gradient in self._gradients.values()) ** 0.5
        self._clip = min(1.0, self._max_grad_norm / norm) if norm else 1.0
        super().move_all(lr)
        self._gradients.clear()

    def move(self, a: Factor, b: Factor, lr: float) -> None:
        """The low-rank sum of the weight and its step, then that of the momentum and the gradient."""
        states = self.state[a.param], self.state[b.param]
        proximity = max(lr * self.PROXIMITY, self.LEAST_PROXIMITY)
        down, up = (state["momentum"] for state in states)
        towards = (1 - self.BETAS[0]) * (self._clip * self._gradients[a.param] - up @ down)
        seen = 1 - self.BETAS[1] ** self._steps
        metrics = [(state["metric"] / seen + self.DAMPING).sqrt() for state in states]
        step = (up @ down + towards) / metrics[1][:, None] / metrics[0]
        new_down, new_up = low_rank_sum(a.param, a.scaling * b.param, -lr * step, proximity, metrics)
        a.param.copy_(new_down)
        b.param.copy_(new_up / a.scaling)
        for state, momentum in zip(states, low_rank_sum(down, up, towards, proximity), strict=True):
            state["momentum"] = momentum


def low_rank_sum(
    down: Tensor, up: Tensor, change: Tensor, proximity: float, metrics: list[Tensor] | None = None, rounds: int = 1
) -> tuple[Tensor, Tensor]:
    """LoRSum: factors of ``up @ down + change`` as near as their rank allows, and near to the given ones.

    Args:
        down: (r, n).
        up: (m, r).
        change: (m, n).
        proximity: the weight of the squared distance to the given factors in each least-squares problem.
        metrics: the weights of columns (n,) and of rows (m,) in the distance of the products; None for ones.
        rounds: of least squares, first for ``down`` and then for ``up`` with the ``down`` just found.
    """
    of_columns, of_rows = metrics or (torch.ones_like(down[0]), torch.ones_like(up[:, 0]))
    proximal = proximity * torch.eye(len(down), dtype=down.dtype)
    new_down, new_up = down, up
    for _ in range(rounds):
        # Solved for the differences, which are small beside the factors.
        weighted = of_rows * new_up.mT
        missing = change - (new_up - up) @ down
        new_down = down + torch.linalg.solve(weighted @ new_up + proximal, weighted @ missing)
        weighted = of_columns * new_down
        missing = change - up @ (new_down - down)
        new_up = up + torch.linalg.solve(weighted @ new_down.mT + proximal, weighted @ missing.mT).mT
    return new_down, new_up


class ScaLoRA(PairOptimizer):
    """ScaLoRA (Zhang et al., ICML 2026, arXiv 2510.23818): before each of Adam's steps the adapter starts anew, scaled.

    Columns are scaled so that a step of gradient descent comes nearest to the whole matrix's, and the frozen weight
    takes what the product loses. A factor's gradient scales with the other factor's columns, and so do its moments. The
    factors' lengths go with ``1 / sqrt(L lr)``, where ``L`` is a number that the paper searches for. Here ``L lr`` is
    what leaves ``A`` as long as PEFT starts it, and only the learning rate is searched for. Nothing is scaled while a
    column is zero, as at PEFT's start, nor where neither form of scaling has its optimum inside.
    """

    # L times the learning rate and PEFT's scaling squared; PEFT draws the rows of A with a mean square length of 1 / 3.
    REACH = 3.0

    def move(self, a: Factor, b: Factor, lr: float) -> None:
        """Adam on the factors, scaled anew."""
        self._restart(a, b)
        for factor in (a, b):
            factor.param.sub_(_adam(self.state[factor.param], cast(Tensor, factor.param.grad), self._steps), alpha=lr)

    def _restart(self, a: Factor, b: Factor) -> None:
        scales = best_scales(b.rows_of(b.param), a.rows_of(a.param), _gradient(b), _gradient(a), self.REACH)
        if scales is None:
            return
        own = dict(zip((b, a), scales, strict=True))
        weight = cast(Tensor, a.layer.get_base_layer().weight)
        weight.add_(a.layer.get_delta_weight(a.adapter))
        for factor, other in ((a, b), (b, a)):
            factor.rows_of(factor.param).mul_(own[factor])
            _gradient(factor).mul_(own[other])
            for moment, power in (("first", 1), ("second", 2)):
                if moment in self.state[factor.param]:
                    factor.rows_of(self.state[factor.param][moment]).mul_(own[other] ** power)
        weight.sub_(a.layer.get_delta_weight(a.adapter))


def best_scales(
    left: Tensor, right: Tensor, to_left: Tensor, to_right: Tensor, reach: float
) -> tuple[Tensor, Tensor] | None:
    """The scales ``p`` and ``q`` of columns that minimise ``|G / reach - (left p^2 left^T G + G right q^2 right^T)|``.

    A single scale for each factor where a column would get a negative square, and None where that does not help.

    Args:
        left: a factor's columns (m, r).
        right: the other's (n, r).
        to_left: its gradient ``G @ right``, of any scale.
        to_right: the other's ``G.T @ left``, of the same scale.
        reach: see above.
    """
    rank, dtype = left.shape[1], left.dtype
    left, right, to_left, to_right = (t.double() for t in (left, right, to_left, to_right))
    lengths = torch.cat([left.norm(dim=0), right.norm(dim=0)])
    if not lengths.min() > 0:
        return None
    # By columns of length one, for the factors are of lengths that differ by orders. Each spans one matrix, the outer
    # product of its two parts here, and the products of those matrices are products of r x r matrices.
    first, second = torch.cat([left, to_left], 1) / lengths, torch.cat([to_right, right], 1) / lengths
    products = (first.mT @ first) * (second.mT @ second)
    aims = torch.cat([second[:, :rank].square().sum(0), first[:, rank:].square().sum(0)])
    both = torch.block_diag(*lengths.square()[:, None].split(rank))
    for choice in (torch.eye(2 * rank, dtype=torch.float64), both):
        # The smallest solution of a singular system.
        squares = choice @ torch.linalg.pinv(choice.mT @ products @ choice, hermitian=True) @ choice.mT @ aims
        if squares.min() > 0:
            scales = (squares / reach).sqrt() / lengths
            return scales[:rank].to(dtype), scales[rank:].to(dtype)
    return None
