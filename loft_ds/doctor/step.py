"""Does LoFT step right: tiny adapters under the job's ZeRO stage against what one process computes alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ..optimizer import LoFTAdamW
from ..ranks import all_gather, bound_collectives, rank_and_world
from .findings import Finding, errors_of, first_line, where
from .job import stage_of

# The part of a DeepSpeed JSON that decides how LoFT's step is spread over ranks.
STEP_SETTINGS = ("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
# float32: ranks sum gradients in another order than one process does. Two steps of 1e-2 carry an error of 1e-7 on.
TOLERANCE = 1e-4


def check_step(options: argparse.Namespace, settings: dict[str, Any], nodes: Sequence[str]) -> Finding:
    """A LoFT step of each factor of tiny adapters, under the job's ZeRO stage and offloading, against one process."""
    said = None
    try:
        distance = _distance(settings, options.timeout)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        distance, said = float("inf"), first_line(error)
    distances, errors = all_gather(distance), all_gather(said)
    if any(errors):
        return Finding("LoFT step", errors_of(errors, nodes), False)
    off = [rank for rank, value in enumerate(distances) if not value <= TOLERANCE]
    found = f"ZeRO {stage_of(settings)}, float32: {max(distances):.1e} from one process's"
    return Finding("LoFT step", found + (f", on {where(off, nodes)}" if off else ""), not off)


def _distance(settings: dict[str, Any], seconds: int) -> float:
    """The relative distance of the adapters after two steps from what this process computes alone."""
    rank, world = rank_and_world()
    device = torch.device(get_accelerator().current_device_name())
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2 * world, 24, generator=generator).to(device)

    def loss_of(model: nn.Module, part: Tensor) -> Tensor:
        loss: Tensor = model(part).square().mean()
        return loss

    alone = _tiny_model().to(device)
    # eps of the size of these gradients: with 1e-8 the first step is their sign, also of those that are rounding alone.
    optimizer = LoFTAdamW(alone, lr=1e-2, eps=1e-3)
    for _ in range(2):
        loss_of(alone, data).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = _tiny_model()
    config = {key: _without_auto(settings[key]) for key in STEP_SETTINGS if key in settings}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=LoFTAdamW(model, lr=1e-2, eps=1e-3),
        config={**config, "train_micro_batch_size_per_gpu": 2},
    )
    bound_collectives(timedelta(seconds=seconds))
    for _ in range(2):
        engine.backward(loss_of(engine, data[2 * rank : 2 * rank + 2]))
        engine.step()
    squares = []
    for mine, theirs in zip(alone.parameters(), model.parameters(), strict=True):
        if mine.requires_grad:
            with deepspeed.zero.GatheredParameters([theirs], enabled=stage_of(settings) == 3):
                squares.append(
                    ((theirs.detach().to(device) - mine.detach()).square().sum(), mine.detach().square().sum())
                )
    engine.destroy()
    difference, size = (float(torch.stack(each).sum().sqrt()) for each in zip(*squares, strict=True))
    return difference / size


def _tiny_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(24, 33), nn.Tanh(), nn.Linear(33, 17))
        model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]))
        for name, param in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(param, std=0.3)
    return model


def _without_auto(section: Any) -> Any:
    """A section without the values that the Trainer fills in."""
    if not isinstance(section, dict):
        return section
    return {key: _without_auto(value) for key, value in section.items() if value != "auto"}
