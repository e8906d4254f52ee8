"""Adapters out of a running job, in PEFT's own format, from any ZeRO stage."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from .adapters import lost_starts, uncompiled
from .checkpoint import attached
from .quantised import is_quantised
from .ranks import all_gather, first_rank, together

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from .optimizer import LoFTAdamW


# What a new head needs of the trained model's config: the one on disk may be a language model's.
HEAD = ("id2label", "label2id", "problem_type")


def export_adapter(target: DeepSpeedEngine | LoFTAdamW, directory: str | Path, *, merge: bool = False) -> None:
    """Write the adapter in PEFT's format, from any ZeRO stage, also in the middle of training.

    A collective: every rank calls it; the first writes.

    Args:
        target: the engine, or without DeepSpeed the optimizer.
        directory: where ``PeftModel.from_pretrained`` will read it.
        merge: write the whole model with the adapter merged into ``directory/merged`` as well. The first rank then
            loads the base model from where the adapter's config says it came from, on the CPU. This is the way at ZeRO
            stage 3, where PEFT's ``merge_and_unload()`` finds partitioned weights and has nothing to merge into.

    Raises:
        ValueError: ``merge`` of what does not belong to the weights on disk: an adapter whose start changed the frozen
            weights for good, one on a quantised base or on tied weights, one that is not called ``default``, one on a
            model that is not transformers'. A model of which PEFT saves nothing.
    """
    optimizer, _, engine = attached(target)
    with uncompiled(optimizer.model if engine is None else engine.module) as plain:
        model = cast(PeftModel, plain)
        if merge and (reason := _not_on_disk(model)):
            raise ValueError(f"merge=True merges into the model on disk, and {reason}")
        state = adapter_state_dict(model, engine)
        with together():
            if first_rank():
                model.save_pretrained(str(directory), state_dict=state)
                if merge:
                    _merge(Path(directory), model)


def _not_on_disk(model: PeftModel) -> str | None:
    """Why base model and adapter as they will be loaded are not the trained model, and what to do; None if they are."""
    if lost := lost_starts(model):
        starts = ", ".join(f"{adapter} ({start})" for adapter, start in lost.items())
        return (
            f"no reload gives back the weights that the start of {starts} left. If that start was saved before the "
            "first step, save_pretrained's path_initial_model_for_weight_conversion makes of both an adapter of the "
            "model on disk."
        )
    if is_quantised(model):
        return (
            "the adapter was trained on quantised weights. Export it without merge, then merge it into what it was "
            "trained on: base.dequantize(), PeftModel.from_pretrained(base, directory).merge_and_unload()."
        )
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and any(holders[id(p)] > 1 for p in module.get_base_layer().parameters()):
            return f"the weight of {name} is another layer's too, which would move with it. Use the adapter unmerged."
    if not isinstance(model.get_base_model(), PreTrainedModel):
        return (
            f"{type(model.get_base_model()).__name__} is no model that transformers loads. Merge the adapter yourself."
        )
    if model.active_adapters != ["default"]:
        return f"of the adapters only 'default' would be, while active are {model.active_adapters}."
    return None


def _merge(directory: Path, trained: PeftModel) -> None:
    """Merge the adapter in a folder into the model on disk, loaded as one of the trained model's class."""
    from transformers.integrations import deepspeed as integration

    base, adapter = cast(PreTrainedModel, trained.get_base_model()), trained.peft_config["default"]

    # Under stage 3 transformers and PEFT would shard what they load over all ranks.
    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        of_head = {key: getattr(base.config, key) for key in HEAD if hasattr(base.config, key)}
        on_disk = type(base).from_pretrained(adapter.base_model_name_or_path, revision=adapter.revision, **of_head)
        now, then = (model.config.get_text_config() for model in (base, on_disk))
        tokens = getattr(now, "vocab_size", None)
        if tokens != getattr(then, "vocab_size", None):
            on_disk.resize_token_embeddings(tokens)
        if hasattr(now, "pad_token_id"):
            then.pad_token_id = now.pad_token_id  # may be one of the tokens that were added
        merged = PeftModel.from_pretrained(on_disk, directory).merge_and_unload()
    finally:
        integration._hf_deepspeed_config_weak_ref = config
    merged.save_pretrained(directory / "merged")


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
        rest = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        warnings.warn(
            f"PEFT does not save these trained parameters: {', '.join(left_out[:3])}{rest}. It saves a module that "
            "LoraConfig(modules_to_save=[...]) names.",
            stacklevel=2,
        )
    return names


def _whole(param: Tensor) -> Tensor:
    if not hasattr(param, "ds_id"):
        return param.detach().cpu()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([param]):
        return param.detach().cpu().clone()
