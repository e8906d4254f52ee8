"""Read each ZeRO stage's layout from an unpatched DeepSpeed engine, and take its clipping over.

Checked against DeepSpeed 0.19. Dispatch is on exact types: a subclass (MiCS, ZenFlow, SuperOffload) may partition in
another way and is refused, never guessed at.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..factors import Trainable, shape_of
from .exchange import even_cut
from .layout import Layout, Whole
from .sharded import Held, Sharded

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch.optim import Optimizer


def _engines() -> list[DeepSpeedEngine]:
    """The live engines of this process. DeepSpeed keeps no registry and gives its optimizer no way back to it."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed import DeepSpeedEngine

    # By type(), not isinstance: proxies among the tracked objects answer __class__ with an exception.
    engines = [o for o in gc.get_objects() if issubclass(type(o), DeepSpeedEngine)]
    return [e for e in engines if getattr(e, "basic_optimizer", None) is not None]  # others only evaluate


def find_engine(optimizer: Optimizer | None, trainable: Trainable) -> DeepSpeedEngine | None:
    """The engine that steps ``optimizer``; None without DeepSpeed.

    Raises:
        RuntimeError: an engine trains these parameters with an optimizer that is not LoFT. (One with another LoFTAdamW
            is an earlier run's, still referenced: that optimizer no longer gets any gradient.)
    """
    engines = _engines()
    for engine in engines:
        if engine.basic_optimizer is optimizer:
            return engine
    ours = {id(f.param) for f in trainable.factors}
    for engine in engines:
        used = type(engine.basic_optimizer).__name__
        if used == "LoFTAdamW" or not any(id(p) in ours for p in engine.module.parameters()):
            continue
        if used == "DeepSpeedCPUAdam":
            remedy = (
                'With offload_optimizer set "zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON: without it '
                "Accelerate puts DeepSpeedCPUAdam in LoFT's place."
            )
        else:
            remedy = (
                "Trainer(optimizers=(LoFTAdamW, ...)) is ignored under DeepSpeed: use loft_ds.LoFTTrainer or "
                'optimizer_cls_and_kwargs=(loft_ds.LoFT, {...}), leave "optimizer" out of the DeepSpeed JSON, or pass '
                "the optimizer to deepspeed.initialize."
            )
        raise RuntimeError(f"LoFTAdamW was swapped out: DeepSpeed trains these parameters with {used}. {remedy}")
    return None


def _refuse(what: str, remedy: str) -> None:
    raise NotImplementedError(f"LoFTAdamW does not support {what}. {remedy}")


@dataclass
class Clipping:
    """Moves ``gradient_clipping`` from DeepSpeed, which clips by the norm of the raw factor gradients, to LoFT."""

    engine: DeepSpeedEngine

    def take(self) -> float:
        """The clipping norm that DeepSpeed was configured with, 0.0 if none or if it has been taken before."""
        config, wrapper = self.engine._config, self.engine.optimizer
        # Loading a checkpoint writes the saved value back into the wrapper (zero/stage_1_and_2.py, load_state_dict).
        norm = max(float(config.gradient_clipping or 0.0), float(getattr(wrapper, "clip_grad", 0.0) or 0.0))
        config.gradient_clipping = 0.0
        if hasattr(wrapper, "clip_grad"):
            wrapper.clip_grad = 0.0
        return norm

    @property
    def pending(self) -> bool:
        """Whether DeepSpeed would clip its next step."""
        return bool(self.engine._config.gradient_clipping or getattr(self.engine.optimizer, "clip_grad", 0.0))

    def report(self, norm: Tensor) -> None:
        """Let ``engine.get_global_grad_norm()``, and with it the Trainer's log, show LoFT's norm."""
        self.engine.optimizer._global_grad_norm = norm


def layout_of(engine: DeepSpeedEngine, trainable: Trainable) -> Layout:
    """The layout in which the engine will hand over the trainable parameters.

    Raises:
        NotImplementedError: an engine or a setting whose partitioning is not known here.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    wrapper = engine.optimizer
    if isinstance(engine, PipelineEngine):
        _refuse("DeepSpeed's pipeline engine", "Use ZeRO without a PipelineModule.")
    if getattr(wrapper, "model_parallel_world_size", 1) > 1:
        _refuse("tensor parallelism", "Use data parallelism alone (no mpu, tensor_parallel.autotp_size 1).")
    if getattr(wrapper, "torch_autocast_gradscaler", None) or engine.torch_autocast_z0_gradscaler:
        _refuse("torch_autocast in float16", 'Use "fp16" or torch_autocast with bfloat16.')
    offload = engine.zero_offload_optimizer()
    if offload is not None and offload.device == "nvme":  # stages 1 and 2 would keep it in CPU memory, without a word
        _refuse('offload_optimizer.device "nvme"', 'Partitions that are swapped out one by one split pairs: use "cpu".')
    if wrapper is engine.basic_optimizer:
        return Whole(trainable.factors, trainable.others)
    readers: dict[type, Callable[[Any, Trainable], Layout]] = {
        FP16_UnfusedOptimizer: _stage0,
        BF16_Optimizer: _bf16,
        DeepSpeedZeroOptimizer: _stage1_and_2,
        DeepSpeedZeroOptimizer_Stage3: _stage3,
    }
    if type(wrapper) not in readers:
        _refuse(f"DeepSpeed's {type(wrapper).__name__}", "It knows ZeRO stages 0 to 3 as DeepSpeed 0.19 builds them.")
    return readers[type(wrapper)](wrapper, trainable)


def _device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def _stage0(wrapper: Any, trainable: Trainable) -> Layout:
    """FP16_UnfusedOptimizer (fp16/unfused_optimizer.py): float32 clones, whole on every rank."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    # engine.py, backward() scales the loss for a ZeROOptimizer only, and this wrapper, which is none, divides all the
    # same. AdamW hardly notices; a clipping norm that is too small by the loss scale never clips.
    if wrapper.loss_scale_config.cur_scale != 1.0 and not isinstance(wrapper, ZeROOptimizer):
        _refuse(
            "fp16 at ZeRO stage 0",
            "DeepSpeed divides the gradients there by a loss scale that it never multiplied the loss with (its pull "
            'request 8393): use stage 1, which does both, or "bf16".',
        )
    masters = {
        param: master
        for params, clones in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        for param, master in zip(params, clones, strict=True)
    }
    return Whole(trainable.factors, trainable.others, masters)


def _one_group(groups: Sequence[Any]) -> Any:
    if any(group is not groups[0] for group in groups):
        _refuse(
            "several data-parallel groups", "Expert parallelism partitions experts among other ranks than the rest."
        )
    return groups[0]


def _flattened(
    params: Sequence[Sequence[nn.Parameter]], buffers: Sequence[Tensor], flats: Sequence[Tensor], rank: int
) -> dict[nn.Parameter, Held]:
    """Stages 1 and 2: a group is one buffer, ``rank`` holds the ``rank``-th of equal parts of it.

    ``param.data`` is a view of the buffer; that, not ``_hp_mapping``, says where it lies
    (``round_robin_gradients`` reorders the buffer, zero/stage_1_and_2.py).
    """
    held = {}
    for group, buffer, flat in zip(params, buffers, flats, strict=True):
        size = flat.numel()
        for param in group:
            if param.data.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
                raise RuntimeError(
                    "DeepSpeed's flat buffer no longer holds the parameters: they were moved or resized."
                )
            start = int(param.data.storage_offset() - buffer.storage_offset())
            # Of a parameter that lies wholly on other ranks the interval is empty, wherever it would begin.
            offset = min(max(start - rank * size, 0), size)
            held[param] = Held(flat, offset, even_cut(size, start, param.numel()))
    return held


def _stage1_and_2(wrapper: Any, trainable: Trainable) -> Layout:
    """DeepSpeedZeroOptimizer (zero/stage_1_and_2.py)."""
    group = _one_group(wrapper.real_dp_process_group)
    rank = torch.distributed.get_rank(group)
    flats = wrapper.single_partition_of_fp32_groups

    def publish() -> None:
        for parts, flat in zip(wrapper.parallel_partitioned_bit16_groups, flats, strict=True):
            parts[rank].data.copy_(flat.data)

    held = _flattened(wrapper.bit16_groups, wrapper.bit16_groups_flat, flats, rank)
    return Sharded(
        trainable.factors, trainable.others, held, flats, group, _device(), publish, wrapper.update_lp_params
    )


def _bf16(wrapper: Any, trainable: Trainable) -> Layout:
    """BF16_Optimizer (bf16_optimizer.py): the partitions of stage 1, all handed over in one call."""
    group = _one_group(wrapper.real_dp_process_group)
    flats = wrapper.fp32_groups_flat_partition
    held = _flattened(wrapper.bf16_groups, wrapper.bf16_groups_flat, flats, torch.distributed.get_rank(group))
    refresh = wrapper.update_lp_params
    return Sharded(trainable.factors, trainable.others, held, flats, group, _device(), lambda: None, refresh)


def _stage3(wrapper: Any, trainable: Trainable) -> Layout:
    """DeepSpeedZeroOptimizer_Stage3 (zero/stage3.py): every parameter is cut into equal parts, padded at the end."""
    params = [param for sub_group in wrapper.fp16_groups for param in sub_group]
    group = _one_group([param.ds_process_group for param in params])
    flats = wrapper.fp32_partitioned_groups_flat
    held = {}
    for param in params:
        sub_group, offset, size = wrapper.grad_position[wrapper.get_param_id(param)]
        held[param] = Held(flats[sub_group], offset, even_cut(size, 0, shape_of(param).numel()))

    def publish() -> None:
        for part, flat in zip(wrapper.fp16_partitioned_groups_flat, flats, strict=True):
            part.data.copy_(flat.data)

    def refresh() -> None:
        publish()
        if wrapper.persistent_parameters:  # small ones are kept whole between steps
            wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)

    return Sharded(trainable.factors, trainable.others, held, flats, group, _device(), publish, refresh)
