"""ZeRO stages 1 to 3: every rank holds a flat interval of every parameter and owns the rows it decides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..factors import Factor
from .exchange import Cut, Partition, blocks_of, divide_rows, members_of, plan_gather, plan_rows
from .layout import Group, Layout, Rows, Share, Slice

T = TypeVar("T")

# Partner rows are gathered in buckets of at most this size a layer of the model: no rank ever holds all adapters in
# float32. At most two layers of the model are shared by a rank and others.
BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Held:
    """What one rank holds of one parameter.

    Attributes:
        flat: the float32 tensor that DeepSpeed hands to the optimizer.
        offset: where this parameter's interval begins in it.
        cut: how the parameter's flat elements are cut over the ranks.
    """

    flat: Tensor
    offset: int
    cut: Cut

    def interval(self, tensor: Tensor, rank: int) -> Tensor:
        """The held interval as a view of ``tensor``, which has the shape of ``flat``."""
        return tensor.narrow(0, self.offset, self.cut.length(rank))


def rounds_of(factors: Sequence[Factor]) -> dict[Factor, int]:
    """In which bucket each factor's partner is gathered: the buckets of all layers of the model travel at once, so that
    their number does not grow with the layers.
    """
    rounds = {}
    for block in blocks_of(factors):
        filled: dict[tuple[str, int], tuple[int, int]] = {}
        for factor in block:
            number, size = filled.get((factor.side, factor.width), (0, 0))
            weight = 4 * factor.partner.numel
            if size and size + weight > BUCKET_BYTES:
                number, size = number + 1, 0
            filled[factor.side, factor.width] = number, size + weight
            rounds[factor] = number
    return rounds


def one_ahead(started: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each of these gives, while the next one is under way already: never more than two of them are."""
    last: Callable[[], T] | None = None
    for wait in started:
        if last is not None:
            yield last()
        last = wait
    if last is not None:
        yield last()


class Sharded(Layout):
    """Rows over the ranks of one process group.

    A factor that one rank both holds and owns whole never travels: its rows are views of the flat tensor.

    Args:
        factors: of all pairs, in the same order on every rank.
        others: the other trainable parameters by name.
        held: what this rank holds of each.
        flats: the tensors that the optimizer will be handed, one or more a call.
        group: the ranks among which the parameters are partitioned.
        device: where the group's collectives want their buffers.
        publish: copies this rank's float32 values into what the model computes with. DeepSpeed does so after every
            call of ``step``, which is too early for the groups that came before the last one.
        refresh: the same for all ranks' values, outside a step.
    """

    def __init__(
        self,
        factors: Sequence[Factor],
        others: Mapping[str, nn.Parameter],
        held: Mapping[nn.Parameter, Held],
        flats: Sequence[Tensor],
        group: dist.ProcessGroup,
        device: torch.device,
        publish: Callable[[], None],
        refresh: Callable[[], None],
    ) -> None:
        self._factors = factors
        self._others = others
        self._held = held
        self._expected = {id(flat) for flat in flats}
        self._group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self._device = device
        self._publish = publish
        self._refresh = refresh
        self._arrived: dict[int, tuple[Tensor, Group]] = {}
        cuts = [held[f.param].cut for f in factors]
        owned = divide_rows(factors, cuts, self.world)
        self._partitions = {f: Partition(f, *both) for f, *both in zip(factors, cuts, owned, strict=True)}
        self._members = {f: members_of(self._partitions[f], self._partitions[f.partner]) for f in factors}
        self._spread = any(not self.in_one_place(f) for f in factors)
        self._round = rounds_of(factors)
        self._travelling: dict[str, list[Factor]] = {"A": [], "B": []}
        for f in factors:
            if not self._partitions[f].stays:
                self._travelling[f.side].append(f)
        self._to_rows = {
            side: plan_rows([self._partitions[f] for f in factors], self.rank, self.world) if factors else None
            for side, factors in self._travelling.items()
        }
        self._rows: dict[Factor, Rows] = {}
        self._flats = flats
        self._kept: dict[Factor, Tensor] = {}
        self._kept_for: Tensor | None = None

    def held(self, param: nn.Parameter) -> tuple[Tensor, Tensor]:
        held = self._held[param]
        return held.interval(held.flat.detach(), self.rank), held.cut.bounds(self.world)

    def row_bounds(self, factor: Factor) -> Tensor:
        return self._partitions[factor].owned.bounds(self.world)

    def in_one_place(self, factor: Factor) -> bool:
        here, there = self._partitions[factor].owned.whole, self._partitions[factor.partner].owned.whole
        return here is not None and here == there

    def sharers(self, factor: Factor) -> int:
        return 1 if self.in_one_place(factor) else len(self._members[factor])

    def bucket(self, factor: Factor) -> Hashable:
        return None if self.in_one_place(factor) else (factor.width, self._round[factor])

    def refresh(self) -> None:
        self._refresh()

    def collect(self, param_groups: Sequence[Group]) -> bool:
        for group in param_groups:
            for flat in group["params"]:
                if id(flat) not in self._expected:
                    raise RuntimeError(
                        "DeepSpeed handed LoFTAdamW a tensor that is in none of its partitions: its layout changed "
                        "after the first step. Build the engine and the optimizer anew."
                    )
                if id(flat) in self._arrived:
                    raise RuntimeError(
                        "DeepSpeed began a new step before it had handed over every partition of the last one, so "
                        "something else moves a part of the parameters. LoFT has to move all of them."
                    )
                if flat.grad is None:
                    raise RuntimeError("DeepSpeed handed LoFTAdamW a partition without its gradient.")
                self._arrived[id(flat)] = flat.grad, group
        return self._arrived.keys() == self._expected

    def _interval(self, param: nn.Parameter) -> tuple[Tensor, Tensor, Group]:
        """Values, gradient and parameter group of what this rank holds of a parameter."""
        held = self._held[param]
        grad, group = self._arrived[id(held.flat)]
        return held.interval(held.flat.detach(), self.rank), held.interval(grad, self.rank), group

    def _fingerprint(self) -> Tensor:
        """Changes when the master weights do: the sum of their bits as integers."""
        return torch.stack([flat.detach().view(torch.int32).sum(dtype=torch.int64) for flat in self._flats])

    def _kept_are_current(self) -> bool:
        """Whether the rows that all ranks kept are what the master weights are: nobody else has written those since
        (a checkpoint, ``safe_set_full_fp32_param``), here or on another rank.
        """
        now = self._fingerprint()
        changed = torch.ones_like(now) if self._kept_for is None else now - self._kept_for
        return not bool(self.all_reduce(changed.ne(0).any().float()))

    def read(self) -> Share:
        self._rows = {}
        kept = any(self._travelling.values()) and self._kept_are_current()
        for factor in self._factors:
            if self._partitions[factor].stays:
                values, grad, group = self._interval(factor.param)
                values, grad = (_as_rows(factor, t) for t in (values, grad))
                self._rows[factor] = Rows(values, grad, self._partitions[factor].owned.interval(self.rank)[0], group)
        for side, travelling in self._travelling.items():
            exchange = self._to_rows[side]
            if exchange is None:
                continue
            intervals = [self._interval(f.param) for f in travelling]
            parts = [torch.cat([i[1] for i in intervals])] + ([] if kept else [torch.cat([i[0] for i in intervals])])
            received = exchange(torch.stack(parts, dim=1), self._group, self._device).T
            place = 0
            for factor, (_, _, group) in zip(travelling, intervals, strict=True):
                start, stop = self._partitions[factor].owned.interval(self.rank)
                size = (stop - start) * factor.width
                grad, *own = (_as_rows(factor, t[place : place + size].clone()) for t in received)
                self._rows[factor] = Rows(own[0] if own else self._kept[factor], grad, start, group)
                place += size
        self._rows = {f: self._rows[f] for f in self._factors}
        others = []
        for name, param in self._others.items():
            values, grad, group = self._interval(param)
            others.append(Slice(name, values, grad, self._held[param].cut.interval(self.rank)[0], group))
        return Share.of(self._rows, others)

    def gather(self, moving: Sequence[Factor]) -> Iterator[dict[Factor, Tensor]]:
        return one_ahead(self._gathers(moving))

    def _gathers(self, moving: Sequence[Factor]) -> Iterator[Callable[[], dict[Factor, Tensor]]]:
        """Begins the exchange of a bucket, and yields what waits for it."""
        own = [f for f in moving if self.in_one_place(f) and self._rows[f].count]
        here = {f: f.partner.pairs_of(self._rows[f.partner].values) for f in own}
        yield lambda: here
        buckets: dict[tuple[int, int], list[Factor]] = defaultdict(list)
        for factor in moving:
            if not self.in_one_place(factor):  # that nobody here needs a bucket does not spare the others' collective
                buckets[factor.width, self._round[factor]] += [factor] if self.concerns(factor) else []
        for (width, _), bucket in sorted(buckets.items()):
            # Planned anew each time: it is quick, and kept it would be as much again as a rank's share.
            partners = [self._partitions[f.partner] for f in bucket]
            exchange = plan_gather([self._partitions[f] for f in bucket], partners, self.rank, self.world)
            rows = [self._rows[f.partner].values for f in bucket]
            local = torch.cat(rows) if rows else self._rows[moving[0]].values.new_empty(0, width)
            yield partial(self._partners_of, bucket, exchange.start(local, self._group, self._device))

    def _partners_of(self, bucket: Sequence[Factor], received: Callable[[], Tensor]) -> dict[Factor, Tensor]:
        wholes = {}
        rows, place = received(), 0
        for factor in bucket:
            if len(self._rows[factor].values) == 0:
                continue
            if self._partitions[factor.partner].owned.whole == self.rank:
                wholes[factor] = factor.partner.pairs_of(self._rows[factor.partner].values)
            else:
                wholes[factor] = factor.partner.pairs_of(rows[place : place + factor.partner.count])
                place += factor.partner.count
        return wholes

    def concerns(self, factor: Factor) -> bool:
        return self.rank in self._members[factor]

    def sum_over_owners(self, products: Sequence[tuple[Factor, Tensor]]) -> None:
        if not self._spread:
            return
        # All that the same ranks have parts of is one vector: each of them sums an even piece of it for the others.
        shared: dict[range, list[Tensor]] = defaultdict(list)
        for factor, product in products:
            shared[self._members[factor]].append(product)
        groups = sorted(shared, key=lambda members: (members.start, members.stop))
        like = self._rows[self._factors[0]].values.new_empty(0, dtype=torch.float64)
        vectors = [torch.cat([product.reshape(-1) for product in shared[members]]) for members in groups]
        # (rank, group) of every piece, in the order in which they travel, there and back.
        peers = sorted((q, place) for place, members in enumerate(groups) for q in members)
        pieces = [v.tensor_split(len(members)) for v, members in zip(vectors, groups, strict=True)]
        theirs = [pieces[place][q - groups[place].start] for q, place in peers]
        sizes = [pieces[place][self.rank - groups[place].start].numel() for _, place in peers]
        send_counts, counts = [0] * self.world, [0] * self.world
        for (q, _), piece, size in zip(peers, theirs, sizes, strict=True):
            send_counts[q] += piece.numel()
            counts[q] += size
        sent = torch.cat([like, *theirs]).to(self._device)
        received = sent.new_empty(sum(counts))
        dist.all_to_all_single(received, sent, counts, send_counts, group=self._group)
        parts: dict[int, list[Tensor]] = defaultdict(list)
        for (_, place), part in zip(peers, received.split(sizes), strict=True):
            parts[place].append(part)
        totals = {place: torch.stack(summands).sum(0) for place, summands in parts.items()}
        back = torch.cat([received[:0], *(totals[place] for _, place in peers)])
        dist.all_to_all_single(sent, back, send_counts, counts, group=self._group)
        for piece, total in zip(theirs, sent.split([piece.numel() for piece in theirs]), strict=True):
            piece.copy_(total)
        for vector, members in zip(vectors, groups, strict=True):
            own = shared[members]
            for product, total in zip(own, vector.split([product.numel() for product in own]), strict=True):
                product.copy_(total.view_as(product))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        buffer = tensor.to(self._device)
        dist.all_reduce(buffer, group=self._group)
        return tensor.copy_(buffer)

    def write(self, moved: Sequence[Factor]) -> None:
        moving = set(moved)
        for side, travelling in self._travelling.items():
            exchange = self._to_rows[side]
            if exchange is None or moving.isdisjoint(travelling):
                continue
            local = torch.cat([f.rows_of(self._rows[f].values).reshape(-1) for f in travelling])
            received = exchange.back(local[:, None], self._group, self._device)[:, 0]
            place = 0
            for factor in travelling:
                values, _, _ = self._interval(factor.param)
                values.copy_(received[place : place + len(values)])
                place += len(values)
        self._publish()
        self._arrived.clear()
        # Rows that travel stay with their owner: then the next step's gradients come without them.
        self._kept = {f: self._rows[f].values for side in self._travelling.values() for f in side}
        self._kept_for = self._fingerprint() if self._kept else None
        self._rows = {}  # it holds gradients, which DeepSpeed is to free


def _as_rows(factor: Factor, flat: Tensor) -> Tensor:
    """Consecutive rows of a factor (k_i, r) as a view of their elements in the order of the factor's own."""
    rows = flat.numel() // factor.width
    return factor.rows_of(flat.view((factor.width, rows) if factor.side == "A" else (rows, factor.width)))
