"""Find the LoRA factor pairs of a PEFT model through PEFT's layer objects, never through names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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


def _pair_of(layer: LoraLayer, adapter: str, names: dict[nn.Parameter, str]) -> tuple[Factor, Factor] | str | None:
    """The layer's pair for one adapter; a reason why LoFT cannot treat it; None where it is frozen."""
    if not any(p in names for p in parameters_of(layer, adapter)):
        return None
    if adapter in layer.lora_variant:
        return type(layer.lora_variant[adapter]).__name__.removesuffix("Variant")
    if adapter not in layer.lora_A or adapter not in layer.lora_B:
        return f"lora.{type(layer).__name__}"
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear):
        return f"lora.{type(layer).__name__}"
    a, b = cast(nn.Parameter, down.weight), cast(nn.Parameter, up.weight)
    trainable = [a in names, b in names]
    if not any(trainable):
        return None  # only a bias of the adapter is trained
    if not all(trainable):
        frozen = "lora_A" if trainable[1] else "lora_B"
        raise ValueError(
            f"{frozen} of {names[b if trainable[1] else a]} is frozen and its partner is not: "
            "LoFT moves a pair as one matrix. Train both or neither."
        )
    # A ParamWrapper adapts a parameter and not a layer: one matrix, or one for each expert, whichever way round it is
    # stored, for AdamW treats each number by itself.
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    (width, n), (m, _) = shape_of(a), shape_of(b)
    rank = width // experts
    if rank > min(m, n):
        # T has fewer directions than columns then, and which ones is decided by rounding.
        return f"rank {rank} in a layer of {n} inputs and {m} outputs"
    factor_a = Factor(names[a], a, "A", n, rank, layer, adapter, experts)
    factor_b = Factor(names[b], b, "B", m, rank, layer, adapter, experts)
    factor_a.partner, factor_b.partner = factor_b, factor_a
    return factor_a, factor_b


def parameters_of(layer: BaseTunerLayer, adapter: str) -> list[nn.Parameter]:
    """The parameters that a PEFT layer holds for one adapter."""
    own: list[nn.Parameter] = []
    for attribute in layer.adapter_layer_names:
        container = getattr(layer, attribute, None)
        if isinstance(container, nn.ModuleDict | nn.ParameterDict) and adapter in container:
            entry = container[adapter]
            own += [entry] if isinstance(entry, nn.Parameter) else list(entry.parameters())
    return own


def adapters_of(layer: BaseTunerLayer) -> Iterator[str]:
    """Names of the adapters that a PEFT layer holds anything of, in the order they were added."""
    seen = {}
    for attribute in layer.adapter_layer_names:
        seen.update(dict.fromkeys(getattr(layer, attribute, {}).keys()))
    yield from seen


def find_trainable(model: nn.Module) -> Trainable:
    """Sort a PEFT model's trainable parameters into factor pairs and others.

    Raises:
        ValueError: a model with no pair LoFT can treat, a factor shared by two layers, a pair that is half frozen,
            parameters that something else than DeepSpeed shards.
    """
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    sharded = next((n for p, n in names.items() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded} is a DTensor, sharded by FSDP2 or a tensor-parallel plan: LoFTAdamW knows plain torch, DDP and "
            "DeepSpeed ZeRO stages 0 to 3."
        )
    pairs: list[tuple[Factor, Factor]] = []
    untreated: dict[str, str] = {}
    owner: dict[nn.Parameter, str] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for adapter in adapters_of(layer):
            found = _pair_of(layer, adapter, names) if isinstance(layer, LoraLayer) else type(layer).__name__
            if found is None:
                continue
            if isinstance(found, str):
                own = parameters_of(layer, adapter)
                untreated.update({names[p]: found for p in own if p in names})
            else:
                own = [factor.param for factor in found]
                pairs.append(found)
            for p in own:
                if p in names and owner.setdefault(p, path) != path:
                    raise ValueError(
                        f"{names[p]} is shared by {owner[p]} and {path}: LoFT cannot follow two matrices with one "
                        "factor. Give each layer an adapter of its own, or target only one of them."
                    )
    if not pairs:
        reasons = (
            f" Its adapters are of kinds LoFT does not treat: {sorted(set(untreated.values()))}." if untreated else ""
        )
        raise ValueError(
            "the model has no trainable LoRA pair for LoFT." + reasons + " Wrap it with peft.get_peft_model(model, "
            "LoraConfig(...)) first, and see the README's table of what is treated."
        )
    factors = {factor.param for pair in pairs for factor in pair}
    others = {name: p for p, name in names.items() if p not in factors}
    return Trainable(pairs, others, untreated)
