"""A stack of pairs alike: this rank's feature rows of both factors, and all state that LoFT keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .factors import Factor
from .sharding import Rows

# Upper limit of the rows of a stack, its own and the partners', in float64. A step copies a few stacks' worth. A factor
# of many experts may be more: the partners' rows of so much are taken at a time.
STACK_BYTES = 8 << 20


@dataclass(eq=False)
class Side:
    """One factor of b pairs. A factor of E experts is E of them, one after the other.

    Coordinates are those of an orthonormal basis ``Q = T @ H`` of the partner's scaled rows ``T``.

    Attributes:
        factors: the factors.
        starts: the first row of each that is this rank's.
        momentum: (b, k, r), in coordinates.
        second_moments: of each factor (k, r(r+1)/2) or (E, k, r(r+1)/2), packed, in coordinates before ``rotation``.
        weights: ``S`` (b, r, r) in float64: see :func:`loft_ds.algebra.turned_weights`.
        basis: ``H`` (b, r, r) in float64, for ``T`` before its last move where the partner has ``before``; zeros before
            the first step.
        rotation: (b, r, r) in float64, from the second moments' coordinates to the present ones; None where these are
            the same.
        before: the rows before their last move (b, k, r), which the partner's basis still belongs to; None where it is
            up to date.
        pending: gradients in coordinates (b, k, r), oldest first, that the second moments have not had yet.
        home: where this step's rows and gradients lie, of each factor; none between steps.
    """

    factors: list[Factor]
    starts: list[int]
    momentum: Tensor
    second_moments: list[Tensor]
    weights: Tensor
    basis: Tensor
    rotation: Tensor | None = None
    before: Tensor | None = None
    pending: list[Tensor] = field(default_factory=list)
    home: Sequence[Rows] = field(default=(), repr=False)
    _moved: Tensor | None = field(default=None, repr=False)

    @property
    def group(self) -> dict[str, Any]:
        """The parameter group, as of this step."""
        return self.home[0].group

    @property
    def lr(self) -> float:
        """The learning rate; a tensor's value, as torch's optimizers take one."""
        return float(self.group["lr"])

    @property
    def betas(self) -> tuple[float, float]:
        beta1, beta2 = self.group["betas"]
        return beta1, beta2

    @property
    def rows(self) -> Tensor:
        """The rows themselves (b, k, r), unscaled: a copy, so that none of them is held between a step's phases."""
        return torch.stack(each_pair(rows.values for rows in self.home)) if self._moved is None else self._moved

    @rows.setter
    def rows(self, rows: Tensor) -> None:
        self._moved = rows

    @property
    def gradient(self) -> Tensor:
        """The gradient of the rows (b, k, r), a copy."""
        return torch.stack(each_pair(rows.grad for rows in self.home))

    @cached_property
    def packed(self) -> list[Tensor]:
        """The second moments of every pair, in place."""
        return each_pair(self.second_moments)

    def write(self) -> None:
        """Put rows that have moved where they belong. One launch where they are strided as there."""
        if self._moved is not None:
            values = [rows.values for rows in self.home]
            by_rows = values[0].stride(-1) == 1
            # A copy, since contiguous() makes none at r = 1, where it leaves other strides than these.
            strided = self._moved if by_rows else self._moved.mT.clone(memory_format=torch.contiguous_format).mT
            torch._foreach_copy_(values, self.split(strided))
            self._moved = None

    def release(self) -> None:
        """Forget what belongs to a step alone: DeepSpeed is to free its gradients."""
        self.home, self._moved = (), None

    def split(self, stacked: Tensor) -> list[Tensor]:
        """What belongs to each factor of ``stacked`` (b, ., .): (., .), or (E, ., .) of E experts."""
        experts = self.factors[0].experts
        return list(stacked.unbind() if experts == 1 else stacked.split(experts))

    def select(self, member: int) -> Side:
        """One factor alone, as views."""
        experts = self.factors[0].experts
        here = slice(member * experts, (member + 1) * experts)
        parts = {key: None if t is None else t[here] for key, t in self._stacked().items()}
        pending = [t[here] for t in self.pending]
        member_of = slice(member, member + 1)
        return Side(
            self.factors[member_of],
            self.starts[member_of],
            second_moments=self.second_moments[member_of],
            pending=pending,
            **parts,  # type: ignore[arg-type]
        )

    @classmethod
    def join(cls, sides: Sequence[Side]) -> Side:
        """Sides alike as one, with memory of its own: they may be views of larger ones."""
        stacked = [side._stacked() for side in sides]
        parts = {
            key: None if t is None else torch.cat([other for each in stacked if (other := each[key]) is not None])
            for key, t in stacked[0].items()
        }
        return cls(
            [f for side in sides for f in side.factors],
            [start for side in sides for start in side.starts],
            second_moments=[moments for side in sides for moments in side.second_moments],
            pending=[torch.cat(each) for each in zip(*(side.pending for side in sides), strict=True)],
            **parts,  # type: ignore[arg-type]
        )

    def _stacked(self) -> dict[str, Tensor | None]:
        return {key: getattr(self, key) for key in ("momentum", "weights", "basis", "rotation", "before")}


@dataclass(eq=False)
class Pairs:
    """b pairs alike, ``W = W0 + scaling * B @ A``, that have taken the same number of steps.

    Attributes:
        A: their factors ``A``.
        B: their factors ``B``.
        joint: whether both move on every step.
        step: how many they have taken.
    """

    A: Side
    B: Side
    joint: bool
    step: int

    @property
    def scaling(self) -> float:
        """PEFT's ``s``."""
        return self.A.factors[0].scaling

    @property
    def numbers(self) -> int:
        """Of one matrix ``W``."""
        return self.A.factors[0].count * self.B.factors[0].count

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.A, self.B

    def in_turn(self) -> tuple[Side, Side]:
        """The factor whose turn this step is, and the other one: ``B`` leads on odd steps."""
        return (self.B, self.A) if self.step % 2 else (self.A, self.B)

    def partner(self, side: Side) -> Side:
        return self.B if side is self.A else self.A

    def singles(self) -> list[Pairs]:
        """Each pair as a stack of its own."""
        if len(self.A.factors) == 1:
            return [self]
        members = range(len(self.A.factors))
        return [Pairs(self.A.select(i), self.B.select(i), self.joint, self.step) for i in members]

    @classmethod
    def join(cls, stacks: Sequence[Pairs]) -> Pairs:
        """Stacks alike as one."""
        a, b = (Side.join(sides) for sides in zip(*(stack.sides for stack in stacks), strict=True))
        return cls(a, b, stacks[0].joint, stacks[0].step)


def each_pair(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of each factor its tensor (., .), of one of experts every expert's."""
    return [pair for tensor in tensors for pair in (tensor if tensor.dim() == 3 else [tensor])]


def pieces(factor: Factor, rows: int, count: int) -> list[slice]:
    """Runs of ``count`` pairs like these of which the partner's rows are at most ``STACK_BYTES``."""
    most = most_pairs(factor, rows)
    return [slice(start, min(start + most, count)) for start in range(0, count, most)]


def most_pairs(factor: Factor, rows: int) -> int:
    """How many pairs of which a rank owns so many of this factor's rows are at most ``STACK_BYTES``."""
    return max(1, STACK_BYTES // (8 * factor.rank * (rows + factor.partner.count)))


State = dict[str, Any]
Place = Callable[[str, Tensor, torch.device], Tensor]


def state_of(side: Side, step: int) -> dict[str, State]:
    """What is saved of each factor, keyed by its name: counters, and views of the tensors, of those that it has."""
    out = {}
    for i, factor in enumerate(side.factors):
        one = side.select(i)
        kinds = {**one._stacked(), "pending": one.pending[0] if one.pending else None}
        if not one.momentum.shape[-2]:
            kinds.update(weights=None, rotation=None)  # no second moment needs them
        if not one.basis.numel():
            kinds.update(basis=None)  # a pair that this rank has no part in
        tensors = {kind: t if factor.experts > 1 else t[0] for kind, t in kinds.items() if t is not None}
        out[factor.name] = {"step": step, "start": one.starts[0], "second_moment": one.second_moments[0], **tensors}
    return out


def side_at_start(factor: Factor, rows: Rows, second_moment: Tensor, concerned: bool) -> Side:
    """A factor's side before any step. No rank keeps (r, r) matrices of pairs that it has no part in."""
    r = factor.rank if concerned else 0
    momentum = rows.values.new_zeros(factor.experts, rows.count, factor.rank)
    weights, basis = momentum.new_zeros(2, factor.experts, r, r, dtype=torch.float64)
    return Side([factor], [rows.start], momentum, [second_moment], weights, basis)


def side_from(factor: Factor, state: State, rows: Rows, place: Place, concerned: bool) -> Side:
    """A factor's side from what :func:`state_of` gave.

    Raises:
        RuntimeError: it is of other rows than this rank's.
    """
    if state["start"] != rows.start or state["momentum"].shape != rows.values.shape:
        raise RuntimeError(
            f"the loaded state of {factor.name} is of {state['momentum'].shape[-2]} rows from row {state['start']} on, "
            f"this rank owns {rows.count} from row {rows.start} on: it was saved on another world size or ZeRO stage. "
            "Resume on the same ones."
        )
    # A state may have been gathered in another precision. Of the second moment it is the optimizer's choice.
    of_rows: State = {
        kind: state[kind].to(rows.values.dtype) for kind in ("momentum", "before", "pending") if kind in state
    }
    placed = {k: place(k, t, rows.values.device) for k, t in {**state, **of_rows}.items() if isinstance(t, Tensor)}
    side = side_at_start(factor, rows, placed.pop("second_moment"), concerned)
    for kind, tensor in placed.items():
        stacked = tensor if factor.experts > 1 else tensor[None]
        setattr(side, kind, [stacked] if kind == "pending" else stacked)
    return side
