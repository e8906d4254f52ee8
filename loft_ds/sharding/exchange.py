"""Who sends which elements to whom: planned once by arithmetic alone, carried out by one ``all_to_all_single``.

A factor's elements are numbered as DeepSpeed flattens them. Rank ``q`` of ``N`` *holds* the flat interval
``bounds[q]:bounds[q + 1]`` and *owns* the feature rows ``row_bounds[q]:row_bounds[q + 1]``. The share decides the rows:
``row_bounds = ceil(bounds / r)``, so ownership is balanced as ZeRO balances memory, and a factor that one rank
holds whole is owned by that rank whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ..factors import Factor


@dataclass(frozen=True)
class Partition:
    """How one factor is spread over N ranks.

    Attributes:
        factor: the factor.
        bounds: (N + 1,) int64, rank q holds the flat elements ``bounds[q]:bounds[q + 1]``.
    """

    factor: Factor
    bounds: Tensor

    @cached_property
    def row_bounds(self) -> Tensor:
        """(N + 1,), rank q owns the feature rows ``row_bounds[q]:row_bounds[q + 1]``."""
        return -(-self.bounds // self.factor.rank)

    @cached_property
    def rows(self) -> Tensor:
        """(N,), how many feature rows each rank owns."""
        return self.row_bounds.diff()

    @cached_property
    def is_split(self) -> bool:
        """Whether no rank holds the factor whole."""
        return not bool(self.holds_whole.any())

    @cached_property
    def holds_whole(self) -> Tensor:
        """(N,) bool, true for the rank that holds all of the factor, if one does."""
        return self.bounds.diff() == self.factor.numel


@dataclass(frozen=True)
class Exchange:
    """``received = all_to_all(local[send_index])[recv_index]`` over the elements of some buffers.

    Attributes:
        send_index: elements of the local buffer in the order of their destinations.
        send_counts: elements for each rank.
        recv_index: for each element of the result its place among the received ones.
        recv_counts: elements from each rank.
    """

    send_index: Tensor
    send_counts: list[int]
    recv_index: Tensor
    recv_counts: list[int]

    def to(self, device: torch.device) -> Exchange:
        """The same with its indices on a device."""
        return replace(self, send_index=self.send_index.to(device), recv_index=self.recv_index.to(device))

    def __call__(self, local: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
        """Exchange ``local`` (elements, width) and give the result (elements', width) on its device.

        Args:
            local: this rank's elements.
            group: the ranks that share them.
            device: where the group's backend wants its buffers (offloaded state lies on the CPU, NCCL does not).
        """
        sent = local.index_select(0, self.send_index.to(local.device)).to(device)
        received = sent.new_empty(sum(self.recv_counts), local.shape[1])
        dist.all_to_all_single(received, sent, self.recv_counts, self.send_counts, group=group)
        return received.to(local.device).index_select(0, self.recv_index.to(local.device))

    def back(self, result: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
        """Carry what became of a result to where its elements came from; only where both indices are permutations."""
        sent = torch.empty_like(result)
        sent[self.recv_index.long().to(result.device)] = result
        sent = sent.to(device)
        received = sent.new_empty(sum(self.send_counts), result.shape[1])
        dist.all_to_all_single(received, sent, self.send_counts, self.recv_counts, group=group)
        local = torch.empty_like(received, device=result.device)
        local[self.send_index.long().to(result.device)] = received.to(result.device)
        return local


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation))
    return inverse


def _narrow(index: Tensor) -> Tensor:
    """int32 where it fits: an index weighs as much as the element it moves."""
    return index.int() if index.numel() == 0 or int(index.max()) < 2**31 else index


def _owner(bounds: Tensor, position: Tensor) -> Tensor:
    """The rank q with ``bounds[q] <= position < bounds[q + 1]``; empty ranks own nothing."""
    return torch.searchsorted(bounds, position, right=True) - 1


def plan_rows(partitions: Sequence[Partition], rank: int) -> Exchange:
    """From the flat intervals that the ranks hold to the feature rows that they own.

    The local buffer is the concatenation of the held intervals, the result that of the owned rows (k_i, r), both
    factor by factor.
    """
    world = len(partitions[0].bounds) - 1 if partitions else 1
    destinations, places, sources = [], [], []
    base = 0
    for partition in partitions:
        factor, bounds, row_bounds = partition.factor, partition.bounds, partition.row_bounds
        held = torch.arange(int(bounds[rank]), int(bounds[rank + 1]))
        row = held % factor.count if factor.side == "A" else held // factor.rank
        destinations.append(_owner(row_bounds, row))
        rows = torch.arange(int(row_bounds[rank]), int(row_bounds[rank + 1]))[:, None]
        columns = torch.arange(factor.rank)[None, :]
        owned = columns * factor.count + rows if factor.side == "A" else rows * factor.rank + columns
        sources.append(_owner(bounds, owned.reshape(-1)))
        places.append(base + owned.reshape(-1))
        base += factor.numel
    destination = torch.cat(destinations) if destinations else torch.empty(0, dtype=torch.int64)
    source = torch.cat(sources) if sources else torch.empty(0, dtype=torch.int64)
    # A sender orders its elements by destination, then as they lie; so they come by source, then by place.
    by_place = torch.argsort(torch.cat(places)) if places else torch.empty(0, dtype=torch.int64)
    arrival = by_place[torch.argsort(source[by_place], stable=True)]
    return Exchange(
        _narrow(torch.argsort(destination, stable=True)),
        torch.bincount(destination, minlength=world).tolist(),
        _narrow(_inverse(arrival)),
        torch.bincount(source, minlength=world).tolist(),
    )


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The concatenation of ``arange(start, start + length)``."""
    if int(lengths.sum()) == 0:
        return torch.empty(0, dtype=torch.int64)
    ends = lengths.cumsum(0)
    steps = torch.arange(int(ends[-1]))
    return steps + torch.repeat_interleave(starts - (ends - lengths), lengths)


def plan_gather(moving: Sequence[Partition], partners: Sequence[Partition], rank: int) -> Exchange | None:
    """From owned rows of the partners to whole partners, for the ranks that own rows of the moving factors.

    The elements are rows here: the local buffer is the concatenation of the owned rows of ``partners``, all of one
    rank r; the result that of the whole partners (l, r) that this rank needs and does not hold whole. None where no
    rank lacks anything.
    """
    needed = torch.stack([m.rows > 0 for m in moving]) & ~torch.stack([p.holds_whole for p in partners])  # (F, N)
    if not bool(needed.any()):
        return None
    lengths = torch.stack([p.rows for p in partners])  # (F, N)
    own = lengths[:, rank]
    own_starts = own.cumsum(0) - own
    destination, index = needed.T.nonzero(as_tuple=True)
    send_counts = torch.zeros(needed.shape[1], dtype=torch.int64).index_add_(0, destination, own[index])
    mine = lengths[needed[:, rank]]  # (f, N)
    arriving = mine.T.reshape(-1)  # by source, then by factor
    places = (arriving.cumsum(0) - arriving).reshape(mine.shape[1], mine.shape[0]).T.reshape(-1)
    return Exchange(
        _narrow(_ranges(own_starts[index], own[index])),
        send_counts.tolist(),
        _narrow(_ranges(places, mine.reshape(-1))),
        mine.sum(0).tolist(),
    )
