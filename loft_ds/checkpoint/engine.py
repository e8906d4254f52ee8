"""Whom a checkpoint is of: the optimizer, its layout, and what a DeepSpeed engine counts beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..optimizer import LoFTAdamW
from ..sharding import Layout

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


def attached(target: DeepSpeedEngine | LoFTAdamW) -> tuple[LoFTAdamW, Layout, DeepSpeedEngine | None]:
    """The optimizer of an engine, or the optimizer itself, with its layout.

    Raises:
        TypeError: the engine trains with another optimizer.
        RuntimeError: the engine is still being built.
    """
    engine = None if isinstance(target, LoFTAdamW) else target
    optimizer = target if isinstance(target, LoFTAdamW) else target.basic_optimizer
    if not isinstance(optimizer, LoFTAdamW):
        raise TypeError(f"the engine trains with {type(optimizer).__name__}, not with LoFTAdamW")
    layout = optimizer.attach()
    if layout is None:
        raise RuntimeError("LoFTAdamW has no parameters yet: deepspeed.initialize has not ended")
    return optimizer, layout, engine


def engine_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Counters, scheduler and loss scale, as JSON takes them."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scheduler = engine.lr_scheduler
    return {
        "counters": {key: getattr(engine, key) for key in COUNTERS},
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "loss_scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler else None,
    }


def restore_engine(engine: DeepSpeedEngine, saved: dict[str, Any]) -> None:
    """Set an engine to what :func:`engine_state` gave, as far as both have it."""
    for key, value in saved["counters"].items():
        setattr(engine, key, value)
    if engine.lr_scheduler is not None and saved["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(saved["scheduler"])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and saved["loss_scaler"] is not None:
        vars(scaler).update({k: v for k, v in saved["loss_scaler"].items() if k in vars(scaler)})
