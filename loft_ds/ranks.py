"""Which rank this process is, and what all ranks do together.

Of torch's process group of all ranks. A process without one is rank 0 of 1, and its collectives are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .errors import CheckpointError


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_rank() -> bool:
    """Whether this is the rank that writes what all share."""
    return rank_and_world()[0] == 0


def all_gather(value: Any) -> list[Any]:
    """Every rank's value, which can be pickled, in the order of ranks. A collective."""
    _, world = rank_and_world()
    gathered = [value] * world
    if dist.is_initialized():
        dist.all_gather_object(gathered, value)
    return gathered


@contextmanager
def together() -> Iterator[None]:
    """All ranks end this block or all raise: none goes on alone into the next collective. A collective.

    Raises:
        Exception: the rank's own, where the block failed.
        CheckpointError: on the other ranks, with the message of the first rank that failed.
    """
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


def bound_collectives(timeout: timedelta) -> None:
    """Give the collectives of all process groups this time-out.

    torch gives a group that is made later half an hour, whatever the first one was given, and DeepSpeed makes some.
    """
    for group in _process_groups():
        distributed_c10d._set_pg_timeout(timeout, group)


def collectives_begun() -> int:
    """How many collectives of all ranks this one has called, whether they have ended or not."""
    _, world = rank_and_world()
    return sum(group._get_sequence_number_for_group() for group in _process_groups() if group.size() == world)


def _process_groups() -> list[Any]:  # Any: torch's type stubs leave the number of a group's collectives out
    return list(distributed_c10d._world.pg_map)
