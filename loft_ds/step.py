"""LoFT's step on one page: Section 3 of the paper (arXiv 2505.21289) on this rank's rows of a stack of pairs.

:func:`loft_step` is a generator. Of a pair a rank has some rows only; what all ranks that share it know together, it
yields a question for, and :mod:`.runtime` answers all stacks' questions of a phase by one exchange. What is small, the
(r, r) matrices of the pairs, it asks for too: then that of all stacks is one call.

Both factors are treated alike, as the table in :mod:`.algebra` says: rows ``X`` (k, r) and the partner's scaled rows
``T`` (l, r), with an orthonormal basis ``Q = T @ H``. Coordinates are those of ``Q``.

**No step is longer than AdamW's can be.** The leading factor moves ``W`` by ``U Q Q.T``: AdamW's quotient ``U``, of
which no number exceeds :func:`.algebra.longest_quotient`, projected on the span of its partner, and a projection
lengthens nothing. The following one is turned to the leading one *as it has moved*, and moves ``W`` by a projection of
its own quotient, on that span and on what lies outside of the span of its own rows. So the move of ``W`` is the sum of
the two, with no product of two moves in it, and the two are orthogonal; the second is shortened where both together
would be longer than a quotient can be. It holds for every gradient, and for every length of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import algebra, kernels
from .blocks import Blocks
from .pairs import Pairs, Side, each_pair, pieces


class Phase(IntEnum):
    """What a step asks for, in this order. Alternating pairs leave out FOLLOWERS and OUTSIDE.

    Six are exchanges between ranks; BASES, TURNED and BALANCE are not: see :class:`Together`.
    """

    OVERLAPS = 0  # sums of products over all rows of a pair
    BASES = 1
    NORM = 2  # the coefficient that clips, from what this rank has and from what all ranks have alike
    PARTNERS = 3  # the whole rows of the leading factor's partner, and its second moments
    MOVED = 4  # sums, of the leading factor's rows as they have moved
    TURNED = 5
    FOLLOWERS = 6  # the same as PARTNERS, of the following factor: its partner has moved
    OUTSIDE = 7  # sums, for what lies outside of the span of the following factor's own rows
    BALANCE = 8


class Partner(NamedTuple):
    """The answer to PARTNERS and FOLLOWERS: whole rows (l, r) of each pair's partner, and how second moments come."""

    rows: Sequence[Tensor]
    second_moments: kernels.Resident | kernels.Stream


class Together(NamedTuple):
    """A question for what a function makes of tensors (b, ...): it is called once for all stacks that ask it alike."""

    function: Callable[..., Any]
    tensors: Sequence[Tensor]
    arguments: tuple[Any, ...] = ()


Step = Generator[tuple[Phase, Any], Any, None]
Part = Generator[tuple[Phase, Any], Any, Any]

# So many steps divide in full precision, whatever is allowed: of few gradients ``V`` is a sum that cancels, most of all
# of one, and what is rounded in it is not small (docs/results/precision.md).
EXACT_STEPS = 10


def loft_step(pairs: Pairs, blocks: Blocks, precision: kernels.Precision = "ieee") -> Step:
    """One step of a stack of pairs, from gradients to moved rows, in place in ``pairs``."""
    pairs.step += 1
    lead, follow = both = pairs.in_turn()
    joint, s = pairs.joint, pairs.scaling

    # 1. Gradient scaling: the gradient of W in an orthonormal basis of the partner, found anew where that has moved.
    stale = [x for x in both if pairs.step == 1 or pairs.partner(x).before is not None]
    asked = [overlap for x in stale for overlap in overlaps(pairs.partner(x))]
    asked += [algebra.gram(follow.rows, follow.gradient)] if joint else []
    sums = yield Phase.OVERLAPS, asked
    for x, gram, cross in zip(stale, sums[0::2], sums[1::2], strict=False):
        yield from turn(Phase.BASES, x, pairs.partner(x), gram, cross, blocks, s)
    gradients = [torch.bmm(x.gradient, blocks.coordinates(x.basis).to(x.momentum)) for x in both]

    # 2. Clipping, by the norm of the projected full gradients of what is about to move.
    inner = s * lead.basis.mT @ sums[-1] @ blocks.coordinates(follow.basis) if joint else None
    clip = yield Phase.NORM, blocks.clipped(both, gradients if joint else gradients[:1], inner)
    for x in reversed(both):
        blocks.accumulate(x, gradients.pop().mul_(clip))

    # 3. The leading factor moves by AdamW's step of the full matrix, projected on what it can reach.
    step = full_step(lead, pairs, (yield Phase.PARTNERS, lead), blocks, precision)
    move(lead, step, decay=lead.lr * lead.group["weight_decay"])

    # 4. Calibration: moments, and what they have not had yet, of the following one turn to where the leading one went.
    asked = [*overlaps(lead), products(follow), step.double().square().sum((1, 2))]
    lead.before = None
    del step
    gram, cross, own, length = yield Phase.MOVED, asked
    yield from turn(Phase.TURNED, follow, lead, gram, cross, blocks, s)

    # 5. The following one moves by what of its own step lies outside: all else the leading one has moved already.
    growth = torch.zeros_like(cross)
    if joint:
        step = full_step(follow, pairs, (yield Phase.FOLLOWERS, follow), blocks, precision)
        inner, outer = yield Phase.OUTSIDE, [algebra.gram(follow.rows, step), algebra.gram(step, step)]
        inside = s * lead.basis
        inner = inside.mT @ inner
        outer = outer - inner.mT @ inner
        shorter = within_bound(outer, length, pairs, blocks)
        outside = step - torch.bmm(follow.rows.double(), inside @ inner).to(step)
        move(follow, outside.mul_(shorter))
        del step, outside
        growth = (shorter * follow.lr) ** 2 * (follow.basis @ outer @ follow.basis.mT)

    # 6. The same product as the shortest factors.
    if blocks.balancing and (lead.lr or follow.lr):
        asked = [gram, own, growth, lead.basis, follow.basis]
        chosen = yield Phase.BALANCE, Together(algebra.to_balance, asked)
        if chosen is not None:
            balance(pairs, dict(zip(both, chosen[1:], strict=True)), chosen[0])


def products(x: Side) -> Tensor:
    """Of a side's rows with themselves, a packed triangle (b, r(r+1)/2) in float64: of this rank's rows."""
    rows = x.rows.double()
    return algebra.pack(algebra.gram(rows, rows))


def overlaps(x: Side) -> list[Tensor]:
    """The :func:`products`, and those of the rows before their last move with the present ones (b, r, r)."""
    rows = x.rows.double()
    gram = algebra.gram(rows, rows)
    return [algebra.pack(gram), gram if x.before is None else algebra.gram(x.before, rows)]


def turn(phase: Phase, x: Side, partner: Side, gram: Tensor, cross: Tensor, blocks: Blocks, s: float) -> Part:
    """Take a side's state to the coordinates of its partner's present rows, from the partner's :func:`overlaps`.

    Second moments follow on their next pass, by ``rotation``.

    Raises:
        RuntimeError: rows that are not finite.
    """
    partner.before = None
    asked = Together(blocks.turned, [x.basis, gram, cross, x.weights], (s, x.momentum.dtype))
    try:
        x.basis, of_momentum, of_second_moment, x.weights = yield phase, asked
    except torch.linalg.LinAlgError as error:
        finite = [bool(each.isfinite().all()) for each in partner.split(gram)]
        broken = [f.name for f, well in zip(partner.factors, finite, strict=True) if not well]
        raise RuntimeError(f"{', '.join(broken[:3])} became infinite or NaN: the run has diverged") from error
    x.momentum = torch.bmm(x.momentum, of_momentum.to(x.momentum))
    x.pending = [torch.bmm(gradient, of_second_moment.to(gradient)) for gradient in x.pending]
    if blocks.in_matrices:  # single numbers belong to the factor's own columns, which have not moved
        x.rotation = of_second_moment if x.rotation is None else torch.bmm(x.rotation, of_second_moment)


def full_step(x: Side, pairs: Pairs, partner: Partner, blocks: Blocks, precision: kernels.Precision) -> Tensor:
    """``U Q`` (b, k, r), what the learning rate is multiplied with: AdamW's step of the full matrix in coordinates.

    Before that, in the same pass, second moments are turned and have what was pending.
    """
    (beta1, beta2), t, (count, size, _) = x.betas, pairs.step, x.momentum.shape
    if not blocks.in_matrices:
        return blocks.elementwise_step(x, t)
    (*older, gradient), rotation = x.pending, None if x.rotation is None else x.rotation.to(x.momentum)
    x.pending, x.rotation = [], None
    bound = algebra.cauchy_schwarz_bound(beta1, beta2, t) if blocks.bounded else math.inf
    update = kernels.projected_update if blocks.projects else kernels.normalized_update
    least = precision if t > EXACT_STEPS else "ieee"
    step, rows_of = torch.empty_like(x.momentum), each_pair(partner.rows)
    for piece in pieces(x.factors[0], size, count) if size else []:
        directions = x.basis[piece]
        if blocks.projects:
            # In float64: the columns of H are long where T is short, and Q must come out orthonormal.
            directions = torch.stack(rows_of[piece]).double() @ (pairs.scaling * directions)
        corrections = blocks.corrections(x, directions, piece, t).to(step)
        directions = directions.to(step)
        for (some, rows), chunk in partner.second_moments.chunks(x.packed[piece]):
            here = slice(piece.start + some.start, piece.start + some.stop)
            kernels.accumulate_second_moment_(
                chunk,
                gradient[here, rows],
                beta2,
                pending=older[0][here, rows] if older else None,
                rotation=None if rotation is None else rotation[here],
                seed=t,
            )
            quotient = kernels.Quotient(1 - beta1**t, corrections[some], x.group["eps"], bound, least)
            step[here, rows] = update(x.momentum[here, rows], chunk, directions[some], quotient)
    return step if blocks.projects else step @ algebra.unscaled_basis(x.basis).to(step)


def move(x: Side, step: Tensor, decay: float = 0.0) -> None:
    """Move rows by a step in coordinates (b, k, r). ``W`` decays with the leading factor, once a step."""
    x.before = x.rows
    x.rows = torch.baddbmm(x.before, step, x.basis.mT.to(step), beta=1 - decay, alpha=-x.lr)


def within_bound(outer: Tensor, length: Tensor, pairs: Pairs, blocks: Blocks) -> Tensor:
    """What the following factor's step is multiplied with (b, 1, 1), so that both are no longer than AdamW's can be.

    Args:
        outer: ``D.T D`` of it, of all rows (b, r, r).
        length: the squared length of the leading factor's step (b,).
        pairs: the stack.
        blocks: the method.
    """
    if not blocks.bounded:
        return torch.ones_like(length)[:, None, None]
    limit = max(algebra.longest_quotient(*x.betas, pairs.step) for x in pairs.sides) ** 2 * pairs.numbers
    own = torch.diagonal(outer, dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(outer.dtype).tiny)
    return ((limit - length).clamp_min(0) / own).clamp(max=1).sqrt()[:, None, None]


def balance(pairs: Pairs, grams: Mapping[Side, Tensor], chosen: Tensor) -> None:
    """Split the products of the chosen pairs (b,) anew, as the shortest factors.

    ``T`` and ``H`` change against each other, so that the coordinates and all state in them stay what they are. Where a
    side has rows ``before``, the basis of its partner belongs to these.

    Args:
        pairs: the stack.
        grams: the Gram matrices of each side's rows (b, r, r).
        chosen: which of the pairs.
    """
    if not bool(chosen.any()):
        return
    c, d, c_inverse, d_inverse = algebra.balance(*(grams[x][chosen] for x in pairs.sides))
    for x, change, inverse in ((pairs.A, c, c_inverse), (pairs.B, d, d_inverse)):
        partner = pairs.partner(x)
        x.rows = changed(x.rows, chosen, change)
        x.before = None if x.before is None else changed(x.before, chosen, change)
        partner.basis = partner.basis.index_put((chosen,), inverse @ partner.basis[chosen])


def changed(rows: Tensor, chosen: Tensor, change: Tensor) -> Tensor:
    """Rows (b, k, r) of which those of the chosen pairs are multiplied by (b', r, r)."""
    return rows.index_put((chosen,), (rows[chosen].double() @ change).to(rows))
