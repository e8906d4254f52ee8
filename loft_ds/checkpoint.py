"""Checkpoints that survive another world size, another ZeRO stage, and a crash at any moment.

A checkpoint is a folder ``TAG`` beside a file ``latest`` that names it::

    latest                                    the tag, written last
    global_step12/manifest.json               who wrote which rows, counters, settings, a digest of every file
    global_step12/rank-00000-of-00004.safetensors

Every rank writes what it holds: master weights by flat interval, moments by feature rows. A reader opens the files
that overlap with what *it* holds and reads those rows only, so any number of ranks at any stage can take over and none
ever has the whole. safetensors and JSON cannot run code. (torch.distributed.checkpoint reshards as well, but its
metadata is a pickle, and no file of it says whether it arrived whole.)

All files are written beside, synced and renamed; ``latest`` moves last. A crash at any moment leaves the checkpoint
before. The folder must be one that all ranks see.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .durable import (
    CheckpointError,
    all_gather,
    aside,
    digest,
    first_rank,
    read_json,
    replace,
    together,
    write_json,
    write_tensors,
    write_text,
)
from .factors import Factor, shape_of
from .optimizer import LoFTAdamW
from .sharding import Layout

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

FORMAT = 1
# What a factor's state holds a row of each feature row of, in its last dimension but one; the rest is small and the
# same on every rank.
PAIR_STATE = ("basis", "weights")  # (r, r) of a factor, the same on all ranks that own rows of it
ROW_STATE = ("momentum", "second_moment", "pending", "previous")
FLAT_STATE = ("exp_avg", "exp_avg_sq")


def save_checkpoint(target: DeepSpeedEngine | LoFTAdamW, directory: str | Path, tag: str | None = None) -> Path:
    """Save all that training goes on from: master weights, moments, counters, scheduler, loss scale.

    A collective: every rank calls it.

    Args:
        target: the engine, or without DeepSpeed the optimizer.
        directory: where checkpoints of this run lie.
        tag: name of this one; ``global_step<n>`` if None.

    Returns:
        The checkpoint's folder.
    """
    optimizer, layout, engine = attached(target)
    directory = Path(directory)
    tag = tag or f"global_step{_steps(optimizer)}"
    final, beside = directory / tag, directory / f".{tag}.partial"
    with together():
        if first_rank():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
    name = _file_name(layout.rank, layout.world)
    with together():
        written = {}
        if _writes(layout):
            written[name] = write_tensors(beside / name, _local_tensors(optimizer, layout))
    files = {name: digest for part in all_gather(written) for name, digest in part.items()}
    with together():
        if first_rank():
            if buffers := _buffers(optimizer.model):
                files["buffers.safetensors"] = write_tensors(beside / "buffers.safetensors", buffers)
            write_json(beside / "manifest.json", {**_manifest(optimizer, layout, engine), "files": files})
            replace(beside, final)
            write_text(directory / "latest.partial", tag)
            replace(directory / "latest.partial", directory / "latest")
    return final


def load_checkpoint(target: DeepSpeedEngine | LoFTAdamW, directory: str | Path, tag: str | None = None) -> Path:
    """Go on from a checkpoint, saved on any number of ranks at any ZeRO stage, with or without DeepSpeed.

    A collective: every rank calls it. Either every rank has loaded all of it or none has changed anything.

    Args:
        target: the engine, or without DeepSpeed the optimizer.
        directory: where the run's checkpoints lie.
        tag: which one; the last if None.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if it is missing or damaged (naming the file), or of another model, rank, set of
            target modules or variant of LoFT (naming the first difference).
    """
    optimizer, layout, engine = attached(target)
    directory = Path(directory)
    with together():
        folder = directory / tag if tag else _latest(directory)
        manifest = read_json(folder / "manifest.json")
        _compare(manifest, optimizer, folder)
        _verify(folder, manifest)
        files = _Files(folder)
        loaded = {name: _read(files, manifest, layout, optimizer, name) for name in manifest["parameters"]}
        buffers = files.all_of("buffers.safetensors") if "buffers.safetensors" in manifest["files"] else {}
    params = optimizer.trainable.parameters
    optimizer.state.clear()
    for name, (values, state) in loaded.items():
        held, _ = layout.held(params[name])
        held.copy_(values)
        if state:
            optimizer.state[name] = state
    layout.refresh()
    for group, saved in zip(optimizer.param_groups, manifest["groups"], strict=True):
        group.update({key: tuple(v) if key == "betas" else v for key, v in saved["settings"].items()})
    own = dict(optimizer.model.named_buffers())
    for name, buffer in buffers.items():
        own[name].copy_(buffer)
    if engine is not None:
        _restore_engine(engine, manifest["engine"])
    return folder


def last_tag(directory: str | Path) -> str | None:
    """The tag of the last whole checkpoint in a folder; None where there is none."""
    file = Path(directory) / "latest"
    return file.read_text(errors="replace").strip() if file.is_file() else None


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


def _steps(optimizer: LoFTAdamW) -> int:
    return max((state["step"] for state in optimizer.state.values() if state), default=0)


def _local_tensors(optimizer: LoFTAdamW, layout: Layout) -> dict[str, Tensor]:
    """What this rank writes, keyed ``name|kind``; what all owners of a factor's rows have alike, the first of them."""
    factors = optimizer.trainable.factor_by_name
    tensors = {}
    for name, param in optimizer.trainable.parameters.items():
        tensors[f"{name}|values"] = layout.held(param)[0]
        state = optimizer.state.get(name, {})
        tensors.update({f"{name}|{kind}": state[kind] for kind in ROW_STATE + FLAT_STATE if kind in state})
        if "basis" in state and layout.rank == _first_owner(layout.row_bounds(factors[name]).tolist()):
            tensors.update({f"{name}|{kind}": state[kind] for kind in PAIR_STATE if kind in state})
    return {
        key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items() if t.numel()
    }


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers, such as a saved module's running statistics."""
    persistent = model.state_dict().keys()
    return {name: b.detach().cpu().clone() for name, b in model.named_buffers() if name in persistent}


def _manifest(optimizer: LoFTAdamW, layout: Layout, engine: DeepSpeedEngine | None) -> dict[str, Any]:
    factors = optimizer.trainable.factor_by_name
    parameters = {}
    for name, param in optimizer.trainable.parameters.items():
        state = optimizer.state.get(name, {})
        parameters[name] = {
            **_description(name, optimizer),
            "step": state.get("step", 0),
            "state": sorted(kind for kind in state if kind in ROW_STATE + FLAT_STATE),
            "held": layout.held(param)[1].tolist(),
            "rows": layout.row_bounds(factors[name]).tolist() if name in factors else None,
        }
    groups = [
        {
            "parameters": names,
            "settings": {k: v for k, v in group.items() if k != "params" and isinstance(v, int | float | tuple | list)},
        }
        for group, names in zip(optimizer.param_groups, _group_names(optimizer), strict=True)
    ]
    return {
        "format": FORMAT,
        "world": layout.world,
        "variant": optimizer.variant,
        "parameters": parameters,
        "groups": groups,
        "engine": None if engine is None else _engine_state(engine),
    }


def _group_names(optimizer: LoFTAdamW) -> list[list[str]]:
    """The names of the parameters in each group, as the optimizer was built."""
    names = {id(p): name for name, p in optimizer.trainable.parameters.items()}
    return [sorted(names[id(p)] for p in group) for group in optimizer.group_members]


def _description(name: str, optimizer: LoFTAdamW) -> dict[str, Any]:
    """What must be the same for a parameter's state to mean the same."""
    factor, shape = optimizer.trainable.factor_by_name.get(name), list(shape_of(optimizer.trainable.parameters[name]))
    if factor is None:
        return {"role": "other", "shape": shape}
    return {"role": factor.side, "shape": shape, "experts": factor.experts, "partner": factor.partner.name}


COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


def _engine_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scheduler = engine.lr_scheduler
    return {
        "counters": {key: getattr(engine, key) for key in COUNTERS},
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "loss_scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler else None,
    }


def _restore_engine(engine: DeepSpeedEngine, saved: dict[str, Any] | None) -> None:
    if saved is None:  # saved without DeepSpeed
        return
    for key, value in saved["counters"].items():
        setattr(engine, key, value)
    if engine.lr_scheduler is not None and saved["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(saved["scheduler"])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and saved["loss_scaler"] is not None:
        vars(scaler).update({k: v for k, v in saved["loss_scaler"].items() if k in vars(scaler)})


def _latest(directory: Path) -> Path:
    tag = last_tag(directory)
    if tag is None:
        raise CheckpointError(f"{directory / 'latest'}: no such file, so {directory} holds no whole checkpoint")
    if tag and Path(tag).name == tag:
        for folder in (directory / tag, aside(directory / tag)):
            if folder.is_dir():
                return folder
    raise CheckpointError(f"{directory / 'latest'}: names {tag!r}, and there is no such checkpoint beside it")


def _compare(manifest: dict[str, Any], optimizer: LoFTAdamW, folder: Path) -> None:
    """Refuse a checkpoint of something else, with the first difference."""
    file = folder / "manifest.json"
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{file}: is of format {manifest['format']}, this version reads {FORMAT}")
    for key, value in optimizer.variant.items():
        if manifest["variant"].get(key) != value:
            raise CheckpointError(f"{file}: was saved with {key}={manifest['variant'].get(key)}, not {key}={value}")
    saved, own = manifest["parameters"], optimizer.trainable.parameters
    for name in own:
        if name not in saved:
            raise CheckpointError(f"{file}: has no {name}, which this model trains")
    for name in saved:
        if name not in own:
            raise CheckpointError(f"{file}: has {name}, which this model does not train")
        for key, value in _description(name, optimizer).items():
            if saved[name].get(key) != value:
                raise CheckpointError(f"{file}: {name} has {key} {saved[name].get(key)}, in this model {value}")
    if [group["parameters"] for group in manifest["groups"]] != _group_names(optimizer):
        raise CheckpointError(f"{file}: its parameters are in {len(manifest['groups'])} other groups than here")


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Check every file's digest, each rank a part of them."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name, expected in sorted(manifest["files"].items())[rank::world]:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
        if digest(file) != expected:
            raise CheckpointError(f"{file}: is damaged: its contents are not those that were saved")


def _read(
    files: _Files, manifest: dict[str, Any], layout: Layout, optimizer: LoFTAdamW, name: str
) -> tuple[Tensor, dict[str, Any]]:
    """This rank's part of one parameter: its master weights and its state."""
    saved, factor = manifest["parameters"][name], optimizer.trainable.factor_by_name.get(name)
    held, bounds = layout.held(optimizer.trainable.parameters[name])
    start, stop = int(bounds[layout.rank]), int(bounds[layout.rank + 1])
    world = manifest["world"]

    def part(kind: str, pieces: list[int], first: int, last: int, empty: tuple[int, ...] = (0,)) -> Tensor:
        found = _read_range(files, world, f"{name}|{kind}", pieces, first, last, empty)
        return optimizer.place(kind, found, held.device)

    values = part("values", saved["held"], start, stop)
    if not saved["state"]:
        return values, {}
    state: dict[str, Any] = {"step": saved["step"]}
    if factor is None:
        state["start"] = start
        state.update({kind: part(kind, saved["held"], start, stop) for kind in FLAT_STATE})
        return values, state
    row_bounds = layout.row_bounds(factor)
    start, stop = int(row_bounds[layout.rank]), int(row_bounds[layout.rank + 1])
    state["start"] = start
    for kind in ROW_STATE:
        if kind in saved["state"]:
            state[kind] = part(kind, saved["rows"], start, stop, _row_shape(factor, kind, optimizer))
    owner = _file_name(_first_owner(saved["rows"]), world)
    for kind, wanted in (("basis", layout.concerns(factor)), ("weights", optimizer.bias_calibration and start < stop)):
        if wanted:
            state[kind] = files.read(owner, f"{name}|{kind}", slice(None)).to(held.device)
    return values, state


def _row_shape(factor: Factor, kind: str, optimizer: LoFTAdamW) -> tuple[int, ...]:
    """Of a kind of a factor's state where this rank has no rows: (0, .), or (E, 0, .) of E experts."""
    packed = kind == "second_moment" and optimizer.second_moment == "matrix"
    width = factor.rank * (factor.rank + 1) // 2 if packed else factor.rank
    return (0, width) if factor.experts == 1 else (factor.experts, 0, width)


def _first_owner(row_bounds: list[int]) -> int:
    """The first rank that owns any rows."""
    return next(rank for rank, stop in enumerate(row_bounds[1:]) if stop > 0)


def _read_range(
    files: _Files, world: int, key: str, pieces: list[int], start: int, stop: int, empty: tuple[int, ...]
) -> Tensor:
    """``[start, stop)`` of a tensor of which rank q of ``world`` wrote ``[pieces[q], pieces[q + 1])``: in the dimension
    in which ``empty``, the shape of nothing of it, is 0.
    """
    dim, parts = empty.index(0), []
    for rank in range(world):
        low, high = max(start, pieces[rank]), min(stop, pieces[rank + 1])
        if low < high:
            within = slice(low - pieces[rank], high - pieces[rank])
            parts.append(files.read(_file_name(rank, world), key, *[slice(None)] * dim, within))
    return torch.cat(parts, dim) if parts else torch.empty(empty)


class _Files:
    """The safetensors files of a checkpoint, each opened once: opening one reads the names of all it holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, Any] = {}

    def _open(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = safe_open(self._folder / name, framework="pt")
        return self._opened[name]

    def read(self, name: str, key: str, *index: slice) -> Tensor:
        """Some of one tensor of a file.

        A copy, aligned as all of torch's own tensors are: on some CPUs matrix products round by alignment.
        """
        try:
            part: Tensor = self._open(name).get_slice(key)[index].clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / name}: {error}") from error
        return part

    def all_of(self, name: str) -> dict[str, Tensor]:
        """Every tensor of a file."""
        try:
            file = self._open(name)
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / name}: {error}") from error


def _file_name(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def _writes(layout: Layout) -> bool:
    """Whether this rank has a file of its own: every rank that shares rows, one rank where all hold them all."""
    return layout.world > 1 or first_rank()
