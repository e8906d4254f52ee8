"""ZeRO stages 1 to 3: every rank holds a flat interval of every parameter and owns the rows it decides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..factors import Factor
from .exchange import Cut, Partition, blocks_of, divide_rows, members_of, plan_gather, plan_rows
from .layout import Group, Layout, Rows, Share, Slice

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
            number, size = filled.get((factor.side, factor.rank), (0, 0))
            weight = 4 * factor.partner.numel
            if size and size + weight > BUCKET_BYTES:
                number, size = number + 1, 0
            filled[factor.side, factor.rank] = number, size + weight
            rounds[factor] = number
    return rounds


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
        self._sums = {f: members[place % len(members)] for place, (f, members) in enumerate(self._members.items())}
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

    def held(self, param: nn.Parameter) -> tuple[Tensor, Tensor]:
        held = self._held[param]
        return held.interval(held.flat.detach(), self.rank), held.cut.bounds(self.world)

    def row_bounds(self, factor: Factor) -> Tensor:
        return self._partitions[factor].owned.bounds(self.world)

    def in_one_place(self, factor: Factor) -> bool:
        here, there = self._partitions[factor].owned.whole, self._partitions[factor.partner].owned.whole
        return here is not None and here == there

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

    def read(self) -> Share:
        self._rows = {}
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
            local = torch.stack([torch.cat([i[0] for i in intervals]), torch.cat([i[1] for i in intervals])], dim=1)
            received = exchange(local, self._group, self._device).T
            place = 0
            for factor, (_, _, group) in zip(travelling, intervals, strict=True):
                start, stop = self._partitions[factor].owned.interval(self.rank)
                size = (stop - start) * factor.rank
                values, grad = (_as_rows(factor, t[place : place + size].clone()) for t in received)
                self._rows[factor] = Rows(values, grad, start, group)
                place += size
        self._rows = {f: self._rows[f] for f in self._factors}
        others = []
        for name, param in self._others.items():
            values, grad, group = self._interval(param)
            others.append(Slice(name, values, grad, self._held[param].cut.interval(self.rank)[0], group))
        return Share(self._rows, others)

    def gather(self, moving: Sequence[Factor]) -> Iterator[dict[Factor, Tensor]]:
        yield {f: self._rows[f.partner].values for f in moving if self.in_one_place(f) and len(self._rows[f].values)}
        buckets: dict[tuple[int, int], list[Factor]] = defaultdict(list)
        for factor in moving:
            if not self.in_one_place(factor):  # that nobody here needs a bucket does not spare the others' collective
                buckets[factor.rank, self._round[factor]] += [factor] if self.concerns(factor) else []
        for (width, _), bucket in sorted(buckets.items()):
            # Planned anew each time: it is quick, and kept it would be as much again as a rank's share.
            partners = [self._partitions[f.partner] for f in bucket]
            exchange = plan_gather([self._partitions[f] for f in bucket], partners, self.rank, self.world)
            rows = [self._rows[f.partner].values for f in bucket]
            local = torch.cat(rows) if rows else self._rows[moving[0]].values.new_empty(0, width)
            received = exchange(local, self._group, self._device)
            place = 0
            wholes = {}
            for factor in bucket:
                if len(self._rows[factor].values) == 0:
                    continue
                if self._partitions[factor.partner].owned.whole == self.rank:
                    wholes[factor] = self._rows[factor.partner].values
                else:
                    wholes[factor] = received[place : place + factor.partner.count]
                    place += factor.partner.count
            yield wholes

    def concerns(self, factor: Factor) -> bool:
        return self.rank in self._members[factor]

    def sum_over_owners(self, products: Sequence[tuple[Factor, Tensor]]) -> None:
        if not self._spread:
            return
        # One rank of each pair's sums, every pair another one, and sends the sum to the others.
        products = sorted(products, key=lambda product: self._sums[product[0]])
        sizes = [product.numel() for _, product in products]
        send_counts = [0] * self.world
        for (factor, _), size in zip(products, sizes, strict=True):
            send_counts[self._sums[factor]] += size
        mine = [(f, product) for f, product in products if self._sums[f] == self.rank]
        coming = [(q, product) for q in range(self.world) for f, product in mine if q in self._members[f]]
        counts = [0] * self.world
        for q, product in coming:
            counts[q] += product.numel()
        like = self._rows[self._factors[0]].values.new_empty(0, dtype=torch.float64)
        sent = torch.cat([like, *(product.reshape(-1) for _, product in products)]).to(self._device)
        received = sent.new_empty(sum(counts))
        dist.all_to_all_single(received, sent, counts, send_counts, group=self._group)
        parts: dict[int, list[Tensor]] = defaultdict(list)
        for (_, product), part in zip(coming, received.split([p.numel() for _, p in coming]), strict=True):
            parts[id(product)].append(part)
        totals = {key: torch.stack(pieces).sum(0) for key, pieces in parts.items()}
        back = torch.cat([received[:0], *(totals[id(product)] for _, product in coming)])
        summed = torch.empty_like(sent)
        dist.all_to_all_single(summed, back, send_counts, counts, group=self._group)
        for (_, product), total in zip(products, summed.split(sizes), strict=True):
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
        self._rows = {}  # it holds gradients, which DeepSpeed is to free


def _as_rows(factor: Factor, flat: Tensor) -> Tensor:
    """Consecutive rows of a factor (k_i, r) as a view of their elements in the order of the factor's own."""
    rows = flat.numel() // factor.rank
    return factor.rows_of(flat.view((factor.rank, rows) if factor.side == "A" else (rows, factor.rank)))
