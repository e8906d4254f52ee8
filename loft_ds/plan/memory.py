"""Bytes of a training step on every rank: what stays, what comes and goes, what lies in CPU memory, a checkpoint's.

DeepSpeed's buffers are those of DeepSpeed 0.19, named below.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from ..kernels.stream import CHUNK_BYTES
from ..kernels.tiled import WORKSPACE_BYTES
from ..pairs import STACK_BYTES
from ..sharding.sharded import BUCKET_BYTES
from .base import quantised_layers, scale_bytes, stored
from .division import DOUBLE, FLOAT, Division, Job, division_of
from .shapes import Shapes

PREFETCH = 50_000_000  # DeepSpeed's own default (zero/config.py), in elements
OFFLOADED = {
    "second_moment": {"second moments"},
    "optimizer": {"masters", "momentum", "second moments", "pending or before", "bases", "gradients", "kept rows"},
    "param": {"base weights", "adapters"},
}
STATE = ("momentum", "second moments", "pending or before")


def _padded(numel: int, world: int) -> int:
    return -(-numel // world)


def memory(shapes: Shapes, job: Job, division: Division | None = None) -> dict[str, Tensor]:
    """Bytes by kind on every rank, (N,) each, between a backward pass and the optimizer's step; of one of the two
    factors of a pair, A and B by turns, the larger.

    DeepSpeed's kinds are as 0.19 allocates them: flat 16-bit weights and the 16-bit gradients of this rank's part
    (``bit16_groups_flat``, ``averaged_gradients``; stage 3: ``fp16_partitioned_groups_flat``,
    ``grad_partitions_flat_buffer``), float32 masters, which in fp32 are the weights themselves at stage 0.
    """
    division = division or division_of(shapes, job)
    base, whole = sum(each.bytes for each in stored(shapes, job)), sum(division.sizes)
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
            copies * width * (_padded(numel, job.world) + (numel if numel <= kept else 0))
            for copies, numel, width in stored(shapes, job)
        )
    one = torch.ones(job.world, dtype=torch.int64)
    rows = {
        "momentum": FLOAT * (division.elements + division.left),
        "second moments": job.second_moment * (job.rank + 1) * division.elements // 2 + FLOAT * division.left,
        "pending or before": FLOAT * division.larger,
        "bases": division.bases,
        "kept rows": FLOAT * division.travelling,
    }
    return {
        "base weights": one * (base + scale_bytes(shapes, job)),
        "adapters": one * job.precision * adapters,
        "gradients": one * job.precision * gradients,
        "masters": one * FLOAT * masters,
        **{kind: part.expand(job.world) for kind, part in rows.items()},
        "reduce buckets": one * (job.precision * job.reduce_bucket if job.stage == 3 else 0),
    }


def work(shapes: Shapes, job: Job, division: Division) -> dict[str, float]:
    """Bytes of what comes and goes within a step, the largest of any rank; an estimate from the code, not measured.

    Of the optimizer: the gradients as DeepSpeed hands them over in float32, and then the larger of two. While rows are
    read, what the exchange of one side holds, beside what came for the other one. After that the gradients that came
    from elsewhere, the scaled gradients of both sides (or, where both move, the following one's step, what of it lies
    outside, and its moved rows), and the partners of one side as they are sent, received and put in order. Beside these
    the (r, r) matrices of all pairs, as they are summed, joined and turned; the arithmetic of one stack, several times
    its rows and partners in float64; the kernels' workspace; and chunks of what is offloaded.

    Of a quantised base the largest layer in the precision of its products. At stage 3 the whole weights of two decoder
    layers, the largest embedding and the prefetch bucket; at stages 1 and 2 the bucket that gradients are reduced in.
    Activations with checkpointing: the hidden state of every decoder layer,
    one layer anew (34 bytes a token and feature: Korthikanti et al. 2022, without the attention matrix), and the logits
    with their gradient in float32.
    """
    partners = torch.maximum(*division.partners.values()).clamp(max=4 * BUCKET_BYTES // FLOAT)
    rows = 3 * division.larger if division.joint else division.elements
    carried = 6 * torch.maximum(division.holding, division.travelling)
    numbers = division.size + int(torch.maximum(carried, division.travelling + rows + 3 * partners).max())
    owned = int(division.elements.max())
    stack = max(max(f.rank * (f.count + f.partner.count), min(f.numel, owned)) for f in division.factors)
    matrices = (4 if division.joint else 2) * int(division.bases.max())
    arithmetic = 5 * max(STACK_BYTES, DOUBLE * stack) + WORKSPACE_BYTES
    chunks = 2 * CHUNK_BYTES if "second_moment" in job.offload else 0
    optimizer = FLOAT * numbers + matrices + arithmetic + chunks
    if job.stage == 3:
        ends = shapes.vocabulary * shapes.hidden
        body = sum(each.bytes for each in stored(shapes, job)) - job.precision * (shapes.parameters - shapes.adapted)
        weights = 2 * body / shapes.depth + job.precision * (ends + PREFETCH)
    else:
        weights = job.precision * (2 * job.reduce_bucket if job.stage else 0)
    weights += job.precision * max((layer.numel for layer in quantised_layers(shapes, job)), default=0)
    activations = job.tokens * (
        shapes.depth * shapes.hidden * job.precision
        + 34 * shapes.hidden * job.precision / 2
        + shapes.vocabulary * (job.precision + 2 * FLOAT)
    )
    return {"optimizer's work": optimizer, "weights in flight": weights, "activations": activations}


def checkpoint_bytes(division: Division, job: Job) -> int:
    """Of what ``save_checkpoint`` writes: float32 values, the moments, pending or before of the larger side, and the
    (r, r) matrices of every pair once.
    """
    sides, left = [int(elements.sum()) for elements in division.by_side.values()], int(division.left.sum())
    factors = FLOAT * (2 * sum(sides) + max(sides)) + job.second_moment * (job.rank + 1) * sum(sides) // 2
    return factors + division.matrices * sum(division.shared.values()) + 3 * FLOAT * left


def placed(kinds: dict[str, Tensor], offload: Set[str]) -> tuple[dict[str, float], dict[str, float]]:
    """The kinds of the worst rank that stay on the GPU, and those that lie in CPU memory."""
    gone = set().union(*(OFFLOADED[what] for what in offload))
    total = torch.stack([part for kind, part in kinds.items() if kind not in gone] or list(kinds.values())).sum(0)
    worst = int(total.argmax())
    here = {kind: float(part[worst]) for kind, part in kinds.items() if kind not in gone}
    return here, {kind: float(part[worst]) for kind, part in kinds.items() if kind in gone}


def peak(shapes: Shapes, job: Job) -> float:
    """Bytes of GPU memory that a job needs."""
    division = division_of(shapes, job)
    here, _ = placed(memory(shapes, job, division), job.offload)
    return sum(here.values()) + sum(work(shapes, job, division).values())
