"""Park an engine in CPU memory while something else needs the device, as loops of reinforcement learning do."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint import attached
from ..kernels import at_home

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def offload_states(engine: DeepSpeedEngine, include: Collection[str] | None = None, *, pin_memory: bool = True) -> None:
    """Move an engine's weights, gradients and LoFT's state to the CPU until :func:`reload_states`.

    In place of ``engine.offload_states()``, which knows the state of DeepSpeed's own Adam alone, and at stage 3 no
    frozen weights. What follows is the same to the last bit. At stage 3 "lp_params" are the frozen weights: those that
    train stay. (DeepSpeed's runtime/zero/stage_1_and_2.py and stage3.py, ``offload_states``.)

    Args:
        engine: one at ZeRO stages 1 to 3 that steps LoFT's optimizer.
        include: which of "optim_states", "hp_params", "lp_params", "lp_grads" and "contiguous_grad_buffer"; None for
            all.
        pin_memory: whether DeepSpeed pins what it moves.

    Raises:
        TypeError: the engine trains with another optimizer.
        ValueError: ``include`` has something else in it; DeepSpeed parks no engine of this kind.
    """
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kind

    optimizer, _, _ = attached(engine)
    wrapper, partitioned = engine.optimizer, engine.zero_optimization_stage() == 3
    if not hasattr(wrapper, "offloaded_states"):
        raise ValueError(
            "DeepSpeed parks engines of ZeRO stages 1 to 3 alone, and not their BF16_Optimizer; this engine has a "
            f"{type(wrapper).__name__}"
        )
    kinds = set(Kind) if include is None else {Kind(kind) for kind in include}
    kinds = set(engine._refine_include_states(kinds))  # offload_optimizer has some of it there always
    ours = {Kind.optim_states} | ({Kind.hp_params, Kind.lp_params} if partitioned else set())
    on_accelerator = torch.accelerator.is_available()  # without one nothing can be pinned
    engine.offload_states(include=kinds - ours, pin_memory=pin_memory and on_accelerator)
    if Kind.optim_states in kinds:  # it comes back with the next step, as after a checkpoint
        optimizer.state = {
            name: {kind: at_home(t, t.device) if isinstance(t, Tensor) else t for kind, t in state.items()}
            for name, state in optimizer.state.items()
        }
    if partitioned and Kind.hp_params in kinds:
        for flat in wrapper.fp32_partitioned_groups_flat:
            flat.data = at_home(flat.data, flat.device)
        wrapper.offloaded_states.add(Kind.hp_params)  # from where DeepSpeed itself takes it back
    if partitioned and Kind.lp_params in kinds:
        for part in _frozen_parts(engine.module):
            part.data = at_home(part.data, part.device)
    if on_accelerator:
        torch.accelerator.empty_cache()


def reload_states(engine: DeepSpeedEngine) -> None:
    """Bring back to the device what :func:`offload_states` has moved; LoFT's own state follows with the next step.

    Args:
        engine: the one that was parked.
    """
    engine.reload_states()
    if engine.zero_optimization_stage() == 3 and not engine.zero_offload_param():
        for part in _frozen_parts(engine.module):
            part.data = part.data.to(engine.device)


def _frozen_parts(module: nn.Module) -> list[Tensor]:
    """This rank's parts of what does not train."""
    frozen: list[Any] = [param for param in module.parameters() if not param.requires_grad]
    return [param.ds_tensor for param in frozen]
