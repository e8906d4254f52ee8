"""Find the LoRA factor pairs of a PEFT model through PEFT's layer objects, never through names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from .factors import Factor, Trainable, shape_of


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


def started_from_gradients(model: nn.Module) -> list[str]:
    """The adapters whose start ``B0 A0`` LoRA-GA took out of the frozen weights.

    Saved, they are no adapters of the model on disk. (PiSSA and OLoRA change the frozen weights too, but need nothing
    else for it: PEFT changes them again when it loads the adapter.)
    """
    configs = getattr(model, "peft_config", {})
    return [name for name, config in configs.items() if getattr(config, "init_lora_weights", None) == "lora_ga"]


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
