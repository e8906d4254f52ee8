"""A job, and how its factors are divided over the ranks: as :func:`loft_ds.sharding.exchange.divide_rows` does it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..blocks import Blocks
from ..factors import Factor
from ..sharding.exchange import Cut, Partition, divide_rows, even_cut, members_of
from .shapes import Shapes

FLOAT, DOUBLE = 4, 8
# DeepSpeed's own defaults (zero/config.py), in elements.
REDUCE_BUCKET, PERSISTENT = 500_000_000, 100_000


@dataclass(frozen=True)
class Job:
    """How a model is trained.

    Attributes:
        rank: of the adapters.
        world: ranks, that is GPUs.
        stage: of ZeRO.
        precision: bytes of a weight: 2 (with float32 masters) or 4.
        quantised: the frozen linear layers by bitsandbytes: "4bit", "4bit-double" (its scales as well), "8bit"; "" for
            none.
        second_moment: bytes of an entry: 4, or 2 with ``second_moment_dtype=torch.bfloat16``.
        offload: what lies in CPU memory: "second_moment" (LoFTAdamW's ``offload_second_moment``), "optimizer"
            (DeepSpeed's ``offload_optimizer``), "param" (``offload_param``, stage 3).
        tokens: of one GPU in a step.
        per_node: GPUs of a node.
        reduce_bucket: DeepSpeed's ``reduce_bucket_size``.
        persistent: DeepSpeed's ``stage3_param_persistence_threshold``.
    """

    rank: int = 16
    world: int = 1
    stage: int = 3
    precision: int = 2
    quantised: str = ""
    second_moment: int = FLOAT
    offload: frozenset[str] = frozenset()
    tokens: int = 4096
    per_node: int = 8
    reduce_bucket: int = REDUCE_BUCKET
    persistent: int = PERSISTENT


class Division:
    """How the factors are divided over the ranks, without a process.

    Args:
        factors: of all pairs.
        stage: of ZeRO.
        world: ranks.
        others: elements of each trained parameter that AdamW moves.
    """

    def __init__(self, factors: Sequence[Factor], stage: int, world: int, others: Sequence[int] = ()) -> None:
        self.factors = factors
        self.sizes = [*(f.numel for f in factors), *others]
        self.world = world if stage else 1  # at stage 0 every rank is as one alone
        # Elements of a rank's part of one flat buffer, whose length is a multiple of two a rank
        # (``nccl_start_alignment_factor``, zero/stage_1_and_2.py).
        self.size = -(-sum(self.sizes) // (2 * self.world)) * 2
        if stage == 3:
            held = [even_cut(-(-numel // self.world), 0, numel) for numel in self.sizes]
        else:
            starts = itertools.accumulate(self.sizes, initial=0)
            held = [even_cut(self.size, start, numel) for start, numel in zip(starts, self.sizes, strict=False)]
        self.others = held[len(factors) :]
        held = held[: len(factors)]
        owned = divide_rows(factors, held, self.world)
        self.partitions = {f: Partition(f, *cuts) for f, *cuts in zip(factors, held, owned, strict=True)}

    @property
    def joint(self) -> bool:
        """Whether both factors of a pair move on every step, as by default."""
        return Blocks().moves_jointly(self.factors[0].rank)

    @property
    def turns(self) -> float:
        """The part of the steps in which a factor moves: all of them, or every second one."""
        return 1.0 if self.joint else 0.5

    def in_one_place(self, factor: Factor) -> bool:
        here, there = self.partitions[factor].owned.whole, self.partitions[factor.partner].owned.whole
        return here is not None and here == there

    def members(self, factor: Factor) -> range:
        return members_of(self.partitions[factor], self.partitions[factor.partner])

    def summed(self, shares: Iterable[tuple[Cut, int, int]]) -> Tensor:
        """(N,), what each rank has of the cuts: so much for each unit of its interval, and so much where it has one."""
        each: dict[Cut, int] = defaultdict(int)
        once: dict[Cut, int] = defaultdict(int)
        for cut, by_unit, fixed in shares:  # many factors are cut alike
            each[cut] += by_unit
            once[cut] += fixed
        if not each:
            return torch.zeros(self.world, dtype=torch.int64)
        # All cuts at once, end to end, in place of thousands of small operations.
        edges, counts = torch.cat([cut.edges for cut in each]), torch.tensor([len(cut.ranks) + 1 for cut in each])
        ends, which = counts.cumsum(0), torch.arange(len(each)).repeat_interleave(counts)
        offset, unit, fix = torch.tensor([[cut.first for cut in each], [*each.values()], [*once.values()]])
        ranks = torch.arange(len(edges)) + (offset - (ends - counts))[which]
        lengths = edges.diff(append=edges[:1]).index_fill_(0, ends - 1, 0)  # none from one cut's end to the next one
        total = torch.zeros(self.world + 1, dtype=torch.int64)
        return total.index_add_(0, ranks, unit[which] * lengths + fix[which] * (lengths > 0))[:-1]

    @cached_property
    def by_side(self) -> dict[str, Tensor]:
        """(N,) for "A" and "B", how many elements of such factors each rank owns the rows of."""
        return {
            side: self.summed((p.owned, f.width, 0) for f, p in self.partitions.items() if f.side == side)
            for side in "AB"
        }

    @cached_property
    def elements(self) -> Tensor:
        """(N,), the sum of both."""
        return self.by_side["A"] + self.by_side["B"]

    @cached_property
    def larger(self) -> Tensor:
        """(N,), the larger of both."""
        return torch.maximum(*self.by_side.values())

    @cached_property
    def partners(self) -> dict[str, Tensor]:
        """(N,) for "A" and "B", elements of the partners of such factors that come to each rank where they move."""
        found = {side: torch.zeros(self.world, dtype=torch.int64) for side in "AB"}
        pairs: dict[tuple[str, Cut, Cut], int] = defaultdict(int)
        for f, p in self.partitions.items():
            pairs[f.side, p.owned, self.partitions[f.partner].owned] += f.width
        for (side, owned, partner), width in pairs.items():
            away = partner.edges[-1] - partner.lengths(owned.ranks)
            found[side][owned.ranks.start : owned.ranks.stop] += width * away * (owned.edges.diff() > 0)
        return found

    @cached_property
    def moving(self) -> list[Partition]:
        """Those of which one rank may hold what another one owns."""
        return [p for p in self.partitions.values() if not p.stays]

    @cached_property
    def travelling(self) -> Tensor:
        """(N,), the part of :attr:`elements` that another rank may hold."""
        return self.summed((p.owned, p.factor.width, 0) for p in self.moving)

    @cached_property
    def holding(self) -> Tensor:
        """(N,), elements that each rank holds, of what another rank may own."""
        return self.summed((p.held, 1, 0) for p in self.moving)

    @cached_property
    def left(self) -> Tensor:
        """(N,), elements of AdamW's that each rank holds."""
        return self.summed((cut, 1, 0) for cut in self.others)

    @cached_property
    def cut_gradients(self) -> Tensor:
        """(N,), elements of gradients that each rank keeps at stages 1 and 2 although it holds others of the parameter:
        a part of it is a view of the whole (``get_flat_partition``, zero/stage_1_and_2.py).
        """
        edges = torch.tensor([0, *itertools.accumulate(self.sizes)])
        bounds = (torch.arange(self.world + 1) * self.size).clamp(max=int(edges[-1]))
        begin, end = bounds[:-1], bounds[1:]
        first = edges[torch.searchsorted(edges, begin, right=True) - 1]
        last = edges[torch.searchsorted(edges, end)]
        return torch.where(begin < end, (last - first) - (end - begin), 0)

    @cached_property
    def shared(self) -> dict[range, int]:
        """How many pairs lie among the same ranks."""
        found: dict[range, int] = defaultdict(int)
        for f in self.factors:
            found[self.members(f)] += f.experts if f.side == "A" else 0
        return found

    @property
    def matrices(self) -> int:
        """Bytes of the (r, r) matrices of one pair: basis and weights of both factors, and where these alternate a
        rotation of the one that rests.
        """
        return DOUBLE * self.factors[0].rank ** 2 * (4 if self.joint else 5)

    @cached_property
    def bases(self) -> Tensor:
        """(N,), bytes of all (r, r) matrices: of each pair on the ranks among which it lies."""
        total = torch.zeros(self.world, dtype=torch.int64)
        for members, pairs in self.shared.items():
            total[members.start : members.stop] += pairs * self.matrices
        return total


def division_of(shapes: Shapes, job: Job) -> Division:
    """The division that a job's ranks arrive at."""
    return Division(shapes.factors(job.rank), job.stage, job.world, shapes.untreated(job.rank))
