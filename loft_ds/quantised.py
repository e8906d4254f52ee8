"""Quantised base models: what the libraries that make them do to training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Where PEFT has its LoRA layers for quantised base layers.
PEFT_LAYERS = {f"peft.tuners.lora.{kind}" for kind in ("aqlm", "awq", "bnb", "eetq", "gptq", "hqq", "inc", "torchao")}


def is_quantised(model: PeftModel) -> bool:
    """Whether adapters of a model lie on quantised weights."""
    return getattr(model.get_base_model(), "is_quantized", False) or any(
        type(module).__module__ in PEFT_LAYERS for module in model.modules()
    )


def wrapped_weights(model: nn.Module) -> str:
    """The library whose tensors stand in a model for its frozen weights, as torchao's and quanto's do; "" if none does.

    Those of bitsandbytes and hqq are plain tensors of packed numbers.
    """
    strange = (type(p) for p in model.parameters() if not p.requires_grad and is_traceable_wrapper_subclass(p))
    return next((f"a base model of {kind.__module__.split('.')[0]}'s {kind.__name__}" for kind in strange), "")


def four_bit_layers(model: nn.Module) -> list[Any]:
    """The layers of bitsandbytes that may pack their weights for inference: see :func:`check_unpacked`."""
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from packing a model's weights for inference: see :func:`check_unpacked`.

    :class:`loft_ds.LoFTAdamW` does it for its model. An evaluation before that needs it called first.

    Args:
        model: any model; layers of others stay as they are.
    """
    for layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def check_unpacked(layers: Sequence[Any]) -> None:
    """Refuse weights that bitsandbytes has packed for inference: no gradient passes through them any more.

    On a CPU with bfloat16 arithmetic it does so at the first evaluation, for good (bitsandbytes/nn/modules.py,
    ``Linear4bit.forward``). Adapters behind such a layer still get a gradient then, a wrong one.

    Raises:
        RuntimeError: there is such a layer.
    """
    if any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers):
        raise RuntimeError(
            "bitsandbytes has packed the frozen weights for inference, in an evaluation on this CPU, and no gradient "
            "passes through them any more. Load the model anew, and before the first evaluation build the optimizer or "
            "call loft_ds.quantised.keep_gradients(model)."
        )
