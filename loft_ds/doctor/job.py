"""The coming job: its DeepSpeed settings, and the memory that it will need."""

from __future__ import annotations

import argparse
from typing import Any

from ..plan import GPUS, INTERCONNECTS, Job, Shapes, plan, shapes_of
from ..zero.config import SettingsError, read_deepspeed_json
from ..zero.unsupported import find_json_refusals


def read_settings(options: argparse.Namespace, world: int) -> dict[str, Any]:
    """The job's DeepSpeed settings.

    Raises:
        SettingsError: DeepSpeed does not know or accept something in them, or LoFT cannot train under them.
    """
    if options.deepspeed is None:
        return {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    settings = read_deepspeed_json(options.deepspeed, find_json_refusals)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = [settings[key] for key in keys if isinstance(settings.get(key), int)]  # not "auto"
    if len(given) == len(keys) and given[0] != given[1] * given[2] * world:
        product = " * ".join(f"{key} {number}" for key, number in zip(keys[1:], given[1:], strict=True))
        raise SettingsError(f"{options.deepspeed}: {keys[0]} {given[0]} is not {product} * {world} ranks")
    return settings


def stage_of(settings: dict[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed settings."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def needs(options: argparse.Namespace, settings: dict[str, Any], world: int) -> dict[str, float]:
    """Bytes that a rank of the coming job needs on its device and in main memory, and those of a checkpoint."""
    shapes = shapes_of(options.model)
    # Only memory is asked for, which does not depend on the kind of device.
    found = plan(shapes, job_of(options, settings, shapes, world), GPUS["H100"], INTERCONNECTS["ndr400"])
    return {"device": found.peak, "host": sum(found.on_cpu.values()), "checkpoint": found.checkpoint}


def job_of(options: argparse.Namespace, settings: dict[str, Any], shapes: Shapes, world: int) -> Job:
    """The coming job, as :mod:`loft_ds.plan` wants it described."""
    zero = settings.get("zero_optimization", {})
    offload = {
        what for what in ("optimizer", "param") if (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"
    }
    sixteen = any((settings.get(half) or {}).get("enabled") in (True, "auto") for half in ("bf16", "fp16"))

    def size(key: str, default: int, auto: int) -> int:
        value = zero.get(key, default)
        return auto if value == "auto" else int(value)

    return Job(
        rank=options.lora_rank,
        world=world,
        stage=stage_of(settings),
        precision=2 if sixteen else 4,
        second_moment=2 if options.second_moment_dtype == "bfloat16" else 4,
        offload=frozenset(offload | ({"second_moment"} if options.offload_second_moment else set())),
        tokens=options.tokens,
        # "auto" as transformers fills it in (integrations/deepspeed.py).
        reduce_bucket=size("reduce_bucket_size", Job.reduce_bucket, shapes.hidden**2),
        persistent=size("stage3_param_persistence_threshold", Job.persistent, 10 * shapes.hidden),
    )
