"""Memory, traffic and time of a training step as pure functions of shapes, rank of the adapters, ranks and stage.

It is arithmetic on what the code does: rows are divided by :func:`loft_ds.sharding.exchange.divide_rows`, traffic is
counted from the plans that the ranks carry out, and DeepSpeed's buffers are those of DeepSpeed 0.19 (named in
``memory.py``). ``tests/test_plan.py`` compares it with what ranks have really allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import hardware
from .division import FLOAT, Division, Job, division_of
from .memory import STATE, checkpoint_bytes, memory, placed, work
from .shapes import Shapes
from .traffic import Traffic, deepspeed_traffic, received, traffic


def arithmetic(division: Division) -> tuple[Tensor, Tensor]:
    """Operations and bytes of memory traffic of LoFT's step on every rank, (N,), the mean of one of ``B`` and of ``A``.

    See ``floor`` of benchmarks/step_time.py; here for a part of the rows, with the whole of the partner, and with all
    products of :mod:`loft_ds.step`. Counted are two steps: in one of them a factor leads, in the other it follows.
    """
    joint, operations, numbers = division.joint, [], []
    moves = 2 if joint else 1
    for f, partition in division.partitions.items():
        e, l, r = f.experts, f.partner.count, f.rank  # noqa: E741
        packed = r * (r + 1) // 2
        # In its moves V, M and U @ Q. In one of them its second moments turn. The other products of rows (k, r) and
        # matrices (r, r): 7 as it leads and 11 as it follows, or 6 and 4. So many rows are read or written.
        products, passes = (18, 24) if joint else (10, 14)
        a_row = moves * 2 * l * (packed + 2 * r) + 4 * r**3 + products * 2 * r**2
        # Of the partner, Q and the corrections. Of the pair, what turns bases and weights.
        operations.append((partition.owned, e * a_row, e * (moves * 4 * l * r**2 + (32 if joint else 8) * r**3)))
        numbers.append((partition.owned, e * (moves * 2 * packed + passes * r), e * moves * 3 * l * r))
    return division.summed(operations) / 2, FLOAT * division.summed(numbers) / 2


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


def plan(shapes: Shapes, job: Job, gpu: hardware.Gpu, wire: float) -> Plan:
    """All there is to say of a job. ``wire``: bytes per second each way between nodes, of one GPU.

    Raises:
        ValueError: a rank of the adapters that all layers are too small for.
    """
    division = division_of(shapes, job)
    kinds = memory(shapes, job, division)
    here, on_cpu = placed(kinds, job.offload)
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
