"""ZeRO stages 1 to 3: every rank holds a flat interval of every parameter and owns the rows it decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..factors import Factor
from .exchange import Partition, plan_gather, plan_rows
from .layout import Group, Layout, Rows, Share, Slice

# Partner rows are gathered in buckets of at most this size, so that no rank ever holds all adapters in float32.
BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Held:
    """What one rank holds of one parameter.

    Attributes:
        flat: the float32 tensor that DeepSpeed hands to the optimizer.
        offset: where this parameter's interval begins in it.
        bounds: (N + 1,) int64, rank q holds the parameter's flat elements ``bounds[q]:bounds[q + 1]``.
    """

    flat: Tensor
    offset: int
    bounds: Tensor

    def interval(self, tensor: Tensor, rank: int) -> Tensor:
        """The held interval as a view of ``tensor``, which has the shape of ``flat``."""
        return tensor.narrow(0, self.offset, int(self.bounds[rank + 1] - self.bounds[rank]))


class Sharded(Layout):
    """Rows over the ranks of one process group.

    Factors that one rank holds whole never travel: their rows are views of the flat tensor. Only factors that a
    boundary cuts are exchanged.

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
        self._partitions = {f: Partition(f, held[f.param].bounds) for f in factors}
        self._split: dict[str, list[Factor]] = {"A": [], "B": []}
        for f in factors:
            if self._partitions[f].is_split:
                self._split[f.side].append(f)
        self._to_rows = {
            side: plan_rows([self._partitions[f] for f in split], self.rank).to(flats[0].device) if split else None
            for side, split in self._split.items()
        }
        self._rows: dict[Factor, Rows] = {}

    def held(self, param: nn.Parameter) -> tuple[Tensor, Tensor]:
        held = self._held[param]
        return held.interval(held.flat.detach(), self.rank), held.bounds

    def row_bounds(self, factor: Factor) -> Tensor:
        return self._partitions[factor].row_bounds

    def in_one_place(self, factor: Factor) -> bool:
        here, there = self._partitions[factor].holds_whole, self._partitions[factor.partner].holds_whole
        return bool((here & there).any())

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
        return self.held(param)[0], held.interval(grad, self.rank), group

    def read(self) -> Share:
        self._rows = {}
        for factor in self._factors:
            if not self._partitions[factor].is_split:
                values, grad, group = self._interval(factor.param)
                rows = len(values) // factor.rank
                shape = (factor.rank, rows) if factor.side == "A" else (rows, factor.rank)
                values, grad = (factor.rows_of(t.reshape(shape)) for t in (values, grad))
                self._rows[factor] = Rows(values, grad, int(self._partitions[factor].row_bounds[self.rank]), group)
        for side, split in self._split.items():
            exchange = self._to_rows[side]
            if exchange is None:
                continue
            intervals = [self._interval(f.param) for f in split]
            local = torch.stack([torch.cat([i[0] for i in intervals]), torch.cat([i[1] for i in intervals])], dim=1)
            received = exchange(local, self._group, self._device)
            place = 0
            for factor, (_, _, group) in zip(split, intervals, strict=True):
                partition = self._partitions[factor]
                start, rows = int(partition.row_bounds[self.rank]), int(partition.rows[self.rank])
                block = received[place : place + rows * factor.rank]
                values, grad = (block[:, i].reshape(rows, factor.rank) for i in (0, 1))
                self._rows[factor] = Rows(values.clone(), grad.clone(), start, group)
                place += rows * factor.rank
        self._rows = {f: self._rows[f] for f in self._factors}
        others = []
        for name, param in self._others.items():
            values, grad, group = self._interval(param)
            others.append(Slice(name, values, grad, int(self._held[param].bounds[self.rank]), group))
        return Share(self._rows, others)

    def _buckets(self, moving: Sequence[Factor]) -> Iterator[list[Factor]]:
        """Cut into runs of one rank r each whose partners together stay below ``BUCKET_BYTES``."""
        bucket: list[Factor] = []
        size = 0
        for factor in sorted(moving, key=lambda f: f.rank):
            weight = 4 * factor.partner.numel
            if bucket and (factor.rank != bucket[0].rank or size + weight > BUCKET_BYTES):
                yield bucket
                bucket, size = [], 0
            bucket.append(factor)
            size += weight
        if bucket:
            yield bucket

    def gather(self, moving: Sequence[Factor]) -> Iterator[dict[Factor, Tensor]]:
        for bucket in self._buckets(moving):
            partitions = [self._partitions[f] for f in bucket]
            partners = [self._partitions[f.partner] for f in bucket]
            # Planned anew each time: kept, the plan would be the one thing here that does not shrink with the ranks.
            exchange = plan_gather(partitions, partners, self.rank)
            received = None
            if exchange is not None:
                local = torch.cat([self._rows[f.partner].values for f in bucket])
                received = exchange(local, self._group, self._device)
            place = 0
            wholes = {}
            for factor in bucket:
                if len(self._rows[factor].values) == 0:
                    continue
                partner = factor.partner
                if bool(self._partitions[partner].holds_whole[self.rank]):
                    wholes[factor] = self._rows[partner].values
                else:
                    assert received is not None
                    wholes[factor] = received[place : place + partner.count]
                    place += partner.count
            yield wholes

    def all_reduce(self, tensor: Tensor) -> Tensor:
        buffer = tensor.to(self._device)
        dist.all_reduce(buffer, group=self._group)
        return tensor.copy_(buffer)

    def write(self, moved: Sequence[Factor]) -> None:
        for side, split in self._split.items():
            exchange = self._to_rows[side]
            if exchange is None or not any(f in split for f in moved):
                continue
            local = torch.cat([self._rows[f].values.reshape(-1) for f in split])
            received = exchange.back(local[:, None], self._group, self._device)[:, 0]
            place = 0
            for factor in split:
                values, _ = self.held(factor.param)
                values.copy_(received[place : place + len(values)])
                place += len(values)
        self._publish()
        self._arrived.clear()
        self._rows = {}  # it holds gradients, which DeepSpeed is to free
