"""Tiny PEFT models with odd shapes, and what the tests compare of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from loft_ds import LoFTAdamW
from loft_ds.factors import Factor


def one_layer(
    m: int, n: int, rank: int, *, alpha: float = 4, dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any
) -> tuple[PeftModel, nn.Parameter, nn.Parameter, float]:
    """One linear layer with both factors random: the model, ``A`` (r, n), ``B`` (m, r) and PEFT's scaling."""
    torch.manual_seed(seed)
    model = get_peft_model(
        nn.Sequential(nn.Linear(n, m, bias=False)), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **config)
    ).to(dtype)
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(torch.randn(A.shape, dtype=torch.float64))
        B.copy_(torch.randn(B.shape, dtype=torch.float64))
    return model, A, B, layer.scaling["default"]


def conditioned(n: int, condition: float) -> Tensor:
    """A random (n, n) float64 matrix of the given condition number."""
    left, _, right = torch.linalg.svd(torch.randn(n, n, dtype=torch.float64))
    return left @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n).double()) @ right


def odd_model(dtype: torch.dtype = torch.float32, rank: int = 3, zero_b: bool = False) -> PeftModel:
    """Four adapted layers, biases and a saved module; sizes such that at rank 3 every ZeRO stage cuts a feature row in
    two on 2, 3 and 4 ranks (the tests assert that it does)."""
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 11), nn.LayerNorm(11), nn.Linear(11, 3)
    )
    config = LoraConfig(
        r=rank, lora_alpha=7, target_modules=["0", "2", "4", "6"], modules_to_save=["5"], bias="lora_only"
    )
    model = get_peft_model(base, config)
    for name, param in model.named_parameters():
        if "lora_B" in name and not zero_b:
            nn.init.normal_(param, std=0.3)
    return model.to(dtype)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """``lora_A`` apart from all else, so that every pair lies in two groups, as LoRA+ users have it."""
    params = trained(model)
    first = [p for name, p in params.items() if "lora_A" in name]
    second = [p for name, p in params.items() if "lora_A" not in name]
    return [{"params": first, "lr": 2e-3}, {"params": second, "weight_decay": 0.1}]


def batch(step: int, size: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 7, generator=generator).to(dtype), torch.randn(size, 3, generator=generator).to(dtype)


def train_alone(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    *,
    accumulation: int = 1,
    scheduler: Any = None,
) -> tuple[list[float], list[float]]:
    """Norms before clipping, of LoFT, and losses of these steps in one process without DeepSpeed."""
    dtype = next(iter(trained(model).values())).dtype
    norms, losses = [], []
    for step in steps:
        for micro in range(accumulation):
            x, y = batch(step * accumulation + micro, dtype=dtype)
            loss = (model(x) - y).square().mean()
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        norms.append(getattr(optimizer, "grad_norm", math.nan))
        losses.append(loss.item())
    return norms, losses


def moments(optimizer: LoFTAdamW) -> dict[str, dict[str, Tensor]]:
    """Momentum (k_i, r), second moment (k_i, r, r) and basis (r, r) of each factor, float64.

    Pending gradients of a resting factor are counted in. Of a factor of experts each is one of its own, ``name[e]``.
    """
    from loft_ds.algebra import unpack

    out, states = {}, optimizer.state
    for factor in optimizer.trainable.factors:
        elementwise = not optimizer.blocks.in_matrices
        for name, state in pairs_in(factor, states[factor.name]).items():
            state = {kind: t.cpu() if isinstance(t, Tensor) else t for kind, t in state.items()}
            second = state["second_moment"].double()
            second = torch.diag_embed(second) if elementwise else unpack(second)
            if "rotation" in state:
                turn = state["rotation"].to(second)
                second = turn.mT @ second @ turn
            if "pending" in state:
                _, beta2 = optimizer.defaults["betas"]
                pending = state["pending"].double()
                second = beta2 * second + (1 - beta2) * pending[:, :, None] * pending[:, None, :]
            out[name] = {
                "momentum": state["momentum"].double(),
                "second_moment": second,
                "basis": state.get(
                    "basis", torch.eye(factor.rank, dtype=torch.float64)
                ),  # none where there are no rows
                "start": torch.tensor(state["start"]),
            }
    return out


def pairs_in(factor: Factor, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The state of every pair that a factor holds."""
    if factor.experts == 1:
        return {factor.name: state}
    return {
        f"{factor.name}[{e}]": {k: v[e] if isinstance(v, Tensor) else v for k, v in state.items()}
        for e in range(factor.experts)
    }


def in_coordinates(state: dict[str, Tensor], basis: Tensor) -> dict[str, Tensor]:
    """The moments turned into the coordinates of another basis of the same rows.

    The basis is unique only up to a rotation, which this finds: for equal rows ``turn`` is orthogonal.
    """
    turn = state["basis"].T @ torch.linalg.inv(basis).T
    return {
        "momentum": state["momentum"] @ turn,
        "second_moment": turn.T @ state["second_moment"] @ turn,
        "start": state["start"],
    }


def relative(a: Tensor, b: Tensor) -> float:
    """Frobenius distance over the norm of ``b``."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


class Bomb:
    """What runs when it is unpickled."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)
