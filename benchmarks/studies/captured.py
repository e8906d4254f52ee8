"""How much of the full gradient a pair of factors can follow, by rank, shape and step."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from loft_ds.algebra import gram, orthonormal_basis

from .tasks import Task
from .training import Changes, Run, train

STEPS = (0, 1, 10, 30, 100)


def shares(gradient: Tensor, a: Tensor, b: Tensor) -> dict[str, float]:
    """Parts of a full gradient's squared norm.

    Args:
        gradient: (m, n), of the whole weight.
        a: (r, n).
        b: (m, r).

    Returns:
        By name: what lies in reach of ``B`` alone (rows in the span of ``A``'s), of ``A`` alone (columns in that of
        ``B``'s), of both; and what the best ``A`` of this rank would let ``B`` reach (Eckart and Young).
    """
    gradient = gradient.double()  # a share may be one of 1e-4, and is one less another
    rows, columns = (span(factor) for factor in (a.T, b))
    whole = float(gradient.square().sum())
    beside_rows = gradient - (gradient @ rows) @ rows.T
    beside_both = beside_rows - columns @ (columns.T @ beside_rows)
    values = torch.linalg.svdvals(gradient)
    return {
        "B": float((gradient @ rows).square().sum()) / whole,
        "A": float((columns.T @ gradient).square().sum()) / whole,
        "both": 1 - float(beside_both.square().sum()) / whole,
        "best B": float(values[: a.shape[0]].square().sum()) / whole,
    }


def span(factor: Tensor) -> Tensor:
    """An orthonormal basis (k, r) of the columns of a factor (k, r); columns of zeros for those that it is short of."""
    factor = factor.double()
    return factor @ orthonormal_basis(gram(factor, factor)[None])[0]


def captured(run: Run, task: Task) -> list[dict[str, Any]]:
    """The mean shares over the matrices of each shape, at each of ``STEPS``, on the batch of the next step."""
    records: list[dict[str, Any]] = []

    def watch(step: int, model: nn.Module, before: Changes) -> None:
        if step not in STEPS:
            return
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        weights = [layer.get_base_layer().weight for layer in layers]
        for weight in weights:
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(task.loss(model, run.seed, step), weights)
        by_shape = defaultdict(list)
        for layer, weight, gradient in zip(layers, weights, gradients, strict=True):
            weight.requires_grad_(False)
            a, b = (factors["default"].weight.detach() for factors in (layer.lora_A, layer.lora_B))
            by_shape[tuple(weight.shape)].append(shares(gradient, a, b))
        for shape, each in by_shape.items():
            mean = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
            records.append({"step": step, "shape": list(shape), "share": mean})

    result = train(run, task, watch)
    facts = {key: value for key, value in result.items() if key != "training_losses"}
    return [{**facts, **record} for record in records]
