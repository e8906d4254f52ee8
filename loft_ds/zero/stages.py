"""Read each ZeRO stage's layout from an unpatched DeepSpeed engine.

Checked against DeepSpeed 0.19. Dispatch is on exact types: a subclass (ZenFlow, SuperOffload) may partition in another
way and is refused, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..factors import Trainable, shape_of
from ..sharding.exchange import even_cut
from ..sharding.layout import Layout, Whole
from ..sharding.sharded import Held, Sharded
from .unsupported import find_engine_refusal

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def layout_of(engine: DeepSpeedEngine, trainable: Trainable) -> Layout:
    """The layout in which the engine will hand over the trainable parameters.

    Args:
        engine: the one that steps LoFT's optimizer.
        trainable: what the optimizer trains.

    Raises:
        NotImplementedError: an engine or a setting whose partitioning is not known here
            (:mod:`loft_ds.zero.unsupported`).
    """
    refusal = find_engine_refusal(engine)
    if refusal is not None:
        raise NotImplementedError(refusal)
    read = reader_of(engine)
    assert read is not None, "an engine without a reader is a row of loft_ds.zero.unsupported"
    return read(engine.optimizer, trainable)


def reader_of(engine: DeepSpeedEngine) -> Callable[[Any, Trainable], Layout] | None:
    """The function that reads the layout from the engine's wrapper of LoFT's optimizer; None for an unknown wrapper."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if engine.optimizer is engine.basic_optimizer:
        return _bare
    readers: dict[type, Callable[[Any, Trainable], Layout]] = {
        FP16_UnfusedOptimizer: _stage0,
        BF16_Optimizer: _bf16,
        DeepSpeedZeroOptimizer: _stage1_and_2,
        DeepSpeedZeroOptimizer_Stage3: _stage3,
    }
    return readers.get(type(engine.optimizer))


def data_parallel_groups(wrapper: Any) -> list[Any]:
    """The process groups among which a wrapper divides parameters: one a parameter group, at stage 3 one a parameter.

    Empty at stage 0, which divides nothing.
    """
    if hasattr(wrapper, "real_dp_process_group"):  # zero/stage_1_and_2.py and bf16_optimizer.py
        return list(wrapper.real_dp_process_group)
    params = [param for sub_group in getattr(wrapper, "fp16_groups", ()) for param in sub_group]
    return [param.ds_process_group for param in params if hasattr(param, "ds_process_group")]


def _sharded(
    trainable: Trainable,
    held: Mapping[nn.Parameter, Held],
    flats: Sequence[Tensor],
    group: Any,
    publish: Callable[[], None],
    refresh: Callable[[], None],
) -> Layout:
    from deepspeed.accelerator import get_accelerator

    if left_out := [name for name, p in trainable.parameters.items() if p not in held]:
        raise RuntimeError(
            f"{left_out[0]} was frozen when DeepSpeed built its engine, and LoFTAdamW was built to train it: another "
            "adapter has been made active in between (set_adapter). Build the optimizer after that, then the engine."
        )
    device = torch.device(get_accelerator().current_device_name())
    return Sharded(trainable.factors, trainable.others, held, flats, group, device, publish, refresh)


def _bare(_: Any, trainable: Trainable) -> Layout:
    """Stage 0 in float32: DeepSpeed steps LoFT's optimizer without a wrapper."""
    return Whole(trainable.factors, trainable.others)


def _stage0(wrapper: Any, trainable: Trainable) -> Layout:
    """FP16_UnfusedOptimizer (fp16/unfused_optimizer.py): float32 clones, whole on every rank."""
    masters = {
        param: master
        for params, clones in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        for param, master in zip(params, clones, strict=True)
    }
    return Whole(trainable.factors, trainable.others, masters)


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
    group = data_parallel_groups(wrapper)[0]
    rank = torch.distributed.get_rank(group)
    flats = wrapper.single_partition_of_fp32_groups

    def publish() -> None:
        for parts, flat in zip(wrapper.parallel_partitioned_bit16_groups, flats, strict=True):
            parts[rank].data.copy_(flat.data)

    held = _flattened(wrapper.bit16_groups, wrapper.bit16_groups_flat, flats, rank)
    return _sharded(trainable, held, flats, group, publish, wrapper.update_lp_params)


def _bf16(wrapper: Any, trainable: Trainable) -> Layout:
    """BF16_Optimizer (bf16_optimizer.py): the partitions of stage 1, all handed over in one call."""
    group = data_parallel_groups(wrapper)[0]
    flats = wrapper.fp32_groups_flat_partition
    held = _flattened(wrapper.bf16_groups, wrapper.bf16_groups_flat, flats, torch.distributed.get_rank(group))
    return _sharded(trainable, held, flats, group, lambda: None, wrapper.update_lp_params)


def _stage3(wrapper: Any, trainable: Trainable) -> Layout:
    """DeepSpeedZeroOptimizer_Stage3 (zero/stage3.py): every parameter is cut into equal parts, padded at the end."""
    params = [param for sub_group in wrapper.fp16_groups for param in sub_group]
    group = data_parallel_groups(wrapper)[0]
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
        whole = wrapper.persistent_parameters  # small ones are kept whole between steps
        if whole:
            whole[0].partition(whole)
        wrapper.invalidate_secondary_tensor()  # what zero_hpz_partition_size keeps within a node, also of these
        if whole:
            whole[0].all_gather(whole)

    layout = _sharded(trainable, held, flats, group, publish, refresh)
    layout.repeats_gradients = True  # averaged_gradients are views of a buffer that nobody clears
    return layout
