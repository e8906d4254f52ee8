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

# Upper limit of the rows of a batch, its own and the partners', in float64. A step copies a few batches' worth. A
# factor of many experts may be more: the partners' rows of so much are taken at a time.
BATCH_BYTES = 8 << 20


@dataclass(eq=False)
class Batch:
    """b pairs that look like one with a leading dimension: of equal (k, r), partner's size, scaling, group and step.

    A factor of E experts is E of them, one after the other.

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
        return self.rows[0].count == 0

    def pieces(self) -> list[slice]:
        """Runs of pairs of at most ``BATCH_BYTES``."""
        count, most = len(self.factors) * self.factors[0].experts, _most_pairs(self.factors[0], self.rows[0])
        return [slice(start, min(start + most, count)) for start in range(0, count, most)]

    def has(self, key: str) -> bool:
        return key in self.states[0]

    def values(self) -> Tensor:
        """The rows (b, k, r), a copy."""
        return torch.stack(each_pair(rows.values for rows in self.rows))

    def gradients(self) -> Tensor:
        """Their gradients (b, k, r), a copy."""
        return torch.stack(each_pair(rows.grad for rows in self.rows))

    def each(self, key: str) -> list[Tensor]:
        """One kind of state of every pair, in place."""
        return each_pair(state[key] for state in self.states)

    def stacked(self, key: str) -> Tensor:
        """One kind of state (b, ...), a copy."""
        return torch.stack(self.each(key))

    def take(self, key: str) -> Tensor:
        """The same, and the state has it no longer."""
        return torch.stack(each_pair([state.pop(key) for state in self.states]))

    def split(self, stacked: Tensor) -> list[Tensor]:
        """What belongs to each factor of ``stacked`` (b, ., .): (., .), or (E, ., .) of E experts."""
        experts = self.factors[0].experts
        return list(stacked.unbind() if experts == 1 else stacked.split(experts))

    def joined(self, parts: Mapping[Factor, Tensor]) -> Tensor:
        """The other way: what each factor has, stacked (b, ., .), a copy."""
        return torch.stack(each_pair(parts[f] for f in self.factors))

    def parts(self, stacked: Tensor) -> list[Tensor]:
        """The same of rows (b, k, r), strided as its values: foreach is one launch then."""
        strides = self.rows[0].values.stride()
        return self.split(stacked if strides[-1] == 1 else stacked.mT.contiguous().mT)

    def store(self, key: str, stacked: Tensor) -> None:
        """Give each factor its part of ``stacked`` (b, ...)."""
        for state, part in zip(self.states, own_copies(self.split(stacked.contiguous())), strict=True):
            state[key] = part


def _most_pairs(factor: Factor, rows: Rows) -> int:
    """How many pairs like these are at most ``BATCH_BYTES``."""
    return max(1, BATCH_BYTES // (8 * factor.rank * (rows.count + factor.partner.count)))


def each_pair(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of each factor its tensor (., .), of one of experts every expert's."""
    return [pair for tensor in tensors for pair in (tensor if tensor.dim() == 3 else [tensor])]


def own_copies(parts: Iterable[Tensor]) -> list[Tensor]:
    """Each laid out in memory of its own as a checkpoint gives it back. One launch where they are contiguous.

    Not views of one buffer: that would live as long as any of them.
    """
    given = list(parts)
    own = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in given]
    torch._foreach_copy_(own, given)
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
        size = max(1, _most_pairs(members[0], rows[members[0]]) // members[0].experts)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            out.append(Batch(part, [rows[f] for f in part], [states[f.name] for f in part]))
    return out
