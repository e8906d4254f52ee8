"""Files that are there whole or not at all, and ranks that all go on or all stop."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import distributed_c10d


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of something else; nothing has been loaded from it."""


def first_rank() -> bool:
    """Whether this is the rank that writes what all share."""
    return not dist.is_initialized() or dist.get_rank() == 0


def all_gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def bound_collectives(timeout: timedelta) -> None:
    """Give the collectives of all process groups this time-out.

    torch gives a group that is made later half an hour, whatever the first one was given, and DeepSpeed makes some.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


@contextmanager
def together() -> Iterator[None]:
    """All ranks end this block or all raise: none goes on alone into the next collective."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = [message for message in all_gather(str(error) if error else None) if message is not None]
    if error is not None:
        raise error
    if messages:
        raise CheckpointError(messages[0])


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
    """Put ``source`` in the place of ``target``, durably. A folder that is in the way steps aside until it is done:
    :func:`loft_ds.checkpoint._latest` finds it there.
    """
    if source.is_dir():
        sync(source)
        if target.exists():
            shutil.rmtree(aside(target), ignore_errors=True)
            target.rename(aside(target))
    source.rename(target)
    sync(target.parent)
    shutil.rmtree(aside(target), ignore_errors=True)


def aside(folder: Path) -> Path:
    """Where a folder waits while another takes its place."""
    return folder.with_name(f".{folder.name}.replaced")
