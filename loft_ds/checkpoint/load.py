"""Loading: every rank reads the rows that are its own now, whoever wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..adapters import uncompiled
from ..errors import CheckpointError
from ..factors import Factor
from ..optimizer import LoFTAdamW
from ..ranks import rank_and_world, together
from ..sharding import Layout
from .engine import attached, restore_engine
from .files import TensorFiles, aside, digest, read_json
from .manifest import BUFFERS, FLAT_STATE, MANIFEST, ROW_STATE, compare, first_owner

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def load_checkpoint(target: DeepSpeedEngine | LoFTAdamW, directory: str | Path, tag: str | None = None) -> Path:
    """Go on from a checkpoint, saved on any number of ranks at any ZeRO stage, with or without DeepSpeed.

    A collective: every rank calls it. Either every rank has loaded all of it or none has changed anything.

    Args:
        target: the engine, or without DeepSpeed the optimizer.
        directory: where the run's checkpoints lie; a folder that all ranks see.
        tag: which one; the last if None.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if it is missing or damaged (naming the file), or of another model, rank, set of
            target modules, variant of LoFT (naming the first difference) or of loft_ds 0.1.
    """
    optimizer, layout, engine = attached(target)
    directory = Path(directory)
    with together():
        folder = directory / tag if tag else _last(directory)
        manifest = read_json(folder / MANIFEST)
        compare(manifest, optimizer, folder / MANIFEST)
        _verify(folder, manifest["files"])
        files = TensorFiles(folder, manifest["world"])
        share = _Share(files, manifest["parameters"], optimizer, layout)
        values = {name: share.values(name) for name in manifest["parameters"]}
        state = {name: share.state(name) for name, saved in manifest["parameters"].items() if saved["state"]}
        buffers = files.read_all(BUFFERS) if BUFFERS in manifest["files"] else {}
    for name, param in optimizer.trainable.parameters.items():
        held, _ = layout.held(param)
        held.copy_(values[name])
    optimizer.state = state
    layout.refresh()
    for group, saved in zip(optimizer.param_groups, manifest["groups"], strict=True):
        group.update({key: tuple(v) if key == "betas" else v for key, v in saved["settings"].items()})
    with uncompiled(optimizer.model) as plain:
        own = dict(plain.named_buffers())
    for name, buffer in buffers.items():
        own[name].copy_(buffer)
    if engine is not None and manifest["engine"] is not None:  # it is None where it was saved without DeepSpeed
        restore_engine(engine, manifest["engine"])
    return folder


def last_tag(directory: str | Path) -> str | None:
    """The tag of the last whole checkpoint in a folder; None where there is none."""
    file = Path(directory) / "latest"
    return file.read_text(errors="replace").strip() if file.is_file() else None


def _last(directory: Path) -> Path:
    """The folder of the last whole checkpoint."""
    tag = last_tag(directory)
    if tag is None:
        raise CheckpointError(f"{directory / 'latest'}: no such file, so {directory} holds no whole checkpoint")
    if tag and Path(tag).name == tag:
        for folder in (directory / tag, aside(directory / tag)):
            if folder.is_dir():
                return folder
    raise CheckpointError(f"{directory / 'latest'}: names {tag!r}, and there is no such checkpoint beside it")


def _verify(folder: Path, files: dict[str, str]) -> None:
    """Check every file's digest, each rank a part of them."""
    rank, world = rank_and_world()
    for name, expected in sorted(files.items())[rank::world]:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
        if digest(file) != expected:
            raise CheckpointError(f"{file}: is damaged: its contents are not those that were saved")


@dataclass(frozen=True)
class _Share:
    """This rank's part of a checkpoint.

    Attributes:
        files: the checkpoint's.
        saved: what its manifest says of each parameter.
        optimizer: which goes on from it.
        layout: the optimizer's, which says what is this rank's.
    """

    files: TensorFiles
    saved: dict[str, Any]
    optimizer: LoFTAdamW
    layout: Layout

    def values(self, name: str) -> Tensor:
        """The master weights, flat, of what this rank holds of a parameter."""
        return self._flat(name, "values")

    def state(self, name: str) -> dict[str, Any]:
        """The state of one parameter, as ``LoFTAdamW.state`` holds it."""
        factor = self.optimizer.trainable.factor_by_name.get(name)
        own = self._flat_state(name) if factor is None else self._factor_state(factor)
        return {"step": self.saved[name]["step"], **own}

    def _flat_state(self, name: str) -> dict[str, Any]:
        _, bounds = self.layout.held(self.optimizer.trainable.parameters[name])
        return {"start": int(bounds[self.layout.rank]), **{kind: self._flat(name, kind) for kind in FLAT_STATE}}

    def _factor_state(self, factor: Factor) -> dict[str, Any]:
        saved, bounds, rank = self.saved[factor.name], self.layout.row_bounds(factor), self.layout.rank
        start, stop = int(bounds[rank]), int(bounds[rank + 1])
        device = self.layout.held(factor.param)[0].device
        state: dict[str, Any] = {"start": start}
        for kind in ROW_STATE:
            if kind in saved["state"]:
                empty = _shape_without_rows(factor, kind, self.optimizer)
                rows = self.files.read_range(f"{factor.name}|{kind}", saved["rows"], start, stop, empty)
                state[kind] = self.optimizer.place(kind, rows, device)
        wanted = {"basis": self.layout.concerns(factor), "weights": start < stop, "rotation": start < stop}
        for kind, here in wanted.items():
            if here and kind in saved["state"]:
                whole = self.files.read(first_owner(saved["rows"]), f"{factor.name}|{kind}")
                state[kind] = whole.to(device)
        return state

    def _flat(self, name: str, kind: str) -> Tensor:
        held, bounds = self.layout.held(self.optimizer.trainable.parameters[name])
        start, stop = int(bounds[self.layout.rank]), int(bounds[self.layout.rank + 1])
        found = self.files.read_range(f"{name}|{kind}", self.saved[name]["held"], start, stop, (0,))
        return found.to(held.device)


def _shape_without_rows(factor: Factor, kind: str, optimizer: LoFTAdamW) -> tuple[int, ...]:
    """Of a kind of a factor's state where this rank has no rows: (0, .), or (E, 0, .) of E experts."""
    width = optimizer.blocks.state_width(factor.rank) if kind == "second_moment" else factor.rank
    return (0, width) if factor.experts == 1 else (factor.experts, 0, width)
