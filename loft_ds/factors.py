"""A factor of a LoRA pair as feature rows, and what LoFT trains of a model. Imports neither PEFT nor transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def shape_of(param: Tensor) -> torch.Size:
    """The parameter's own shape, also while ZeRO stage 3 keeps it partitioned (``ds_shape``, DeepSpeed's
    zero/partition_parameters.py) and ``param.shape`` is ``(0,)``.
    """
    return torch.Size(getattr(param, "ds_shape", param.shape))


@dataclass(eq=False)
class Factor:
    """One factor of a pair: ``A`` (r, n) or ``B`` (m, r), seen as ``count`` feature rows of length ``width``.

    PEFT keeps the pairs of a layer's experts in one parameter, ``A`` (E r, n) and ``B`` (m, r E). A feature row is then
    that of all E pairs. Rows are sharded, sent and stored as they are; the arithmetic is each pair's own.

    Attributes:
        name: the parameter's name in the model.
        param: the model's own parameter.
        side: which factor it is.
        count: k, its number of feature rows: n for ``A``, m for ``B``.
        rank: r, of one pair.
        experts: E, how many pairs the parameter holds.
        partner: the other factor of the pair.
    """

    name: str
    param: nn.Parameter
    side: Literal["A", "B"]
    count: int
    rank: int
    layer: LoraLayer = field(repr=False)
    adapter: str
    experts: int = 1
    partner: Factor = field(init=False, repr=False)

    @property
    def width(self) -> int:
        """Numbers in a feature row, E r."""
        return self.experts * self.rank

    @property
    def numel(self) -> int:
        return self.count * self.width

    @property
    def scaling(self) -> float:
        """PEFT's ``s`` of ``W = W0 + s * B @ A``."""
        return float(self.layer.scaling[self.adapter])

    def rows_of(self, matrix: Tensor) -> Tensor:
        """The feature rows (k, E r) of this factor as a view of a tensor of the factor's own shape."""
        return matrix.T if self.side == "A" else matrix

    def pairs_of(self, rows: Tensor) -> Tensor:
        """Rows (k, E r) as those of each pair, a view (E, k, r); of a single pair (k, r) they are that already.

        PEFT's ``A`` has the experts one after the other, its ``B`` has them innermost (``ParamWrapper`` in its
        tuners/lora/layer.py, get_delta_weight).
        """
        if self.experts == 1:
            return rows
        if self.side == "A":
            return rows.unflatten(1, (self.experts, self.rank)).movedim(1, 0)
        return rows.unflatten(1, (self.rank, self.experts)).movedim(2, 0)


@dataclass(frozen=True)
class Trainable:
    """What LoFT trains of a model.

    Attributes:
        pairs: the factor pairs (A, B), LoFT's.
        others: every other trainable parameter by name, AdamW's.
        untreated: the part of ``others`` that belongs to an adapter, with the reason why LoFT leaves it to AdamW.
    """

    pairs: list[tuple[Factor, Factor]]
    others: dict[str, nn.Parameter]
    untreated: dict[str, str]

    @property
    def factors(self) -> list[Factor]:
        return [factor for pair in self.pairs for factor in pair]

    @cached_property
    def factor_by_name(self) -> dict[str, Factor]:
        """Both factors of every pair."""
        return {factor.name: factor for factor in self.factors}

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained by name, factors first."""
        return {factor.name: factor.param for factor in self.factors} | self.others
