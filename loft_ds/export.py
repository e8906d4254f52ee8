"""Adapters out of a running job, in PEFT's own format, from any ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor

from .adapters import adapters_of, parameters_of, started_from_gradients
from .checkpoint import attached
from .ranks import first_rank, together

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from .optimizer import LoFTAdamW


def export_adapter(target: DeepSpeedEngine | LoFTAdamW, directory: str | Path, *, merge: bool = False) -> None:
    """Write the adapter in PEFT's format, from any ZeRO stage, also in the middle of training.

    A collective: every rank calls it; the first writes.

    Args:
        target: the engine, or without DeepSpeed the optimizer.
        directory: where ``PeftModel.from_pretrained`` will read it.
        merge: write the whole model with the adapter merged into ``directory/merged`` as well. The first rank then
            loads the base model from where the adapter's config says it came from, on the CPU.

    Raises:
        ValueError: ``merge`` of an adapter that started from LoRA-GA: it belongs to weights that are not on disk.
    """
    optimizer, _, engine = attached(target)
    model = cast(PeftModel, optimizer.model if engine is None else engine.module)
    if merge and (started := started_from_gradients(model)):
        raise ValueError(
            f"merge=True would merge {', '.join(started)} into the model on disk, from whose weights LoRA-GA took its "
            "start out. Merge the model in memory: model.merge_and_unload()."
        )
    state = adapter_state_dict(model, engine)
    with together():
        if first_rank():
            model.save_pretrained(str(directory), state_dict=state)
            if merge:
                _merge(Path(directory))


def _merge(directory: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers.integrations import deepspeed as integration

    # Under stage 3 transformers would shard the model it loads over all ranks.
    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(directory)
    finally:
        integration._hf_deepspeed_config_weak_ref = config
    model.merge_and_unload().save_pretrained(directory / "merged")


def adapter_state_dict(model: nn.Module, engine: DeepSpeedEngine | None) -> dict[str, Tensor]:
    """All that PEFT may save of a model, whole, on the CPU, under any ZeRO stage.

    That is what is trained, every adapter whether it is trained or not, and the buffers.

    A collective under stage 3: all ranks call it, one parameter at a time is gathered.
    """
    if engine is not None and engine.zero_optimization_partition_weights():
        engine.empty_partition_cache()  # an evaluation leaves prefetched parameters in flight
    kept = {id(p) for p in model.parameters() if p.requires_grad}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            kept |= {id(p) for adapter in adapters_of(module) for p in parameters_of(module, adapter)}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            frozen = {id(p) for p in module.original_module.parameters()}
            kept |= {id(p) for p in module.parameters()} - frozen
    state = {name: _whole(param) for name, param in model.named_parameters() if id(param) in kept}
    return state | {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}


def _whole(param: nn.Parameter) -> Tensor:
    if not hasattr(param, "ds_id"):
        return param.detach().cpu()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([param]):
        return param.detach().cpu().clone()


def _merge(directory: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers.integrations import deepspeed as integration

    # Under stage 3 transformers would shard the model it loads over all ranks.
    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(directory)
    finally:
        integration._hf_deepspeed_config_weak_ref = config
    model.merge_and_unload().save_pretrained(directory / "merged")


def adapter_state_dict(model: PeftModel, engine: DeepSpeedEngine | None) -> dict[str, Tensor]:
    """All that PEFT saves of a model, whole, on the CPU, under any ZeRO stage.

    That is every adapter whether it is trained or not, and what PEFT keeps beside it: saved modules with their buffers,
    biases, embeddings that have been resized.

    A collective under stage 3: all ranks call it, one parameter at a time is gathered.

    Raises:
        ValueError: PEFT saves nothing of this model.
    """
    partitioned = engine is not None and engine.zero_optimization_partition_weights()
    if engine is not None and partitioned:
        engine.empty_partition_cache()  # an evaluation leaves prefetched parameters in flight
    with uncompiled(model) as plain:
        tensors = plain.state_dict(keep_vars=True)
        with together() if partitioned else nullcontext():
            names = _saved(cast(PeftModel, plain), tensors)
    if partitioned:
        names = all_gather(names)[0]  # whether embeddings were resized is looked up where each rank finds the base
    whole = functools.cache(_whole)  # a tied parameter has two names
    return {name: whole(tensors[name]) for name in names}


def _saved(model: PeftModel, tensors: dict[str, Tensor]) -> list[str]:
    """Which of a model's tensors PEFT saves. PEFT itself is asked, and what is trained and not among them warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says the same when it saves
        saved = {
            id(t)
            for adapter in model.peft_config
            for t in get_peft_model_state_dict(model, state_dict=tensors, adapter_name=adapter).values()
        }
    names = [name for name, t in tensors.items() if id(t) in saved]
    if not names:
        raise ValueError(f"PEFT finds nothing to save in this model for the adapters {list(model.peft_config)}")
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if left_out and first_rank():
        warnings.warn(
            f"PEFT saves no trained parameter outside of its adapters: {', '.join(left_out[:3])}{' ...' if len(left_out) > 3 else ''}. Have their modules saved with "
            "LoraConfig(modules_to_save=[...]) from the start, or save them yourself.",
            stacklevel=2,
        )
    return names


def _whole(param: Tensor) -> Tensor:
    if not hasattr(param, "ds_id"):
        return param.detach().cpu()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([param]):
        return param.detach().cpu().clone()
