"""Files that are there whole or not at all, with a digest of each, and reading parts of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError


def rank_file(rank: int, world: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the disk in this block say which file it was: a full disk's own do not.

    Raises:
        CheckpointError: in place of an error of the operating system, of safetensors or of ``torch.save``.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save's is a RuntimeError that names the line of its writer.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file, sync, and give its digest."""
    with naming(path):
        save_file(tensors, path)
        sync(path)
    return digest(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object with a digest of itself, and sync."""
    body = json.dumps(content, sort_keys=True)
    write_text(path, json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}))


def write_text(path: Path, text: str) -> None:
    """Write a text file, and sync."""
    with naming(path):
        path.write_text(text)
        sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote, to the last bit.

    Raises:
        CheckpointError: naming the file, if it is missing or its digest does not fit.
    """
    try:
        outer = json.loads(path.read_text())
        if hashlib.sha256(outer["body"].encode()).hexdigest() != outer["sha256"]:
            raise ValueError("its contents are not those that were saved")
        body: dict[str, Any] = json.loads(outer["body"])
        return body
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from error


def sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Put ``source`` in the place of ``target``, durably. A folder that is in the way waits :func:`aside` meanwhile."""
    if source.is_dir():
        sync(source)
        if target.exists():
            shutil.rmtree(aside(target), ignore_errors=True)
            target.rename(aside(target))
    source.rename(target)
    sync(target.parent)
    shutil.rmtree(aside(target), ignore_errors=True)


def aside(folder: Path) -> Path:
    """Where a folder waits while another takes its place: after a crash at that moment it is found there."""
    return folder.with_name(f".{folder.name}.replaced")


class TensorFiles:
    """The safetensors files of a checkpoint, each opened once: opening one reads the names of all it holds.

    Args:
        folder: where they lie.
        world: how many ranks wrote them.
    """

    def __init__(self, folder: Path, world: int) -> None:
        self._folder = folder
        self._world = world
        self._opened: dict[str, Any] = {}

    def _open(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = safe_open(self._folder / name, framework="pt")
        return self._opened[name]

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / name}: {error}") from error

    def read(self, rank: int, key: str, *index: slice) -> Tensor:
        """Of one tensor that a rank wrote the part at ``index``, or all of it.

        A copy, aligned as all of torch's own tensors are: on some CPUs matrix products round by alignment.

        Raises:
            CheckpointError: naming the file, if there is no such tensor in it.
        """
        name = rank_file(rank, self._world)
        with self._naming(name):
            part: Tensor = self._open(name).get_slice(key)[index or slice(None)].clone()
        return part

    def read_range(self, key: str, bounds: Sequence[int], start: int, stop: int, empty: tuple[int, ...]) -> Tensor:
        """``[start, stop)`` of a tensor that many ranks wrote parts of, in one of its dimensions.

        Args:
            key: the tensor's name, the same in all files.
            bounds: (N + 1,), rank q wrote ``bounds[q]:bounds[q + 1]``.
            start: the first that is wanted.
            stop: after the last one.
            empty: the shape of nothing of it; the dimension is the one in which this is 0.

        Raises:
            CheckpointError: naming the file, if there is no such tensor in it.
        """
        dim, parts = empty.index(0), []
        for rank in range(self._world):
            low, high = max(start, bounds[rank]), min(stop, bounds[rank + 1])
            if low < high:
                within = slice(low - bounds[rank], high - bounds[rank])
                parts.append(self.read(rank, key, *[slice(None)] * dim, within))
        return torch.cat(parts, dim) if parts else torch.empty(empty)

    def read_all(self, name: str) -> dict[str, Tensor]:
        """Every tensor of a file.

        Raises:
            CheckpointError: naming the file, if it is none of safetensors.
        """
        with self._naming(name):
            file = self._open(name)
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
