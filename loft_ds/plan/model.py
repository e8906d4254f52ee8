"""Memory, traffic and time of a training step as pure functions of shapes, rank of the adapters, ranks and stage.

It is arithmetic on what the code does: rows are divided by :func:`loft_ds.sharding.exchange.divide_rows`, traffic is
counted from the plans that the ranks carry out, and DeepSpeed's buffers are those of DeepSpeed 0.19 (named below).
``tests/test_plan.py`` compares it with what ranks have really allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..factors import Factor
from ..kernels.tiled import WORKSPACE_BYTES
from ..sharding.exchange import Partition, divide_rows, even_cut, members_of, plan_gather, plan_rows
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
    """

    def __init__(self, factors: Sequence[Factor], stage: int, world: int) -> None:
        self.factors = factors
        self.world = world if stage else 1  # at stage 0 every rank is as one alone
        self.size = self._held_by_all(factors)
        if stage == 3:
            held = [even_cut(-(-f.numel // self.world), 0, f.numel) for f in factors]
        else:
            held, start = [], 0
            for f in factors:
                held.append(even_cut(self.size, start, f.numel))
                start += f.numel
        owned = divide_rows(factors, held, self.world)
        self.partitions = {f: Partition(f, *cuts) for f, *cuts in zip(factors, held, owned, strict=True)}

    def _held_by_all(self, factors: Sequence[Factor]) -> int:
        """Elements of a rank's part of one flat buffer, whose length is a multiple of two a rank
        (``nccl_start_alignment_factor``, zero/stage_1_and_2.py).
        """
        return -(-sum(f.numel for f in factors) // (2 * self.world)) * 2

    def in_one_place(self, factor: Factor) -> bool:
        here, there = self.partitions[factor].owned.whole, self.partitions[factor.partner].owned.whole
        return here is not None and here == there

    def members(self, factor: Factor) -> range:
        return members_of(self.partitions[factor], self.partitions[factor.partner])

    @cached_property
    def elements(self) -> Tensor:
        """(N,), how many elements of factors each rank owns the rows of."""
        return self._owned(self.partitions.values())

    @cached_property
    def travelling(self) -> Tensor:
        """(N,), the part of :attr:`elements` that another rank may hold."""
        return self._owned(p for p in self.partitions.values() if not p.stays)

    def _owned(self, partitions: Iterable[Partition]) -> Tensor:
        total = torch.zeros(self.world, dtype=torch.int64)
        for partition in partitions:
            ranks = partition.owned.ranks
            total[ranks.start : ranks.stop] += partition.factor.rank * partition.owned.edges.diff()
        return total

    @cached_property
    def cut_gradients(self) -> Tensor:
        """(N,), elements of gradients that each rank keeps at stages 1 and 2 although it holds others of the parameter:
        a part of it is a view of the whole (``get_flat_partition``, zero/stage_1_and_2.py).
        """
        total = torch.zeros(self.world, dtype=torch.int64)
        for factor, partition in self.partitions.items():
            parts, ranks = partition.held.edges.diff(), partition.held.ranks
            total[ranks.start : ranks.stop] += (factor.numel - parts) * (parts > 0)
        return total

    @cached_property
    def bases(self) -> Tensor:
        """(N,), bytes of the bases: of each pair on the ranks among which it lies; and of the second moments' weights:
        of each factor where it has rows.
        """
        total = torch.zeros(self.world, dtype=torch.int64)
        for factor in self.factors:
            members, owned = self.members(factor), self.partitions[factor].owned
            total[members.start : members.stop] += DOUBLE * factor.rank**2
            total[owned.ranks.start : owned.ranks.stop] += DOUBLE * factor.rank**2 * (owned.edges.diff() > 0)
        return total


def _padded(numel: int, world: int) -> int:
    return -(-numel // world)


def memory(shapes: Shapes, job: Job, division: Division | None = None) -> dict[str, Tensor]:
    """Bytes by kind on every rank, (N,) each, between a backward pass and the optimizer's step.

    DeepSpeed's kinds are as 0.19 allocates them: flat 16-bit weights and the 16-bit gradients of this rank's part
    (``bit16_groups_flat``, ``averaged_gradients``; stage 3: ``fp16_partitioned_groups_flat``,
    ``grad_partitions_flat_buffer``), float32 masters, which in fp32 are the weights themselves at stage 0.
    """
    division = division or Division(shapes.factors(job.rank), job.stage, job.world)
    factors = division.factors
    base, whole = shapes.parameters, sum(f.numel for f in factors)
    sixteen = job.precision == 2
    gradients: int | Tensor
    if job.stage == 0:
        adapters, gradients, masters = whole, whole, whole if sixteen else 0
    elif job.stage < 3:
        adapters, gradients, masters = division.size * job.world, division.size + division.cut_gradients, division.size
    else:
        part = sum(_padded(f.numel, job.world) for f in factors)
        gathered = sum(f.numel for f in factors if f.numel <= job.persistent)
        adapters, gradients, masters = part + gathered, part, part
        base = sum(
            count * (_padded(numel, job.world) + (numel if numel <= job.persistent else 0))
            for numel, count in shapes.weights.items()
        )
    one = torch.ones(job.world, dtype=torch.int64)
    rows = {
        "momentum": FLOAT * division.elements,
        "second moments": job.second_moment * (job.rank + 1) * division.elements // 2,
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
    gathered partners, the step of the moving side, the kernels' workspace. At stage 3 the whole weights of two decoder
    layers, the largest embedding and the prefetch bucket; at stages 1 and 2 the bucket that gradients are reduced in.
    Activations with checkpointing: the hidden state of every decoder layer, one layer anew (34 bytes a token and
    feature: Korthikanti et al. 2022, without the attention matrix), and the logits with their gradient in float32.
    """
    factors = division.factors
    owned = division.elements.max().item()
    held = division.size
    travelling = any(not p.stays for p in division.partitions.values())
    gathered = 0 if job.stage == 0 else min(2 * BUCKET_BYTES, FLOAT * sum(f.numel for f in factors) // 2)
    optimizer = FLOAT * (held + 3.5 * owned) + (FLOAT * 5 * held if travelling else 0) + 3 * gathered + WORKSPACE_BYTES
    if job.stage == 3:
        body = sum(m * n for _, m, n in shapes.layers) / shapes.depth
        weights = job.precision * (2 * body + shapes.vocabulary * shapes.hidden + PREFETCH)
    else:
        weights = job.precision * (2 * job.reduce_bucket if job.stage else 0)
    activations = job.tokens * (
        shapes.depth * shapes.hidden * job.precision
        + 34 * shapes.hidden * job.precision / 2
        + shapes.vocabulary * (job.precision + 2 * FLOAT)
    )
    return {"optimizer's work": optimizer, "weights in flight": weights, "activations": activations}


def checkpoint_bytes(factors: Sequence[Factor], job: Job) -> int:
    """Of what ``save_checkpoint`` writes: float32 values, the moments, pending or previous, bases, weights."""
    return sum(
        f.numel * 3 * FLOAT + job.second_moment * f.count * (f.rank * (f.rank + 1) // 2) + 2 * DOUBLE * f.rank**2
        for f in factors
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step, the mean of one of ``B`` and one of ``A``, once it has rows of its own: in
    the first step the master weights come with the gradients.

    Attributes:
        gradients: elements of the gradients of its rows that lie elsewhere.
        updates: new values of elements that it holds and another rank owns.
        partners: the other factors' rows.
        products: Gram matrices.
        collectives: how many of LoFT's own.
        peers: ranks that it exchanges with in the largest of them.
    """

    gradients: float
    updates: float
    partners: float
    products: float
    collectives: float
    peers: int

    @property
    def total(self) -> float:
        return self.gradients + self.updates + self.partners + self.products

    @property
    def least(self) -> float:
        """What the division of the rows demands: gradients in, parameters out, and the partners' rows."""
        return self.gradients + self.updates + self.partners


def traffic(division: Division, rank: int) -> Traffic:
    """What one rank receives, from the very plans that it would carry out."""
    world, parts = division.world, division.partitions
    came = updates = gathered = collectives = 0
    peers = 0

    def others(counts: list[int]) -> int:
        nonlocal peers
        peers = max(peers, sum(1 for q, n in enumerate(counts) if n and q != rank))
        return sum(counts) - counts[rank]

    rounds = rounds_of(division.factors)
    spread = [f for f in division.factors if not division.in_one_place(f)]
    for side in "AB":
        travelling = [p for f, p in parts.items() if f.side == side and not p.stays]
        if travelling:
            plan = plan_rows(travelling, rank, world)
            came += others(plan.receive_counts)
            updates += others(plan.send_counts)
            collectives += 3  # in on every step, out on every second one
        moving = [f for f in spread if f.side == side]
        buckets = {(f.rank, rounds[f]) for f in moving}
        collectives += len(buckets)
        near = [f for f in moving if any(parts[g].owned.length(rank) for g in (f, f.partner))]
        for width in {f.rank for f in near}:
            bucket = [f for f in near if f.rank == width]
            plan = plan_gather([parts[f] for f in bucket], [parts[f.partner] for f in bucket], rank, world)
            gathered += width * others(plan.receive_counts)
    # Gram (a triangle) and cross Gram of the pairs about to move, float64: a piece of each from every member, and the
    # sums of all other pieces back.
    products = 0.0
    for f in division.factors:
        members = division.members(f)
        if rank in members:
            one = DOUBLE * (f.rank * (f.rank + 1) // 2 + f.rank**2) / 2
            products += 2 * one * (len(members) - 1) / len(members)
    collectives += (4 if spread else 0) + (4 if any(not p.stays for p in parts.values()) else 2)  # 2 of one number
    return Traffic(FLOAT * came, FLOAT * updates / 2, FLOAT * gathered / 2, products, collectives / 2, peers)


def deepspeed_traffic(shapes: Shapes, job: Job) -> dict[str, float]:
    """Bytes that DeepSpeed's own collectives bring to a rank in a step, as rings carry them out."""
    others = (job.world - 1) / job.world
    trained = job.precision * sum(f.numel for f in shapes.factors(job.rank))
    if job.stage == 0:
        return {"gradients": 2 * others * trained}
    if job.stage < 3:  # reduced whole: reduce_scatter of the JSON is off for adapters' small buckets in 0.19
        return {"gradients": 2 * others * trained, "parameters": others * trained}
    small = sum(numel * count for numel, count in shapes.weights.items() if numel <= job.persistent)
    factors = shapes.factors(job.rank)
    small_trained = sum(f.numel for f in factors if f.numel <= job.persistent)
    large = shapes.parameters - small + sum(f.numel for f in factors) - small_trained
    return {
        "gradients": others * trained,
        # For the forward pass, and again for the backward pass but for what stage3_max_live_parameters keeps.
        "parameters": others * job.precision * (large + max(0, large - MAX_LIVE) + small_trained),
    }


def arithmetic(division: Division, rank: int) -> tuple[float, float]:
    """Operations and bytes of memory traffic of LoFT's step on one rank, the mean of one of ``B`` and one of ``A``.

    See ``floor`` of benchmarks/step_time.py; here for a part of the rows, with the whole of the partner.
    """
    operations = numbers = 0.0
    for f, partition in division.partitions.items():
        k, l, r = partition.owned.length(rank), f.partner.count, f.rank  # noqa: E741
        if k == 0:
            continue
        packed = r * (r + 1) // 2
        operations += 2 * k * l * (packed + 2 * r) + 3 * k * r**3 + 2 * r**2 * (4 * k + l) + 4 * k * r**2
        numbers += k * (2 * packed + 10 * r) + 3 * l * r
    return operations / 2, FLOAT * numbers / 2


@dataclass(frozen=True)
class Plan:
    """Of the rank with the most memory, the most traffic of those looked at and the mean arithmetic.

    Attributes:
        job: what is planned.
        memory: bytes that stay, by kind, on the GPU.
        on_cpu: the same, in CPU memory.
        work: bytes that come and go within a step, by kind; an estimate.
        checkpoint: bytes of a checkpoint, of all ranks together.
        traffic: LoFT's, of the worst rank looked at.
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

    Traffic is counted for the first, the middle and the last rank, which see every kind of boundary.

    Raises:
        ValueError: a rank of the adapters that a layer is too small for.
    """
    factors = shapes.factors(job.rank)
    division = Division(factors, job.stage, job.world)
    kinds = memory(shapes, job, division)
    here, on_cpu = _placed(kinds, job.offload)
    state = torch.stack([kinds[kind] for kind in STATE]).sum(0).double()
    ranks = sorted({0, division.world // 2, division.world - 1})
    received = max((traffic(division, rank) for rank in ranks), key=lambda t: t.total)
    deepspeed = deepspeed_traffic(shapes, job)
    operations, numbers = (max(values) for values in zip(*(arithmetic(division, q) for q in ranks), strict=True))

    speed = hardware.WIRE_EFFICIENCY * (gpu.node if job.world <= job.per_node else wire)
    adapters = sum(f.numel for f in factors)
    # Forward 2 operations a weight and token, again for checkpointing, and the gradient of the inputs; adapters have
    # the gradient of their weights too, and the head is no adapted layer.
    weights = shapes.active + shapes.vocabulary * shapes.hidden
    training = job.tokens * (6 * weights + 8 * adapters * shapes.active / sum(m * n for _, m, n in shapes.layers))
    kernel = hardware.KERNEL_EFFICIENCY * gpu.tf32 / hardware.TF32_PRODUCTS
    seconds = {
        "training": training / (hardware.TRAINING_EFFICIENCY * gpu.bf16),
        "DeepSpeed's traffic": sum(deepspeed.values()) / speed,
        "LoFT's arithmetic": max(operations / kernel, numbers / (hardware.MEMORY_EFFICIENCY * gpu.bandwidth)),
        "LoFT's traffic": received.total / speed
        + (received.collectives * hardware.LATENCY + received.peers * hardware.LATENCY_PER_PEER),
    }
    if division.world == 1:
        seconds["LoFT's traffic"] = 0.0
    return Plan(
        job,
        here,
        on_cpu,
        work(shapes, job, division),
        checkpoint_bytes(factors, job),
        received,
        deepspeed,
        seconds,
        float(state.max() / state.mean()),
    )


def peak(shapes: Shapes, job: Job) -> float:
    """Bytes of GPU memory that a job needs."""
    division = Division(shapes.factors(job.rank), job.stage, job.world)
    here, _ = _placed(memory(shapes, job, division), job.offload)
    return sum(here.values()) + sum(work(shapes, job, division).values())
