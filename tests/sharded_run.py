"""What the ranks run: one tiny training under DeepSpeed, and the same in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from models import batch, in_coordinates, moments, odd_model, trained, two_groups
from torch import Tensor

from loft_ds import LoFTAdamW


@dataclass
class Outcome:
    """What a run ends with, on one rank."""

    params: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    norms: list[float]
    losses: list[float]
    skipped: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    cuts: list[str] = field(default_factory=list)  # factors with a boundary inside a feature row
    empty: list[str] = field(default_factory=list)  # factors this rank owns no row of
    holds_gradients: bool = False  # between steps
    elements: dict[str, int] = field(default_factory=dict)  # of the state, by kind


def train_plain(
    steps: int, *, rank: int = 3, grouped: bool = False, accumulation: int = 1, zero_b: bool = False, **kwargs: Any
) -> Outcome:
    """One process, no DeepSpeed: what every sharded run must equal."""
    model = odd_model(rank=rank, zero_b=zero_b)
    optimizer = LoFTAdamW(model, lr=1e-3, params=two_groups(model) if grouped else None, **kwargs)
    norms, losses = [], []
    for step in range(steps):
        for micro in range(accumulation):
            x, y = batch(step * accumulation + micro)
            loss = (model(x) - y).square().mean()
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.grad_norm)
        losses.append(loss.item())
    params = {name: p.detach().clone() for name, p in trained(model).items()}
    return Outcome(params, moments(optimizer), norms, losses)


def train_sharded(
    rank: int,
    world: int,
    stage: int,
    steps: int,
    *,
    lora_rank: int = 3,
    grouped: bool = False,
    precision: str = "fp32",
    accumulation: int = 1,
    clip: float = 0.0,
    zero: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    blow_up_at: int | None = None,
    zero_b: bool = False,
    **kwargs: Any,
) -> Outcome:
    """The same training on ``world`` ranks. In step ``blow_up_at`` rank 0's gradients overflow."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if precision == "fp16":
        get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed's CPU accelerator says no, torch's kernels can
    model = odd_model(rank=lora_rank, zero_b=zero_b)
    optimizer = LoFTAdamW(model, lr=1e-3, params=two_groups(model) if grouped else None, **kwargs)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 12 // world,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **(config or {}),
    }
    if precision != "fp32":
        settings.setdefault(precision, {"enabled": True})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    part = slice(rank * (12 // world), (rank + 1) * (12 // world))
    norms, losses = [], []
    for step in range(steps):
        for micro in range(accumulation):
            x, y = (t[part].to(engine.device) for t in batch(step * accumulation + micro))
            loss = (engine(x.to(dtype)).float() - y).square().mean()
            if step == blow_up_at and rank == 0:
                loss = loss * 1e9
            engine.backward(loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        losses.append(loss.item())
    params = {}
    for name, p in trained(model).items():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            params[name] = p.detach().float().cpu().clone()
    outcome = Outcome(params, moments(optimizer), norms, losses, engine.skipped_steps)
    states, stacks = optimizer.state, optimizer._runtime._stacks
    outcome.holds_gradients = any(side.home for stack in stacks for side in stack.sides)
    outcome.steps = {f.name: states[f.name]["step"] for f in optimizer.trainable.factors}
    for factor, partition in getattr(optimizer.attach(), "_partitions", {}).items():
        inside = [int(b) % factor.rank for b in partition.held.edges if 0 < b < factor.numel]
        if any(inside):
            outcome.cuts.append(factor.name)
        if partition.owned.length(rank) == 0:
            outcome.empty.append(factor.name)
    for factor in optimizer.trainable.factors:
        for kind in ("momentum", "second_moment"):
            size = states[factor.name][kind].numel()
            outcome.elements[kind] = outcome.elements.get(kind, 0) + size
    engine.destroy()
    return outcome


def assembled(outcomes: list[Outcome], name: str, kind: str, basis: Tensor) -> Tensor:
    """The whole of one factor's momentum or second moment, from every rank's rows, in the coordinates of ``basis``."""
    pieces = sorted((in_coordinates(o.state[name], basis) for o in outcomes), key=lambda piece: int(piece["start"]))
    return torch.cat([piece[kind] for piece in pieces if len(piece[kind])])
