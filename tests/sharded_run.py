"""One tiny training: the loop under DeepSpeed that all tests share, and the same in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from models import batch, in_coordinates, moments, odd_model, train_alone, trained, two_groups
from torch import Tensor, nn

from loft_ds import LoFTAdamW

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


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


def start_engine(
    model: nn.Module, optimizer: Any, world: int, stage: int, *, scheduler: Any = None, **config: Any
) -> DeepSpeedEngine:
    """DeepSpeed's engine for global batches of 12 on ``world`` ranks; what ``zero_optimization`` says goes with the
    stage."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 12 // world,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
        "zero_optimization": {"stage": stage, **config.get("zero_optimization", {})},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, lr_scheduler=scheduler)
    return engine


def train_engine(
    engine: DeepSpeedEngine,
    rank: int,
    world: int,
    steps: Iterable[int],
    *,
    accumulation: int = 1,
    blow_up_at: int | None = None,
) -> tuple[list[float], list[float]]:
    """This rank's part of each step's global batch: norms and losses. In step ``blow_up_at`` rank 0's gradients
    overflow."""
    dtype = next(engine.module.parameters()).dtype
    part = slice(rank * (12 // world), (rank + 1) * (12 // world))
    norms, losses = [], []
    for step in steps:
        for micro in range(accumulation):
            x, y = (t[part].to(engine.device) for t in batch(step * accumulation + micro))
            loss = (engine(x.to(dtype)).float() - y).square().mean()
            if step == blow_up_at and rank == 0:
                loss = loss * 1e9
            engine.backward(loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        losses.append(loss.item())
    return norms, losses


def gathered(model: nn.Module, stage: int) -> dict[str, Tensor]:
    """Every trained parameter, whole and in float32; all ranks call it."""
    import deepspeed

    params = {}
    for name, p in trained(model).items():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            params[name] = p.detach().float().cpu().clone()
    return params


def train_plain(
    steps: int, *, rank: int = 3, grouped: bool = False, accumulation: int = 1, zero_b: bool = False, **kwargs: Any
) -> Outcome:
    """One process, no DeepSpeed: what every sharded run must equal."""
    model = odd_model(rank=rank, zero_b=zero_b)
    optimizer = LoFTAdamW(model, lr=1e-3, params=two_groups(model) if grouped else None, **kwargs)
    norms, losses = train_alone(model, optimizer, range(steps), accumulation=accumulation)
    params = {name: p.detach().clone() for name, p in trained(model).items()}
    return Outcome(params, moments(optimizer), norms, losses)


def train_sharded(rank: int, world: int, stage: int, steps: int, **kwargs: Any) -> Outcome:
    """The same training on ``world`` ranks."""
    return watch_sharded(rank, world, stage, (steps,), **kwargs)[0]


def watch_sharded(
    rank: int,
    world: int,
    stage: int,
    after: Sequence[int],
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
) -> list[Outcome]:
    """One training, and what it is after so many steps each."""
    from deepspeed.accelerator import get_accelerator

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if precision == "fp16":
        get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed's CPU accelerator says no, torch's kernels can
    model = odd_model(rank=lora_rank, zero_b=zero_b)
    optimizer = LoFTAdamW(model, lr=1e-3, params=two_groups(model) if grouped else None, **kwargs)
    settings: dict[str, Any] = {"zero_optimization": zero or {}, **(config or {})}
    if precision != "fp32":
        settings.setdefault(precision, {"enabled": True})
    each = {"gradient_accumulation_steps": accumulation, "gradient_clipping": clip}
    engine = start_engine(model, optimizer, world, stage, **each, **settings)
    assert next(engine.module.parameters()).dtype == dtype
    outcomes, norms, losses = [], [], []
    for first, last in itertools.pairwise([0, *after]):
        steps = range(first, last)
        found = train_engine(engine, rank, world, steps, accumulation=accumulation, blow_up_at=blow_up_at)
        norms, losses = norms + found[0], losses + found[1]
        outcomes.append(_outcome(engine, optimizer, rank, stage, norms, losses))
    engine.destroy()
    return outcomes


def _outcome(
    engine: DeepSpeedEngine, optimizer: LoFTAdamW, rank: int, stage: int, norms: list[float], losses: list[float]
) -> Outcome:
    states, stacks = optimizer.state, optimizer._runtime._stacks
    outcome = Outcome(gathered(engine.module, stage), moments(optimizer), norms, losses, engine.skipped_steps)
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
    return outcome


def assembled(outcomes: list[Outcome], name: str, kind: str, basis: Tensor) -> Tensor:
    """The whole of one factor's momentum or second moment, from every rank's rows, in the coordinates of ``basis``."""
    pieces = sorted((in_coordinates(o.state[name], basis) for o in outcomes), key=lambda piece: int(piece["start"]))
    return torch.cat([piece[kind] for piece in pieces if len(piece[kind])])
