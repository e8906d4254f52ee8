"""Memory, traffic and time of a training step as pure functions of shapes, rank of the adapters, ranks and stage.

It is arithmetic on what the code does: rows are divided by :func:`loft_ds.sharding.exchange.divide_rows`, traffic is
counted from the plans that the ranks carry out, and DeepSpeed's buffers are those of DeepSpeed 0.19 (named below).
``tests/test_plan.py`` compares it with what ranks have really allocated.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..factors import JOINT_RANK, Factor
from ..kernels.tiled import WORKSPACE_BYTES
from ..sharding.exchange import Cut, Partition, divide_rows, even_cut, members_of, plan_gather, plan_rows
from ..sharding.sharded import BUCKET_BYTES, rounds_of
from . import hardware
from .shapes import Shapes

FLOAT, DOUBLE = 4, 8
# DeepSpeed's own defaults (zero/config.py), in elements.
REDUCE_BUCKET, PERSISTENT, PREFETCH, MAX_LIVE = 500_000_000, 100_000, 50_000_000, 1_000_000_000


@dataclass(frozen=True)
class Job:
    """How a model is trained.

    Attributes:
        rank: of the adapters.
        world: ranks, that is GPUs.
        stage: of ZeRO.
        precision: bytes of a weight: 2 (with float32 masters) or 4.
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
    def turns(self) -> float:
        """The part of a step's turns that a factor has: every second one, or all where ``turns="auto"`` is "joint"."""
        return 1.0 if self.factors[0].rank <= JOINT_RANK else 0.5

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
        # All cuts at once, end to end: thousands of small operations would take seconds.
        edges, counts = torch.cat([cut.edges for cut in each]), torch.tensor([len(cut.ranks) + 1 for cut in each])
        ends, which = counts.cumsum(0), torch.arange(len(each)).repeat_interleave(counts)
        offset, unit, fix = torch.tensor([[cut.first for cut in each], [*each.values()], [*once.values()]])
        ranks = torch.arange(len(edges)) + (offset - (ends - counts))[which]
        lengths = edges.diff(append=edges[:1]).index_fill_(0, ends - 1, 0)  # none from one cut's end to the next one
        total = torch.zeros(self.world + 1, dtype=torch.int64)
        return total.index_add_(0, ranks, unit[which] * lengths + fix[which] * (lengths > 0))[:-1]

    @cached_property
    def elements(self) -> Tensor:
        """(N,), how many elements of factors each rank owns the rows of."""
        return self.summed((p.owned, f.width, 0) for f, p in self.partitions.items())

    @cached_property
    def moving(self) -> list[Partition]:
        """Those of which one rank may hold what another one owns."""
        return [p for p in self.partitions.values() if not p.stays]

    @cached_property
    def travelling(self) -> Tensor:
        """(N,), the part of :attr:`elements` that another rank may hold."""
        return self.summed((p.owned, p.factor.width, 0) for p in self.moving)

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
        """Numbers of all (r, r) matrices of the factors that lie among the same ranks."""
        found: dict[range, int] = defaultdict(int)
        for f in self.factors:
            found[self.members(f)] += f.experts * f.rank**2
        return found

    @cached_property
    def bases(self) -> Tensor:
        """(N,), bytes of the bases: of each pair on the ranks among which it lies; and of the second moments' weights:
        of each factor where it has rows.
        """
        total = self.summed((p.owned, 0, DOUBLE * f.experts * f.rank**2) for f, p in self.partitions.items())
        for members, numbers in self.shared.items():
            total[members.start : members.stop] += DOUBLE * numbers
        return total


def division_of(shapes: Shapes, job: Job) -> Division:
    """The division that a job's ranks arrive at."""
    return Division(shapes.factors(job.rank), job.stage, job.world, shapes.untreated(job.rank))


def _padded(numel: int, world: int) -> int:
    return -(-numel // world)


def memory(shapes: Shapes, job: Job, division: Division | None = None) -> dict[str, Tensor]:
    """Bytes by kind on every rank, (N,) each, between a backward pass and the optimizer's step.

    DeepSpeed's kinds are as 0.19 allocates them: flat 16-bit weights and the 16-bit gradients of this rank's part
    (``bit16_groups_flat``, ``averaged_gradients``; stage 3: ``fp16_partitioned_groups_flat``,
    ``grad_partitions_flat_buffer``), float32 masters, which in fp32 are the weights themselves at stage 0.
    """
    division = division or division_of(shapes, job)
    base, whole = shapes.parameters, sum(division.sizes)
    sixteen = job.precision == 2
    gradients: int | Tensor
    if job.stage == 0:
        adapters, gradients, masters = whole, whole, whole if sixteen else 0
    elif job.stage < 3:
        adapters, gradients, masters = division.size * job.world, division.size + division.cut_gradients, division.size
    else:
        part = sum(_padded(numel, job.world) for numel in division.sizes)
        kept = job.persistent if job.world > 1 else 0  # one rank's part is the whole
        gathered = sum(numel for numel in division.sizes if numel <= kept)
        adapters, gradients, masters = part + gathered, part, part
        base = sum(
            count * (_padded(numel, job.world) + (numel if numel <= kept else 0))
            for numel, count in shapes.weights.items()
        )
    one = torch.ones(job.world, dtype=torch.int64)
    rows = {
        "momentum": FLOAT * (division.elements + division.left),
        "second moments": job.second_moment * (job.rank + 1) * division.elements // 2 + FLOAT * division.left,
        "pending or previous": FLOAT * division.elements,
        "bases": division.bases,
        "kept rows": FLOAT * division.travelling,
    }
    return {
        "base weights": one * job.precision * base,
        "adapters": one * job.precision * adapters,
        "gradients": one * job.precision * gradients,
        "masters": one * FLOAT * masters,
        **{kind: part.expand(job.world) for kind, part in rows.items()},
        "reduce buckets": one * (job.precision * job.reduce_bucket if job.stage == 3 else 0),
    }


def work(shapes: Shapes, job: Job, division: Division) -> dict[str, float]:
    """Bytes of what comes and goes within a step, the largest of any rank; an estimate from the code, not measured.

    Of the optimizer: rows and gradients of both sides in float32, what an exchange of one side holds at once, the
    gathered partners, the step of what moves, the kernels' workspace. At stage 3 the whole weights of two decoder
    layers, the largest embedding and the prefetch bucket; at stages 1 and 2 the bucket that gradients are reduced in.
    Activations with checkpointing: the hidden state of every decoder layer, one layer anew (34 bytes a token and
    feature: Korthikanti et al. 2022, without the attention matrix), and the logits with their gradient in float32.
    """
    owned = division.elements.max().item()
    held = division.size
    turns = division.turns
    gathered = 0 if job.stage == 0 else min(4 * turns * BUCKET_BYTES, FLOAT * turns * sum(division.sizes))
    carried = FLOAT * 5 * held if division.moving else 0
    optimizer = FLOAT * (held + (3 + turns) * owned) + carried + 3 * gathered + WORKSPACE_BYTES
    if job.stage == 3:
        body = shapes.adapted / shapes.depth
        weights = job.precision * (2 * body + shapes.vocabulary * shapes.hidden + PREFETCH)
    else:
        weights = job.precision * (2 * job.reduce_bucket if job.stage else 0)
    activations = job.tokens * (
        shapes.depth * shapes.hidden * job.precision
        + 34 * shapes.hidden * job.precision / 2
        + shapes.vocabulary * (job.precision + 2 * FLOAT)
    )
    return {"optimizer's work": optimizer, "weights in flight": weights, "activations": activations}


def checkpoint_bytes(division: Division, job: Job) -> int:
    """Of what ``save_checkpoint`` writes: float32 values, the moments, pending or previous, bases, weights."""
    elements, left = int(division.elements.sum()), int(division.left.sum())
    factors = 3 * FLOAT * elements + job.second_moment * (job.rank + 1) * elements // 2
    return factors + 2 * DOUBLE * sum(division.shared.values()) + 3 * FLOAT * left


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step, the mean of one of ``B`` and one of ``A``, once it has rows of its own: in
    the first step the master weights come with the gradients. Factors take the turns that they have by default.

    Attributes:
        gradients: elements of the gradients of its rows that lie elsewhere.
        updates: new values of elements that it holds and another rank owns.
        partners: the other factors' rows.
        products: of (r, r) matrices, there and back: see :func:`products`.
        needed: the part of the products that the sums themselves are.
        sent: all that the rank sends.
        collectives: how many of LoFT's own.
        peers: ranks that it exchanges with in the largest of them.
    """

    gradients: float
    updates: float
    partners: float
    products: float
    needed: float
    sent: float
    collectives: float
    peers: int

    @property
    def total(self) -> float:
        return self.gradients + self.updates + self.partners + self.products

    @property
    def least(self) -> float:
        """What the division of the rows demands: gradients in, parameters out, and the partners' rows."""
        return self.gradients + self.updates + self.partners


def products(division: Division, needed: bool = False) -> Tensor:
    """(N,), bytes of the Gram matrices (a triangle) and cross products of the pairs about to move, float64; and where
    both factors of a pair move, of the products that tell what one leaves to the other, of gradients and of steps.

    A piece of each comes from every other member, and the sums of all other pieces come back; what is ``needed`` are
    the sums, once on every rank that takes part.
    """
    total = torch.zeros(division.world, dtype=torch.float64)
    for members, numbers in division.shared.items():
        if (n := len(members)) > 1:
            # A triangle and a square is r (3 r + 1) / 2. Of all numbers in r^2, half are of one side.
            rank = division.factors[0].rank
            squares = division.turns * (3 * rank + 1) / (2 * rank) + (2 / 2 if division.turns == 1 else 0)
            sums = DOUBLE * numbers * squares
            total[members.start : members.stop] += sums * (1 if needed else 2 * (n - 1) / n)
    return total


def received(division: Division) -> dict[str, Tensor]:
    """Bytes that every rank receives by kind, (N,) each: :func:`traffic` of all ranks at once, without their plans."""
    stay = torch.zeros(division.world, dtype=torch.int64)
    for (held, owned, line), alike in Counter((p.held, p.owned, p.line) for p in division.moving).items():
        length, unit = line
        lines = torch.arange(int(held.edges[-1]) // length)[:, None] * length
        bounds = held.bounds(division.world)[owned.ranks.start : owned.ranks.stop + 1]
        begin, end = lines + unit * owned.edges[:-1], lines + unit * owned.edges[1:]
        both = (end.minimum(bounds[1:]) - begin.maximum(bounds[:-1])).clamp(min=0).sum(0)
        stay[owned.ranks.start : owned.ranks.stop] += alike * both
    holding = division.summed((p.held, 1, 0) for p in division.moving)
    partners = torch.zeros(division.world, dtype=torch.int64)
    pairs: dict[tuple[Cut, Cut], int] = defaultdict(int)
    for f, p in division.partitions.items():
        pairs[p.owned, division.partitions[f.partner].owned] += f.width
    for (owned, partner), width in pairs.items():
        away = partner.edges[-1] - partner.lengths(owned.ranks)
        partners[owned.ranks.start : owned.ranks.stop] += width * away * (owned.edges.diff() > 0)
    return {
        "gradients": FLOAT * (division.travelling - stay).double(),
        "updates": FLOAT * division.turns * (holding - stay).double(),
        "partners": FLOAT * division.turns * partners.double(),
        "products": products(division),
    }


def traffic(division: Division, rank: int) -> Traffic:
    """What one rank receives, from the very plans that it would carry out."""
    world, parts = division.world, division.partitions
    rank = rank if world > 1 else 0  # at stage 0 each is as one alone
    came = updates = gathered = given = peers = 0
    collectives, turns = 0.0, division.turns

    def others(counts: list[int]) -> int:
        nonlocal peers
        peers = max(peers, sum(1 for q, n in enumerate(counts) if n and q != rank))
        return sum(counts) - counts[rank]

    rounds = rounds_of(division.factors)
    spread = [f for f in division.factors if not division.in_one_place(f)]
    # Both factors of a pair that move together share a round of exchanges.
    gathers = [spread] if turns == 1 else [[f for f in spread if f.side == side] for side in "AB"]
    collectives += turns * sum(len({(f.width, rounds[f]) for f in moving}) for moving in gathers)
    for side in "AB":
        travelling = [p for p in division.moving if p.factor.side == side]
        if travelling:
            plan = plan_rows(travelling, rank, world)
            came += others(plan.receive_counts)
            updates += others(plan.send_counts)
            collectives += 1 + turns  # in on every step, out on its turns
        moving = [f for f in spread if f.side == side]
        near = [f for f in moving if any(parts[g].owned.length(rank) for g in (f, f.partner))]
        for width in {f.width for f in near}:
            bucket = [f for f in near if f.width == width]
            plan = plan_gather([parts[f] for f in bucket], [parts[f.partner] for f in bucket], rank, world)
            gathered += width * others(plan.receive_counts)
            given += width * others(plan.send_counts)
    sums = float(products(division)[rank])
    # Of products there and back, and of one number.
    collectives += (2 if turns < 1 else 6) * bool(spread) + (2 if division.moving else 1)
    return Traffic(
        gradients=FLOAT * came,
        updates=FLOAT * turns * updates,
        partners=FLOAT * turns * gathered,
        products=sums,
        needed=float(products(division, needed=True)[rank]),
        sent=FLOAT * (updates + turns * (came + given)) + sums,
        collectives=collectives,
        peers=peers,
    )


def deepspeed_traffic(shapes: Shapes, job: Job) -> dict[str, float]:
    """Bytes that DeepSpeed's own collectives bring to a rank in a step, as rings carry them out."""
    others = (job.world - 1) / job.world
    sizes = [f.numel for f in shapes.factors(job.rank)] + shapes.untreated(job.rank)
    trained = job.precision * sum(sizes)
    if job.stage == 0:
        return {"gradients": 2 * others * trained}
    if job.stage < 3:  # reduced whole: reduce_scatter of the JSON is off for adapters' small buckets in 0.19
        return {"gradients": 2 * others * trained, "parameters": others * trained}
    small = sum(numel * count for numel, count in shapes.weights.items() if numel <= job.persistent)
    small_trained = sum(numel for numel in sizes if numel <= job.persistent)
    large = shapes.parameters - small + sum(sizes) - small_trained
    return {
        "gradients": others * trained,
        # For the forward pass, and again for the backward pass but for what stage3_max_live_parameters keeps.
        "parameters": others * job.precision * (large + max(0, large - MAX_LIVE) + small_trained),
    }


def arithmetic(division: Division) -> tuple[Tensor, Tensor]:
    """Operations and bytes of memory traffic of LoFT's step on every rank, (N,), the mean of one of ``B`` and of ``A``.

    See ``floor`` of benchmarks/step_time.py; here for a part of the rows, with the whole of the partner.
    """
    operations, numbers = [], []
    for f, partition in division.partitions.items():
        e, l, r = f.experts, f.partner.count, f.rank  # noqa: E741
        packed = r * (r + 1) // 2
        a_row = 2 * l * (packed + 2 * r) + 3 * r**3 + 12 * r**2
        operations.append((partition.owned, e * a_row, e * 2 * r**2 * l))
        numbers.append((partition.owned, e * (2 * packed + 10 * r), e * 3 * l * r))
    return division.turns * division.summed(operations), division.turns * FLOAT * division.summed(numbers)


@dataclass(frozen=True)
class Plan:
    """Of the ranks with the most memory, the most traffic and the most arithmetic.

    Attributes:
        job: what is planned.
        memory: bytes that stay, by kind, on the GPU.
        on_cpu: the same, in CPU memory.
        work: bytes that come and go within a step, by kind; an estimate.
        checkpoint: bytes of a checkpoint, of all ranks together.
        traffic: LoFT's, of the worst rank.
        deepspeed: bytes received in DeepSpeed's own collectives.
        seconds: of a step by what takes them: "training", "DeepSpeed's traffic", "LoFT's arithmetic", "LoFT's traffic".
        imbalance: largest state over the mean one.
    """

    job: Job
    memory: dict[str, float]
    on_cpu: dict[str, float]
    work: dict[str, float]
    checkpoint: int
    traffic: Traffic
    deepspeed: dict[str, float]
    seconds: dict[str, float]
    imbalance: float

    @property
    def peak(self) -> float:
        """Bytes of GPU memory."""
        return sum(self.memory.values()) + sum(self.work.values())

    @property
    def optimizer_share(self) -> float:
        """LoFT's part of a step in which nothing overlaps."""
        return sum(s for name, s in self.seconds.items() if name.startswith("LoFT")) / sum(self.seconds.values())


OFFLOADED = {
    "second_moment": {"second moments"},
    "optimizer": {"masters", "momentum", "second moments", "pending or previous", "bases", "gradients", "kept rows"},
    "param": {"base weights", "adapters"},
}
STATE = ("momentum", "second moments", "pending or previous")


def _placed(kinds: dict[str, Tensor], offload: Set[str]) -> tuple[dict[str, float], dict[str, float]]:
    """The kinds of the worst rank that stay on the GPU, and those that lie in CPU memory."""
    gone = set().union(*(OFFLOADED[what] for what in offload))
    total = torch.stack([part for kind, part in kinds.items() if kind not in gone] or list(kinds.values())).sum(0)
    worst = int(total.argmax())
    here = {kind: float(part[worst]) for kind, part in kinds.items() if kind not in gone}
    return here, {kind: float(part[worst]) for kind, part in kinds.items() if kind in gone}


def plan(shapes: Shapes, job: Job, gpu: hardware.Gpu, wire: float) -> Plan:
    """All there is to say of a job. ``wire``: bytes per second each way between nodes, of one GPU.

    Raises:
        ValueError: a rank of the adapters that all layers are too small for.
    """
    division = division_of(shapes, job)
    kinds = memory(shapes, job, division)
    here, on_cpu = _placed(kinds, job.offload)
    state = torch.stack([kinds[kind] for kind in STATE]).sum(0).double()
    worst = traffic(division, int(torch.stack(list(received(division).values())).sum(0).argmax()))
    deepspeed = deepspeed_traffic(shapes, job)
    operations, numbers = (float(count.max()) for count in arithmetic(division))

    speed = hardware.WIRE_EFFICIENCY * (gpu.node if job.world <= job.per_node else wire)
    # Forward 2 operations a weight and token, again for checkpointing, and the gradient of the inputs; adapters have
    # the gradient of their weights too, and the head is no adapted layer.
    weights = shapes.active + shapes.vocabulary * shapes.hidden
    training = job.tokens * (6 * weights + 8 * sum(division.sizes) * shapes.active / shapes.adapted)
    kernel = hardware.KERNEL_EFFICIENCY * gpu.tf32 / hardware.TF32_PRODUCTS
    seconds = {
        "training": training / (hardware.TRAINING_EFFICIENCY * gpu.bf16),
        "DeepSpeed's traffic": sum(deepspeed.values()) / speed,
        "LoFT's arithmetic": max(operations / kernel, numbers / (hardware.MEMORY_EFFICIENCY * gpu.bandwidth)),
        "LoFT's traffic": worst.total / speed
        + (worst.collectives * hardware.LATENCY + worst.peers * hardware.LATENCY_PER_PEER),
    }
    if division.world == 1:
        seconds["LoFT's traffic"] = 0.0
    return Plan(
        job,
        here,
        on_cpu,
        work(shapes, job, division),
        checkpoint_bytes(division, job),
        worst,
        deepspeed,
        seconds,
        float(state.max() / state.mean()),
    )


def peak(shapes: Shapes, job: Job) -> float:
    """Bytes of GPU memory that a job needs."""
    division = division_of(shapes, job)
    here, _ = _placed(memory(shapes, job, division), job.offload)
    return sum(here.values()) + sum(work(shapes, job, division).values())
