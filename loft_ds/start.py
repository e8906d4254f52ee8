"""A start in the directions of the loss's gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adapters import find_trainable
from .factors import Factor
from .ranks import together

LENGTH = 0.2  # docs/results/quality/classification.md


def start_from_gradients(model: nn.Module, backward: Callable[[], object], length: float = LENGTH) -> None:
    """Gives new adapters the first directions of the loss's gradient, and leaves the frozen weights as they are.

    Each ``A`` spans the first r right singular directions of the weight's gradient, and each ``B`` the next r left
    ones, so that the first step has 2 r directions in reach: LoRA-GA (Wang et al., 2024, arXiv 2407.05000). That takes
    the product of both out of the frozen weights, and so its adapter is one of rank 2 r to the model on disk. Here the
    product stays in, short: an ordinary adapter of rank r. Call it before the optimizer is built, and before
    ``deepspeed.initialize``. For a while it holds the gradients of all adapted weights, in their type.

    Args:
        model: a PEFT model with new adapters on linear layers, whole on each rank. Ranks begin as the first one does.
        backward: called once; runs forward and backward of some batches.
        length: Frobenius norm of ``s * B @ A`` in each layer. A layer without a gradient keeps ``B = 0``.

    Raises:
        ValueError: adapters that are not new, or on weights that have no gradient: quantised, partitioned by stage 3,
            experts of one parameter.
        RuntimeError: no weight had a gradient, or one is not finite.
    """
    pairs = find_trainable(model).pairs
    weights = [_weight_of(*pair) for pair in pairs]
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with together():  # next come collectives
            backward()
            if all(weight.grad is None for weight in weights):
                raise RuntimeError("no adapted weight has a gradient: backward is to call loss.backward()")
            for (a, b), weight in zip(pairs, weights, strict=True):
                if weight.grad is not None:
                    _place(a, b, weight.grad, length)
                weight.grad = None
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for p in (*frozen, *trained):
            p.grad = None
    if dist.is_initialized():
        for factor in (factor for pair in pairs for factor in pair):
            dist.broadcast(factor.param.data, 0)


def _weight_of(a: Factor, b: Factor) -> Tensor:
    """The frozen weight that a pair is added to."""
    base = a.layer.get_base_layer()
    name = a.name.partition(".lora_A")[0]
    if not isinstance(base, nn.Linear | Conv1D) or not base.weight.is_floating_point() or a.experts > 1:
        raise ValueError(f"{name}: its weight has no gradient to start from, as it is quantised or no linear layer's")
    if hasattr(base.weight, "ds_id"):
        raise ValueError(f"{name}: its weight is partitioned: build the model outside of ZeRO 3's context")
    if b.param.any():
        raise ValueError(f"{b.name} is not zero: only new adapters start from gradients")
    return base.weight


@torch.no_grad()
def _place(a: Factor, b: Factor, gradient: Tensor, length: float) -> None:
    """Sets the factors of a pair by the gradient of their weight."""
    full = gradient.T if a.layer.fan_in_fan_out else gradient
    full = full.to(torch.promote_types(full.dtype, torch.float32))
    if not full.isfinite().all():
        raise RuntimeError(f"{a.name.partition('.lora_A')[0]}: the gradient of its weight is not finite")
    r, most = a.rank, min(full.shape)
    left, values, right = torch.svd_lowrank(full, q=min(4 * r, most), niter=4)
    if not values[0]:
        return
    following = slice(min(r, most - r), min(2 * r, most))  # where there are fewer than 2 r directions, the last r
    down, up, weights = right[:, :r].T, left[:, following], values[following]
    if weights[0] > torch.finfo(full.dtype).eps * max(full.shape) * values[0]:
        up = up * weights
    a.param.copy_(down)
    b.param.copy_(up * (length / float((a.scaling * up @ down).norm())))
