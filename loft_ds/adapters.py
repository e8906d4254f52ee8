"""Find the LoRA factor pairs of a PEFT model through PEFT's layer objects, never through names."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
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


def lost_starts(model: nn.Module) -> dict[str, str]:
    """The adapters that are none of the model on disk, with the start that made them so.

    These starts move a part of the frozen weights into the adapter, and PEFT cannot do it again when it loads one: of
    LoRA-GA's gradients and CorDA's statistics nothing is saved, and the fast SVD of ``pissa_niter_N`` is a random one.
    (PiSSA, OLoRA, LoftQ and KaSA change the frozen weights too, and PEFT finds the same change at each loading.)
    """
    configs = getattr(model, "peft_config", {})
    starts = {name: str(getattr(config, "init_lora_weights", "")) for name, config in configs.items()}
    return {name: start for name, start in starts.items() if start.startswith(("lora_ga", "corda", "pissa_niter_"))}


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it is without ``torch.compile``, whose wrappers put ``_orig_mod`` into the names of all they hold.

    Within the block no module of it is wrapped, so names are those that PEFT knows and a checkpoint keeps.
    """
    wrapped = [
        (holder._modules, key, module)
        for holder in model.modules()
        for key, module in holder._modules.items()
        if module is not None and "_orig_mod" in module._modules and key != "_orig_mod"
    ]
    for modules, key, module in wrapped:
        modules[key] = _unwrapped(module)
    try:
        yield _unwrapped(model)
    finally:
        for modules, key, module in wrapped:
            modules[key] = module


def _unwrapped(module: nn.Module) -> nn.Module:
    while (inner := module._modules.get("_orig_mod")) is not None:
        module = inner
    return module


def find_trainable(model: nn.Module) -> Trainable:
    """Sort a PEFT model's trainable parameters into factor pairs and others, under the uncompiled model's names.

    Raises:
        ValueError: a model with no pair LoFT can treat, a factor shared by two layers, a pair that is half frozen,
            parameters that lie in the same memory, that have no values yet, or that something else than DeepSpeed
            shards.
    """
    with uncompiled(model) as plain:
        names = {p: n for n, p in plain.named_parameters() if p.requires_grad}
        _check_memory(names)
        pairs, untreated = _sort(plain, names)
        if not pairs:
            raise ValueError("the model has no trainable LoRA pair for LoFT. " + _why_none(plain, untreated))
    factors = {factor.param for pair in pairs for factor in pair}
    others = {name: p for p, name in names.items() if p not in factors}
    return Trainable(pairs, others, untreated)


def _check_memory(names: dict[nn.Parameter, str]) -> None:
    """Refuse parameters whose values one step cannot move, or would move twice."""
    spans = []
    for p, name in names.items():
        if isinstance(p, DTensor):
            raise ValueError(
                f"{name} is a DTensor, sharded by FSDP2 or a tensor-parallel plan: LoFTAdamW knows plain torch, DDP "
                "and DeepSpeed ZeRO stages 0 to 3."
            )
        if p.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values: low_cpu_mem_usage=True of get_peft_model leaves new "
                "adapters so. Leave it out."
            )
        # Bytes and not the storage: after DeepSpeed has flattened them, parameters lie side by side in one. What stage
        # 3 has partitioned is empty here, and each such parameter has memory of its own.
        if p.numel():
            reach = 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + reach * p.element_size(), name))
    for (device, _, end, first), (other, start, _, second) in itertools.pairwise(sorted(spans)):
        if device == other and start < end:
            raise ValueError(
                f"{first} and {second} lie in the same memory, and each step would move it twice. PEFT's "
                "ensure_weight_tying ties the adapters of an embedding and its head so. Leave it out."
            )


def _sort(model: nn.Module, names: dict[nn.Parameter, str]) -> tuple[list[tuple[Factor, Factor]], dict[str, str]]:
    """The pairs that LoFT treats, and the names of the other adapters' parameters with the reasons why it does not."""
    pairs: list[tuple[Factor, Factor]] = []
    untreated: dict[str, str] = {}
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for path, layer in model.named_modules():
        # Trainable tokens are rows of the weight itself, like the modules that PEFT saves whole.
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, TrainableTokensLayer):
            continue
        for adapter in adapters_of(layer):
            found = _pair_of(layer, adapter, names) if isinstance(layer, LoraLayer) else type(layer).__name__
            own = [p for p in parameters_of(layer, adapter) if p in names]
            if isinstance(found, str):
                untreated.update({names[p]: found for p in own})
            elif found is not None:
                pairs.append(found)
            for p in own:
                owners[p].append(path)
    for factor in (factor for pair in pairs for factor in pair):
        if len(owners[factor.param]) > 1:
            raise ValueError(
                f"{factor.name} is shared by {' and '.join(owners[factor.param])}: LoFT cannot follow two matrices "
                "with one factor. Give each layer an adapter of its own, or target only one of them."
            )
    return pairs, untreated


def _why_none(model: nn.Module, untreated: dict[str, str]) -> str:
    """Why a model has no pair, and what to do about it."""
    if untreated:
        kinds = sorted(set(untreated.values()))
        return (
            f"Its adapters are of kinds LoFT does not treat: {kinds}. docs/settings.md says which LoraConfig it does."
        )
    if any(isinstance(layer, LoraLayer) for layer in model.modules()):
        return (
            "Its LoRA adapters are frozen: load them with PeftModel.from_pretrained(..., is_trainable=True), make new "
            "ones with LoraConfig(inference_mode=False), or choose which to train with model.set_adapter(NAME)."
        )
    return "Wrap it with peft.get_peft_model(model, LoraConfig(...)) first."
