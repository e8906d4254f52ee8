"""Bytes that ranks receive in a step: of LoFT's, from the plans that they carry out, and of DeepSpeed's collectives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sharding.exchange import plan_gather, plan_rows
from ..sharding.sharded import rounds_of
from .base import Stored, stored
from .division import DOUBLE, FLOAT, Division, Job
from .shapes import Shapes

MAX_LIVE = 1_000_000_000  # DeepSpeed's own default (zero/config.py), in elements


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step, the mean of one of ``B`` and one of ``A``, once it has rows of its own: in
    the first step the master weights come with the gradients. Factors take the turns that they have by default.

    Attributes:
        gradients: elements of the gradients of its rows that lie elsewhere.
        updates: values of elements that it holds and another rank owns: of both factors of a pair on every step, since
            both may have been balanced.
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
    """(N,), bytes of the float64 sums over all rows of a pair that :mod:`loft_ds.step` asks for.

    Of MOVED: the leading factor's Gram matrix (a triangle) and its cross product, the following one's Gram matrix, and
    the length of a step. Where both factors move, of OVERLAPS the Gram matrix and the cross product of the one that
    moved last and the product of rows and gradient, and of OUTSIDE two products.

    A piece of each comes from every other member, and the sums of all other pieces come back; what is ``needed`` are
    the sums, once on every rank that takes part.
    """
    rank = division.factors[0].rank
    triangle, square = rank * (rank + 1) // 2, rank**2
    numbers = (triangle + square) + triangle + 1
    if division.joint:
        numbers += (triangle + square) + square + 2 * square
    total = torch.zeros(division.world, dtype=torch.float64)
    for members, pairs in division.shared.items():
        if (n := len(members)) > 1:
            total[members.start : members.stop] += DOUBLE * pairs * numbers * (1 if needed else 2 * (n - 1) / n)
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
    return {
        "gradients": FLOAT * (division.travelling - stay).double(),
        "updates": FLOAT * (division.holding - stay).double(),
        "partners": FLOAT * division.turns * (division.partners["A"] + division.partners["B"]).double(),
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
    for side in "AB":
        travelling = [p for p in division.moving if p.factor.side == side]
        if travelling:
            plan = plan_rows(travelling, rank, world)
            came += others(plan.receive_counts)
            updates += others(plan.send_counts)
            collectives += 2  # in and out
        moving = [f for f in spread if f.side == side]
        collectives += turns * len({(f.width, rounds[f]) for f in moving})
        near = [f for f in moving if any(parts[g].owned.length(rank) for g in (f, f.partner))]
        for width in {f.width for f in near}:
            bucket = [f for f in near if f.width == width]
            plan = plan_gather([parts[f] for f in bucket], [parts[f.partner] for f in bucket], rank, world)
            gathered += width * others(plan.receive_counts)
            given += width * others(plan.send_counts)
    sums = float(products(division)[rank])
    # Of products there and back: OVERLAPS, MOVED and OUTSIDE, or the first two; and of one number.
    collectives += 2 * (3 if division.joint else 2) * bool(spread) + (2 if division.moving else 1)
    return Traffic(
        gradients=FLOAT * came,
        updates=FLOAT * updates,
        partners=FLOAT * turns * gathered,
        products=sums,
        needed=float(products(division, needed=True)[rank]),
        sent=FLOAT * (updates + came + turns * given) + sums,
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
    large = [each for each in stored(shapes, job) if each.numel > job.persistent]
    large += [Stored(1, numel, job.precision) for numel in sizes if numel > job.persistent]
    small_trained = job.precision * sum(numel for numel in sizes if numel <= job.persistent)
    elements, bytes_ = (sum(each.copies * each.numel for each in large), sum(each.bytes for each in large))
    # For the forward pass, and again for the backward pass but for what stage3_max_live_parameters keeps.
    again = max(0, elements - MAX_LIVE) / max(1, elements)
    return {"gradients": others * trained, "parameters": others * (bytes_ * (1 + again) + small_trained)}
