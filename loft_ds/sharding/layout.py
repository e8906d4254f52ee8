"""Who owns which feature rows, and how rows come and go: the one interface between LoFT and any ZeRO stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..factors import Factor, shape_of

Group = dict[str, Any]

HALF_A_PAIR = (
    "of {} and {} only one has a gradient: LoFT moves a pair as one matrix. Freeze both or neither, and build the "
    "optimizer anew."
)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all narrower ones."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Slice:
    """This rank's flat part ``[start, start + numel)`` of a parameter that belongs to no pair."""

    name: str
    data: Tensor
    grad: Tensor
    start: int
    group: Group


@dataclass(frozen=True)
class Rows:
    """This rank's feature rows of one factor: values and gradient (k_i, r), the first being row ``start``.

    (E, k_i, r) of a factor of E experts, in what :meth:`Layout.read` gives.
    """

    values: Tensor
    grad: Tensor
    start: int
    group: Group

    @property
    def count(self) -> int:
        """k_i."""
        return self.values.shape[-2]


@dataclass(frozen=True)
class Share:
    """All that one optimizer step has to work on here."""

    rows: dict[Factor, Rows]
    others: list[Slice]

    @classmethod
    def of(cls, rows: Mapping[Factor, Rows], others: list[Slice]) -> Share:
        """From rows as they lie, (k_i, E r): experts apart, as views."""
        apart = {f: replace(r, values=f.pairs_of(r.values), grad=f.pairs_of(r.grad)) for f, r in rows.items()}
        return cls(apart, others)


class Layout(ABC):
    """Where a rank's share of every trainable parameter lies.

    A step is ``collect`` until it is complete, ``read``, arithmetic on rows, ``write``. Every method but
    ``collect`` and those that only say who holds what is a collective: all ranks call the same ones in the same order.
    """

    world: int = 1  # the ranks that the rows are spread over
    rank: int = 0  # this one among them
    repeats_gradients: bool = False  # whether a parameter without a gradient gets its last one again

    @abstractmethod
    def held(self, param: nn.Parameter) -> tuple[Tensor, Tensor]:
        """The part of a parameter's master weights that this rank holds, flat and writable, and the ``bounds`` (N + 1,)
        of all ranks' parts: rank q holds the flat elements ``bounds[q]:bounds[q + 1]``.
        """

    @abstractmethod
    def row_bounds(self, factor: Factor) -> Tensor:
        """(N + 1,), rank q owns the feature rows ``row_bounds[q]:row_bounds[q + 1]``."""

    @abstractmethod
    def refresh(self) -> None:
        """Bring the model's own weights up to date with master weights that were written through :meth:`held`."""

    def in_one_place(self, factor: Factor) -> bool:
        """Whether all rows of a factor and of its partner are one rank's: then nobody else needs its basis.

        All ranks give the same answer.
        """
        return True

    def sharers(self, factor: Factor) -> int:
        """How many ranks have a part in the products of a factor's pair."""
        return 1

    def bucket(self, factor: Factor) -> Hashable:
        """Factors for which it is the same get their partners together from :meth:`gather`."""
        return None

    @abstractmethod
    def collect(self, param_groups: Sequence[Group]) -> bool:
        """Take what one call of ``Optimizer.step`` carries; True once the step is complete.

        DeepSpeed steps one group (stages 1 and 2) or sub-group (stage 3) a call, but a pair may lie in two of
        them and the clipping norm spans all.
        """

    @abstractmethod
    def read(self) -> Share:
        """The rows and slices of the step just collected."""

    @abstractmethod
    def gather(self, moving: Sequence[Factor]) -> Iterator[dict[Factor, Tensor]]:
        """The moving factors with the *whole* of their partners' rows (l, r) or (E, l, r), unscaled, as they are now in
        what :meth:`read` gave.

        Bucket by bucket, see :meth:`bucket`; only factors that this rank owns rows of.
        """

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share the rows, in place; the identity where every rank has them all."""

    def concerns(self, factor: Factor) -> bool:
        """Whether this rank has a part in the products of a factor's pair: it may own rows of one of the two."""
        return True

    def sum_over_owners(self, products: Sequence[tuple[Factor, Tensor]]) -> None:  # noqa: B027  # alone, it is the sum
        """Sum float64 products of the rows of a pair over the ranks that own these rows, in place.

        Every rank gives those of the pairs that concern it and that are not :meth:`in_one_place`, in the same order.
        """

    @abstractmethod
    def write(self, moved: Sequence[Factor]) -> None:
        """Put the values of moved factors, changed in place in what :meth:`read` gave, where they belong."""


def group_by_tensor(param_groups: Sequence[Group]) -> dict[int, Group]:
    """The parameter group of each tensor in it, by ``id``."""
    return {id(tensor): group for group in param_groups for tensor in group["params"]}


class Whole(Layout):
    """Every rank holds all of every parameter: plain torch, DDP, ZeRO stage 0.

    Args:
        factors: of all pairs.
        others: the other trainable parameters by name.
        masters: what the optimizer steps in place of each model parameter (DeepSpeed's stage 0 in 16 bits keeps
            float32 clones); the parameters themselves where it is None.
    """

    def __init__(
        self,
        factors: Sequence[Factor],
        others: Mapping[str, nn.Parameter],
        masters: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        self._factors = factors
        self._others = others
        self._master: Callable[[nn.Parameter], Tensor] = masters.__getitem__ if masters else lambda param: param
        self._groups: dict[int, Group] = {}
        self._rows: dict[Factor, Rows] = {}

    def held(self, param: nn.Parameter) -> tuple[Tensor, Tensor]:
        return self._master(param).detach().view(-1), torch.tensor([0, param.numel()])

    def row_bounds(self, factor: Factor) -> Tensor:
        return torch.tensor([0, factor.count])

    def refresh(self) -> None:
        for param in [f.param for f in self._factors] + list(self._others.values()):
            param.detach().copy_(self._master(param).detach())

    def collect(self, param_groups: Sequence[Group]) -> bool:
        self._groups = group_by_tensor(param_groups)
        for name, param in [(f.name, f.param) for f in self._factors] + list(self._others.items()):
            master = self._master(param)
            if id(master) not in self._groups or master.shape != shape_of(param):
                raise RuntimeError(
                    f"{name} is not in the optimizer's parameter groups as it was at construction: something rebuilt "
                    "or sharded it (FSDP, a tensor-parallel plan, a changed param_groups, deepspeed.initialize after a "
                    "step without). LoFTAdamW knows plain torch, DDP and DeepSpeed ZeRO stages 0 to 3, one of them a "
                    "run: build it anew for another."
                )
        return True

    def read(self) -> Share:
        self._rows = {}
        for factor in self._factors:
            master, partner = self._master(factor.param), self._master(factor.partner.param)
            if master.grad is None and partner.grad is None:
                # As in torch's own optimizers a layer that took no part in the loss rests. (DeepSpeed fills its
                # gradient with zeros, so there its moments decay and it moves on, as under DeepSpeed's Adam.)
                continue
            if master.grad is None or partner.grad is None:
                raise RuntimeError(HALF_A_PAIR.format(factor.name, factor.partner.name))
            dtype = compute_dtype(master)
            grad = master.grad.to(dtype)
            values = factor.rows_of(master.detach()).to(dtype)
            self._rows[factor] = Rows(values, factor.rows_of(grad), 0, self._groups[id(master)])
        others = []
        for name, param in self._others.items():
            master = self._master(param)
            if master.grad is not None:
                flat = master.detach().view(-1), master.grad.reshape(-1)
                others.append(Slice(name, *flat, 0, self._groups[id(master)]))
        return Share.of(self._rows, others)

    def gather(self, moving: Sequence[Factor]) -> Iterator[dict[Factor, Tensor]]:
        yield {f: f.partner.pairs_of(self._rows[f.partner].values) for f in moving}

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def write(self, moved: Sequence[Factor]) -> None:
        for factor in moved:
            rows, target = self._rows[factor].values, factor.rows_of(self._master(factor.param).detach())
            if rows.data_ptr() != target.data_ptr():
                target.copy_(rows)
        self._rows = {}  # it holds gradients, which zero_grad is to free
