"""Factors that are alike, stacked, so that hundreds of small pairs cost as many launches as a few."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .factors import Factor
from .sharding import Rows

# Upper limit of the rows of a batch, its own and the partners', in float64. A step copies a few batches' worth.
BATCH_BYTES = 8 << 20


@dataclass(eq=False)
class Batch:
    """b factors that look like one with a leading dimension: of equal (k, r), partner's size, scaling, group and step.

    Attributes:
        factors: the factors.
        rows: this rank's rows of each.
        states: the optimizer's state of each.
    """

    factors: list[Factor]
    rows: list[Rows]
    states: list[dict[str, Any]]

    @property
    def group(self) -> dict[str, Any]:
        return self.rows[0].group

    @property
    def dtype(self) -> torch.dtype:
        return self.rows[0].values.dtype

    @property
    def device(self) -> torch.device:
        return self.rows[0].values.device

    @property
    def step(self) -> int:
        return self.states[0]["step"]

    @property
    def scaling(self) -> float:
        return self.factors[0].scaling

    @property
    def is_empty(self) -> bool:
        """Whether this rank owns no row of these factors."""
        return len(self.rows[0].values) == 0

    def has(self, key: str) -> bool:
        return key in self.states[0]

    def values(self) -> Tensor:
        """The rows (b, k, r), a copy."""
        return torch.stack([rows.values for rows in self.rows])

    def gradients(self) -> Tensor:
        """Their gradients (b, k, r), a copy."""
        return torch.stack([rows.grad for rows in self.rows])

    def each(self, key: str) -> list[Tensor]:
        """One kind of state, in place."""
        return [state[key] for state in self.states]

    def stacked(self, key: str) -> Tensor:
        """One kind of state (b, ...), a copy."""
        return torch.stack(self.each(key))

    def take(self, key: str) -> Tensor:
        """The same, and the state has it no longer."""
        return torch.stack([state.pop(key) for state in self.states])

    def parts(self, stacked: Tensor) -> list[Tensor]:
        """What belongs to each factor of ``stacked`` (b, k, r), strided as its values: foreach is one launch then."""
        strides = self.rows[0].values.stride()
        return list((stacked if strides[1] == 1 else stacked.mT.contiguous().mT).unbind())

    def store(self, key: str, stacked: Tensor) -> None:
        """Give each factor its part of ``stacked`` (b, ...)."""
        for state, part in zip(self.states, own_copies(stacked), strict=True):
            state[key] = part


def own_copies(stacked: Tensor) -> list[Tensor]:
    """The parts of ``stacked`` (b, ...), each laid out in memory of its own as a checkpoint gives it back.

    Not views of one buffer: that would live as long as any of them.
    """
    parts = list(stacked.contiguous().unbind())
    own = [torch.empty_like(part) for part in parts]
    torch._foreach_copy_(own, parts)
    return own


def batches(
    factors: Iterable[Factor],
    rows: Mapping[Factor, Rows],
    states: Mapping[str, dict[str, Any]],
    likeness: Callable[[Factor], Hashable] = lambda _: None,
) -> list[Batch]:
    """Factors in batches of at most ``BATCH_BYTES``, in order of the first of each kind.

    Args:
        factors: the factors.
        rows: this rank's rows of each.
        states: the optimizer's state by name.
        likeness: what else must be equal within a batch.
    """

    def kind(factor: Factor) -> Hashable:
        own, state = rows[factor], states[factor.name]
        shapes = own.values.shape, own.values.stride(), factor.partner.count, own.values.dtype, own.values.device
        return *shapes, factor.scaling, id(own.group), state["step"], "pending" in state, likeness(factor)

    alike: dict[Hashable, list[Factor]] = defaultdict(list)
    for factor in factors:
        alike[kind(factor)].append(factor)
    out = []
    for members in alike.values():
        bytes_each = 8 * members[0].rank * (len(rows[members[0]].values) + members[0].partner.count)
        size = max(1, BATCH_BYTES // bytes_each)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            out.append(Batch(part, [rows[f] for f in part], [states[f.name] for f in part]))
    return out
