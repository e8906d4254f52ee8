"""Who owns which rows, and who sends which elements to whom: planned by arithmetic alone, each rank its own part.

A factor's elements are numbered as DeepSpeed flattens them. A rank *holds* a flat interval of them and *owns* an
interval of its feature rows. :func:`divide_rows` decides the second; one ``all_to_all_single`` brings the elements from
holders to owners (:func:`plan_rows`) and another the partners' rows to those who need them (:func:`plan_gather`).

Nothing here is as long as a factor, and nothing but the edges of what DeepSpeed holds is as long as there are ranks: an
index of the elements would weigh as much as they do, and edges of every factor on every rank more than a rank's share.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from ..factors import Factor


@dataclass(frozen=True, eq=False)
class Cut:
    """A line cut into consecutive intervals, one a rank.

    Attributes:
        first: the first rank whose interval is listed; those before it, and after the last, have nothing.
        edges: (n + 1,) int64 from 0 to the length of the line: rank ``first + i`` has ``edges[i]:edges[i + 1]``.
    """

    first: int
    edges: Tensor

    @cached_property
    def ranks(self) -> range:
        """The ranks that are listed."""
        return range(self.first, self.first + len(self.edges) - 1)

    def interval(self, rank: int) -> tuple[int, int]:
        """Begin and end of a rank's interval."""
        place = min(max(rank - self.first, -1), len(self.edges) - 1)
        begin, end = max(place, 0), min(place + 1, len(self.edges) - 1)
        return int(self.edges[begin]), int(self.edges[end])

    def length(self, rank: int) -> int:
        begin, end = self.interval(rank)
        return end - begin

    def lengths(self, ranks: range) -> Tensor:
        """The lengths of consecutive ranks' intervals."""
        places = torch.arange(ranks.start, ranks.stop + 1) - self.first
        return self.edges[places.clamp(0, len(self.edges) - 1)].diff()

    def owner(self, position: Tensor) -> Tensor:
        """The rank in whose interval each position lies."""
        return self.first + torch.searchsorted(self.edges, position, right=True) - 1

    @cached_property
    def whole(self) -> int | None:
        """The rank that has the whole line, if one does."""
        all_of_it = (self.edges.diff() == self.edges[-1]).nonzero()
        return self.first + int(all_of_it[0]) if len(all_of_it) else None

    def bounds(self, world: int) -> Tensor:
        """(N + 1,), rank q has ``bounds[q]:bounds[q + 1]``."""
        after = world + 1 - self.first - len(self.edges)
        return torch.cat([self.edges.new_zeros(self.first), self.edges, self.edges[-1:].expand(after)])


@functools.lru_cache(maxsize=1024)  # at stage 3 factors of one size are cut alike, and then share their edges
def even_cut(size: int, start: int, length: int) -> Cut:
    """What equal parts of ``size`` leave of a line of ``length`` that begins at ``start`` of the first part."""
    first, last = start // size, (start + length - 1) // size
    return Cut(first, (torch.arange(first, last + 2) * size - start).clamp(0, length))


@dataclass(frozen=True, eq=False)
class Partition:
    """How one factor is spread over the ranks.

    Attributes:
        factor: the factor.
        held: how its flat elements are cut.
        owned: how its feature rows are cut.
    """

    factor: Factor
    held: Cut
    owned: Cut

    @property
    def stays(self) -> bool:
        """Whether one rank both holds and owns all of it, so that nothing has to travel."""
        return self.held.whole is not None and self.held.whole == self.owned.whole

    @property
    def line(self) -> tuple[int, int]:
        """Length of a line of consecutive elements in which the rows follow each other, and the elements of each row
        in it: all of ``B`` is one such line, each of the E r rows of the matrix ``A`` is another.
        """
        return (self.factor.count, 1) if self.factor.side == "A" else (self.factor.numel, self.factor.width)


def members_of(factor: Partition, partner: Partition) -> range:
    """The ranks among which both factors of a pair lie: from the first that owns a row to the last."""
    owned = factor.owned.ranks, partner.owned.ranks
    return range(min(ranks.start for ranks in owned), max(ranks.stop for ranks in owned))


def block_of(factor: Factor) -> str:
    """The part of the model that a factor belongs to: its layer's number in the first list of layers on its path."""
    found = re.match(r".*?\.\d+\.", factor.name)
    return found.group() if found else factor.name.rpartition(".lora_")[0]


def blocks_of(factors: Sequence[Factor]) -> list[list[Factor]]:
    """Consecutive factors of one layer of the model each."""
    return [list(block) for _, block in groupby(factors, block_of)]


def divide_rows(factors: Sequence[Factor], held: Sequence[Cut], world: int) -> list[Cut]:
    """Which feature rows each rank owns: an equal share of the state and of the work, of as few factors as possible.

    Where DeepSpeed keeps factors together (stages 1 and 2) and each rank has a layer or more, the rows are where their
    elements are: a rank that holds ``[a, b)`` of a factor of row width w owns its rows ``[ceil(a / w), ceil(b / w))``.

    Elsewhere the layers follow each other along the ranks, each on as many as its share of the state, and every factor
    of a layer is cut evenly over that layer's ranks. (A factor cut over all ranks, as stage 3 holds it, would need its
    partner on every rank: traffic and (r, r) matrices that do not shrink. A rank with a piece of one factor, as in
    stages 1 and 2 beyond one rank a layer, would rest on every second step, and have more or less to do by the shape of
    the partner.)
    """
    blocks = blocks_of(factors)
    if world <= len(blocks) and any(cut.whole is not None for cut in held):
        return [Cut(cut.first, -(-cut.edges // f.width)) for f, cut in zip(factors, held, strict=True)]
    # Of a row: second moment r (r + 1) / 2, momentum r, pending or before r, times two.
    weights = [sum(f.numel * (f.rank + 5) for f in block) for block in blocks]
    total, place, cuts = sum(weights), 0, []
    for block, weight in zip(blocks, weights, strict=True):
        first, last = place * world // total, ((place + weight) * world - 1) // total
        shares = [min(max(q * total - place * world, 0), weight * world) for q in range(first, last + 2)]
        cut = {  # factors of as many rows are cut alike
            count: Cut(first, torch.tensor([-(-count * share // (weight * world)) for share in shares]))
            for count in {f.count for f in block}
        }
        cuts += [cut[f.count] for f in block]
        place += weight
    return cuts


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of consecutive elements of a buffer: ``starts`` and ``lengths`` (n,)."""

    starts: Tensor
    lengths: Tensor

    def index(self, device: torch.device) -> Tensor:
        """The elements' places, run after run. Made where and when it is needed: int64, it is no small thing."""
        starts, lengths = (runs.to(device, non_blocking=True) for runs in (self.starts, self.lengths))
        offsets = starts - (lengths.cumsum(0) - lengths)
        total = int(self.lengths.sum())
        return torch.arange(total, device=device) + torch.repeat_interleave(offsets, lengths, output_size=total)


@dataclass(frozen=True, eq=False)
class Exchange:
    """What one rank sends of a buffer to the others, and where what they send goes in another.

    Attributes:
        send: of the local buffer, in the order of their destinations.
        send_counts: elements for each rank.
        receive: of the result, in the order in which they come.
        receive_counts: elements from each rank.
    """

    send: Runs
    send_counts: list[int]
    receive: Runs
    receive_counts: list[int]

    def __call__(self, local: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
        """Exchange ``local`` (elements, width) and give the result (elements', width) on its device.

        Args:
            local: this rank's elements.
            group: the ranks that share them.
            device: where the group's backend wants its buffers (offloaded state lies on the CPU, NCCL does not).
        """
        return self.start(local, group, device)()

    def start(self, local: Tensor, group: dist.ProcessGroup, device: torch.device) -> Callable[[], Tensor]:
        """Begin :meth:`__call__`; what is returned waits for its end and gives the result."""
        sent = local.index_select(0, self.send.index(local.device)).to(device)
        received = sent.new_empty(sum(self.receive_counts), local.shape[1])
        counts = self.receive_counts, self.send_counts
        work = dist.all_to_all_single(received, sent, *counts, group=group, async_op=True)
        return functools.partial(self._finish, work, sent, received, local.device)

    def _finish(self, work: dist.Work, sent: Tensor, received: Tensor, device: torch.device) -> Tensor:
        """``sent`` is here to live as long as the exchange is under way."""
        places = self.receive.index(device)  # meanwhile
        work.wait()
        result = torch.empty_like(received, device=device)
        return result.index_copy_(0, places, received.to(device))

    def back(self, result: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
        """Carry what became of a result to where its elements came from."""
        sent = result.index_select(0, self.receive.index(result.device)).to(device)
        received = sent.new_empty(sum(self.send_counts), result.shape[1])
        dist.all_to_all_single(received, sent, self.send_counts, self.receive_counts, group=group)
        local = torch.empty_like(received, device=result.device)
        return local.index_copy_(0, self.send.index(result.device), received.to(result.device))


def _by_rank(ranks: list[Tensor], starts: list[Tensor], lengths: list[Tensor], world: int) -> tuple[Runs, list[int]]:
    """Runs sorted by the rank on the other side, in the given order for each, and the elements of each rank."""
    if not ranks:
        return Runs(*torch.empty(2, 0, dtype=torch.int64)), [0] * world
    rank, start, length = (torch.cat(parts) for parts in (ranks, starts, lengths))
    counts = torch.zeros(world, dtype=torch.int64).index_add_(0, rank, length)
    order = torch.argsort(rank, stable=True)
    return Runs(start[order], length[order]), counts.tolist()


def plan_rows(partitions: Sequence[Partition], rank: int, world: int) -> Exchange:
    """From the flat intervals that the ranks hold to the feature rows that they own.

    The local buffer is the concatenation of the held intervals, the result that of the owned rows, factor by factor and
    each in the order of the factor's own elements: rows (k_i, r) of ``B``, their transpose (r, k_i) of ``A``.
    """
    to, sent_from, sent = [], [], []
    source, placed_at, came = [], [], []
    local = result = 0
    for partition in partitions:
        factor, held, owned, (length, unit) = partition.factor, partition.held, partition.owned, partition.line
        begin, end = held.interval(rank)
        if begin < end:
            lines = torch.arange(begin // length, (end - 1) // length + 1)[:, None] * length
            starts = (lines + unit * owned.edges[:-1]).clamp(min=begin).flatten()
            lengths = (lines + unit * owned.edges[1:]).clamp(max=end).flatten() - starts
            kept = lengths > 0
            to.append(torch.arange(owned.ranks.start, owned.ranks.stop).repeat(len(lines))[kept])
            sent_from.append((starts + (local - begin))[kept])
            sent.append(lengths[kept])
            local += end - begin
        first, last = (unit * row for row in owned.interval(rank))
        if first < last:
            lines = torch.arange(factor.numel // length) * length
            points = torch.cat([lines + first, lines + last, held.edges]).sort().values
            starts, lengths = points[:-1], points.diff()
            line, place = starts // length, starts % length
            kept = (lengths > 0) & (first <= place) & (place < last)
            source.append(held.owner(starts[kept]))
            placed_at.append((line * (last - first) + place + (result - first))[kept])
            came.append(lengths[kept])
            result += factor.numel // length * (last - first)
    return Exchange(*_by_rank(to, sent_from, sent, world), *_by_rank(source, placed_at, came, world))


def plan_gather(moving: Sequence[Partition], partners: Sequence[Partition], rank: int, world: int) -> Exchange:
    """From owned rows of the partners to whole partners, for the ranks that own rows of the moving factors.

    The elements are rows here: the local buffer is the concatenation of the owned rows of ``partners``, all of one
    width; the result that of the whole partners (l, width) that this rank needs and does not own whole. Factors of
    which this rank owns rows of neither side may be left out.
    """
    to, sent_from, sent = [], [], []
    source, placed_at, came = [], [], []
    local = result = 0
    for m, p in zip(moving, partners, strict=True):
        rows, lengths = p.owned.length(rank), p.owned.edges.diff()
        needing = (m.owned.edges.diff() > 0).nonzero().flatten() + m.owned.first
        needing = needing if p.owned.whole is None else needing[needing != p.owned.whole]
        if rows:
            to.append(needing)
            sent_from.append(torch.full_like(needing, local))
            sent.append(torch.full_like(needing, rows))
            local += rows
        if bool((needing == rank).any()):
            kept = lengths > 0
            source.append((torch.arange(len(lengths)) + p.owned.first)[kept])
            placed_at.append(p.owned.edges[:-1][kept] + result)
            came.append(lengths[kept])
            result += p.factor.count
    return Exchange(*_by_rank(to, sent_from, sent, world), *_by_rank(source, placed_at, came, world))
