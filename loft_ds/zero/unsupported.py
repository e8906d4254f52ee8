"""What LoFT cannot treat under DeepSpeed: how it shows, and what to do instead.

One table for four readers: the check of a DeepSpeed JSON before a model is loaded
(:func:`loft_ds.zero.config.read_deepspeed_json`), of a model before a Trainer hands it to DeepSpeed
(:mod:`loft_ds.hf`), of a live engine at the first gradient (:func:`loft_ds.zero.stages.layout_of`,
:func:`loft_ds.zero.engine.find_engine`), and the pages, which hold what ``python -m loft_ds.zero.unsupported`` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import nn


@dataclass(frozen=True)
class Unsupported:
    """One thing that LoFT cannot treat.

    Attributes:
        name: what it is, as in "LoFT does not support NAME".
        remedy: what to do instead, and why where that is not plain.
        in_json: whether the settings of a DeepSpeed JSON ask for it; None where no setting does, or not alone.
        in_model: the name of what is found of it in a model; None where no model shows it.
        in_engine: whether a live engine does it; None where DeepSpeed itself refuses it before there is an engine. A
            string is a yes, and the name of what was found where that says more than ``name``.
    """

    name: str
    remedy: str
    in_json: Callable[[dict[str, Any]], bool] | None = None
    in_model: Callable[[nn.Module], str] | None = None
    in_engine: Callable[[DeepSpeedEngine], bool | str] | None = None

    def found_in_json(self, config: dict[str, Any]) -> bool:
        """Whether the settings ask for it."""
        return self.in_json is not None and self.in_json(config)

    def found_in_engine(self, engine: DeepSpeedEngine) -> bool | str:
        """Whether the engine does it, or the name of what it does."""
        return self.in_engine is not None and self.in_engine(engine)

    def refusal(self, found: bool | str = True) -> str:
        """The error's sentence, for what :meth:`found_in_json` or :meth:`found_in_engine` returned."""
        return f"LoFT does not support {found if isinstance(found, str) else self.name}: {self.remedy}"


def find_json_refusals(config: dict[str, Any], *, auto_fp16: bool = False) -> list[str]:
    """Why LoFT cannot train under a DeepSpeed JSON: all that stands against it.

    Args:
        config: the settings.
        auto_fp16: what ``"auto"`` will stand for in ``fp16.enabled``.
    """
    fp16 = _section(config, "fp16")
    if fp16.get("enabled") == "auto":
        config = {**config, "fp16": {**fp16, "enabled": auto_fp16}}
    return [row.refusal() for row in UNSUPPORTED if row.found_in_json(config)]


def find_model_refusal(model: nn.Module) -> str | None:
    """Why a model cannot be trained under DeepSpeed; None where it can.

    Args:
        model: the one that DeepSpeed will get.
    """
    rows = ((row, row.in_model(model)) for row in UNSUPPORTED if row.in_model is not None)
    return next((row.refusal(found) for row, found in rows if found), None)


def find_engine_refusal(engine: DeepSpeedEngine) -> str | None:
    """Why LoFT cannot train under a live engine; None where it can.

    Args:
        engine: the one that steps LoFT's optimizer.
    """
    return next((row.refusal(found) for row in UNSUPPORTED if (found := row.found_in_engine(engine))), None)


def format_table() -> str:
    """The table as Markdown, as it stands in docs/troubleshooting.md."""
    lines = ["| raises | seen in | what to do |", "| --- | --- | --- |"]
    for row in UNSUPPORTED:
        places = {"JSON": row.in_json, "model": row.in_model, "engine": row.in_engine}
        seen = [place for place, how in places.items() if how is not None]
        lines.append(f"| {row.name} | {', '.join(seen)} | {row.remedy} |")
    return "\n".join(lines)


# --- how it shows in a JSON


def _section(config: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        inner = config.get(name)
        config = inner if isinstance(inner, dict) else {}
    return config


def _stage(config: dict[str, Any]) -> int:
    return int(_section(config, "zero_optimization").get("stage", 0))


def _offload(config: dict[str, Any]) -> dict[str, Any]:
    return _section(config, "zero_optimization", "offload_optimizer")


def _json_tests_optimizers(config: dict[str, Any]) -> bool:
    return _stage(config) > 0 and config.get("zero_allow_untested_optimizer") is not True


def _json_asks_for_cpu_adam(config: dict[str, Any]) -> bool:
    return _offload(config).get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer") is not False


def _json_offloads_for_cpu_adam(config: dict[str, Any]) -> bool:
    offload = _offload(config)
    return _stage(config) == 3 and (offload.get("super_offload", False) or offload.get("ratio", 1) != 1)


def _json_scales_at_stage0(config: dict[str, Any]) -> bool:
    fp16 = _section(config, "fp16")
    return _stage(config) == 0 and fp16.get("enabled") is True and fp16.get("loss_scale") != 1


def _json_has_half_masters(config: dict[str, Any]) -> bool:
    return any(_section(config, kind).get(f"{kind}_master_weights_and_grads") is True for kind in ("bf16", "fp16"))


def _json_autocasts_to_float16(config: dict[str, Any]) -> bool:
    autocast = _section(config, "torch_autocast")
    # The names of DtypeEnum.fp16 (runtime/config.py).
    return autocast.get("enabled") is True and autocast.get("dtype") in ("fp16", "float16", "half", "torch.float16")


# --- how it shows in a model


def _wrapped_weights(model: nn.Module) -> str:
    from ..quantised import wrapped_weights  # which imports torch and PEFT

    return wrapped_weights(model)


# --- how it shows in an engine


def _engine_steps_cpu_adam(engine: DeepSpeedEngine) -> bool:
    # By name, so that the tests' stand-in, which compiles no extension, is found as well.
    return type(engine.basic_optimizer).__name__ == "DeepSpeedCPUAdam"


def _engine_steps_another(engine: DeepSpeedEngine) -> bool:
    from ..optimizer import LoFTAdamW  # which imports this module

    return not isinstance(engine.basic_optimizer, LoFTAdamW)


def _engine_pipelines(engine: DeepSpeedEngine) -> bool:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    return isinstance(engine, PipelineEngine)


def _engine_cuts_tensors(engine: DeepSpeedEngine) -> bool:
    if engine.autotp_size() > 1:
        return True
    # As zero/stage_1_and_2.py reads it: what Ulysses passes as mpu knows sequences and cuts no parameter.
    mpu = engine.mpu
    return (
        mpu is not None and not hasattr(mpu, "initialize_sequence_parallel") and mpu.get_model_parallel_world_size() > 1
    )


def _engine_has_half_masters(engine: DeepSpeedEngine) -> bool:
    config = engine._config
    return bool(config.bfloat16_config.bf16_master_weights_and_grads) or bool(
        config.float16_config.fp16_master_weights_and_grads
    )


def _engine_autocasts_to_float16(engine: DeepSpeedEngine) -> bool:
    scalers = engine.torch_autocast_z0_gradscaler, getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return any(scaler is not None for scaler in scalers)


def _engine_offloads_to_nvme(engine: DeepSpeedEngine) -> bool:
    # Stages 1 and 2 would keep it in CPU memory, without a word.
    offload = engine.zero_offload_optimizer()
    return offload is not None and offload.device == "nvme"


def _engine_offloads_for_cpu_adam(engine: DeepSpeedEngine) -> bool:
    offload = engine.zero_offload_optimizer()
    return (
        offload is not None and engine.zero_optimization_stage() == 3 and (offload.super_offload or offload.ratio != 1)
    )


def _engine_runs_zenflow(engine: DeepSpeedEngine) -> bool:
    # By the setting, not by the wrapper's type: at stage 3 that is the one without ZenFlow too (engine.py,
    # _configure_zero_optimizer).
    return engine.zenflow_config() is not None


def _engine_scales_at_stage0(engine: DeepSpeedEngine) -> bool:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    # engine.py, backward() scales the loss for a ZeROOptimizer only, and this wrapper, which is none, divides all the
    # same. AdamW hardly notices; a clipping norm that is too small by the loss scale never clips.
    wrapper = engine.optimizer
    unscaled = isinstance(wrapper, FP16_UnfusedOptimizer) and not isinstance(wrapper, ZeROOptimizer)
    return unscaled and wrapper.loss_scale_config.cur_scale != 1.0


def _engine_wraps_otherwise(engine: DeepSpeedEngine) -> str:
    from .stages import reader_of  # which imports this module

    return "" if reader_of(engine) is not None else f"DeepSpeed's {type(engine.optimizer).__name__}"


def _engine_has_several_groups(engine: DeepSpeedEngine) -> bool:
    from .stages import data_parallel_groups  # which imports this module

    groups = data_parallel_groups(engine.optimizer)
    return any(group is not groups[0] for group in groups)


# --- the table

CPU_ADAM = Unsupported(
    "DeepSpeedCPUAdam",
    'with offload_optimizer LoFT needs "zero_force_ds_cpu_optimizer": false, or DeepSpeedCPUAdam takes its place',
    in_json=_json_asks_for_cpu_adam,
    in_engine=_engine_steps_cpu_adam,
)

OTHER_OPTIMIZER = Unsupported(
    "another optimizer in LoFT's place",
    "Trainer(optimizers=(LoFTAdamW, ...)) is ignored under DeepSpeed; use loft_ds.LoFTTrainer or "
    'optimizer_cls_and_kwargs=(loft_ds.LoFT, {...}), leave "optimizer" out of the DeepSpeed JSON, or pass the '
    "optimizer to deepspeed.initialize",
    in_engine=_engine_steps_another,
)

UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        "another optimizer in the JSON",
        "its section 'optimizer' would train in place of LoFT; remove it (launch/train.py --optimizer lora or full may "
        "have one)",
        in_json=lambda config: "optimizer" in config,
    ),
    Unsupported(
        "ZeRO for tested optimizers alone",
        'LoFT under ZeRO needs "zero_allow_untested_optimizer": true',
        in_json=_json_tests_optimizers,
    ),
    CPU_ADAM,
    OTHER_OPTIMIZER,
    Unsupported(
        "DeepSpeed's pipeline engine",
        "use ZeRO without a PipelineModule",
        in_engine=_engine_pipelines,
    ),
    Unsupported(
        "a base model quantised by torchao or quanto",
        "DeepSpeed 0.19.8 cannot move such weights, with any optimizer; train it without DeepSpeed, or quantise by "
        "bitsandbytes or hqq",
        in_model=_wrapped_weights,
    ),
    Unsupported(
        "tensor parallelism",
        "use data parallelism alone (no mpu, tensor_parallel.autotp_size 1)",
        in_json=lambda config: _section(config, "tensor_parallel").get("autotp_size", 0) > 1,
        in_engine=_engine_cuts_tensors,
    ),
    Unsupported(
        "master weights in 16 bits",
        "it needs float32 ones; leave bf16_master_weights_and_grads and fp16_master_weights_and_grads out",
        in_json=_json_has_half_masters,
        in_engine=_engine_has_half_masters,
    ),
    Unsupported(
        "torch_autocast in float16",
        'use "fp16" or torch_autocast with bfloat16',
        in_json=_json_autocasts_to_float16,
        in_engine=_engine_autocasts_to_float16,
    ),
    Unsupported(
        'offload_optimizer.device "nvme"',
        'use "cpu": partitions that are swapped out one by one split pairs',
        in_json=lambda config: _offload(config).get("device") == "nvme",
        in_engine=_engine_offloads_to_nvme,
    ),
    Unsupported(
        "offload_optimizer.super_offload and a ratio below 1 at stage 3",
        "they are for DeepSpeedCPUAdam alone; leave them out",
        in_json=_json_offloads_for_cpu_adam,
        in_engine=_engine_offloads_for_cpu_adam,
    ),
    Unsupported(
        "ZenFlow",
        "leave 'zenflow' out",
        in_json=lambda config: _section(config, "zero_optimization").get("zenflow") is not None,
        in_engine=_engine_runs_zenflow,
    ),
    Unsupported(
        "MiCS",
        "leave 'mics_shard_size' out",
        in_json=lambda config: _section(config, "zero_optimization").get("mics_shard_size", -1) > 0,
    ),
    Unsupported(
        "fp16 at ZeRO stage 0 with a loss scale",
        "DeepSpeed divides the gradients there by a loss scale that it never multiplied the loss with "
        '(https://github.com/deepspeedai/DeepSpeed/pull/8393); use stage 1, which does both, or "bf16"',
        in_json=_json_scales_at_stage0,
        in_engine=_engine_scales_at_stage0,
    ),
    Unsupported(
        "any other wrapper of DeepSpeed's around an optimizer",
        "use ZeRO stages 0 to 3 as DeepSpeed 0.19 builds them",
        in_engine=_engine_wraps_otherwise,
    ),
    Unsupported(
        "several data-parallel groups",
        "expert parallelism partitions experts among other ranks than the rest; use one group for all parameters",
        in_engine=_engine_has_several_groups,
    ),
)


if __name__ == "__main__":
    print(format_table())
