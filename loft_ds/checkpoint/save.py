"""Saving: every rank writes what it holds, the first one what all share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters import uncompiled
from ..errors import CheckpointError
from ..optimizer import LoFTAdamW
from ..ranks import all_gather, first_rank, together
from ..sharding import Layout
from .engine import attached
from .files import rank_file, replace, write_json, write_tensors, write_text
from .manifest import BUFFERS, FLAT_STATE, MANIFEST, PAIR_STATE, ROW_STATE, first_owner, manifest_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def save_checkpoint(target: DeepSpeedEngine | LoFTAdamW, directory: str | Path, tag: str | None = None) -> Path:
    """Save what training goes on from: master weights, moments, counters, and the engine's scheduler and loss scale.

    A collective: every rank calls it. Any other scheduler, random states and the place in the data are the caller's.

    Args:
        target: the engine, or without DeepSpeed the optimizer.
        directory: where checkpoints of this run lie; a folder that all ranks see.
        tag: name of this one; ``global_step<n>`` if None.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if a file cannot be written, naming it, or if the ranks give different tags; the
            checkpoint before is still the last.
    """
    optimizer, layout, engine = attached(target)
    directory = Path(directory)
    tag = tag or f"global_step{_steps(optimizer)}"
    if len(tags := sorted(set(all_gather(tag)))) > 1:
        raise CheckpointError(f"{directory}: the ranks would save under different tags, {', '.join(tags)}")
    final, beside = directory / tag, directory / f".{tag}.partial"
    with together():
        if first_rank():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
    with together():
        files: dict[str, str] = {}
        states: dict[str, dict[str, Any]] = {}
        if layout.world > 1 or first_rank():  # where every rank holds all, one writes
            name = rank_file(layout.rank, layout.world)
            tensors, states = _share(optimizer, layout)
            files[name] = write_tensors(beside / name, tensors)
    for their_files, their_states in all_gather((files, states)):
        files |= their_files
        states |= their_states
    with together():
        if first_rank():
            if buffers := _buffers(optimizer.model):
                files[BUFFERS] = write_tensors(beside / BUFFERS, buffers)
            write_json(beside / MANIFEST, manifest_of(optimizer, layout, engine, states, files))
            replace(beside, final)
            write_text(directory / "latest.partial", tag)
            replace(directory / "latest.partial", directory / "latest")
    return final


def _steps(optimizer: LoFTAdamW) -> int:
    return max((state["step"] for state in optimizer.state.values() if state), default=0)


def _share(optimizer: LoFTAdamW, layout: Layout) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What this rank writes, keyed ``name|kind``, and what the manifest is to say of the state of each parameter that
    it is the first to hold anything of: a rank without rows does not know.
    """
    every, factors = optimizer.state, optimizer.trainable.factor_by_name
    tensors: dict[str, Tensor] = {}
    states = {}
    for name, param in optimizer.trainable.parameters.items():
        held, bounds = layout.held(param)
        if name in factors:
            bounds = layout.row_bounds(factors[name])
        first, state = layout.rank == first_owner(bounds.tolist()), every.get(name, {})
        # What all owners of a factor's rows have alike, the first of them writes.
        kinds = [kind for kind in ROW_STATE + FLAT_STATE + (PAIR_STATE if first else ()) if kind in state]
        tensors |= {f"{name}|values": held} | {f"{name}|{kind}": state[kind] for kind in kinds}
        if first:
            states[name] = {"step": state.get("step", 0), "state": sorted(kinds)}
    # The live ones may be views of each other's memory, on any device.
    contiguous = torch.contiguous_format
    copies = {k: t.detach().cpu().clone(memory_format=contiguous) for k, t in tensors.items() if t.numel()}
    return copies, states


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers, such as a saved module's running statistics."""
    with uncompiled(model) as plain:
        persistent = plain.state_dict().keys()
        return {name: b.detach().cpu().clone() for name, b in plain.named_buffers() if name in persistent}
