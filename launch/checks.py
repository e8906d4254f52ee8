"""What can be told to be wrong before a process group exists or a weight is loaded: one clear line each."""

from __future__ import annotations

import copy

from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PretrainedConfig

from loft_ds.settings import SettingsError


class LaunchError(SettingsError):
    """A mistake in the command line, or in a file that it names."""


def check_adapters(config: PretrainedConfig, lora: LoraConfig) -> None:
    """Builds the model and its adapters without any weights and looks at what came out.

    Args:
        config: The model's.
        lora: The adapters'.

    Raises:
        LaunchError: If no layer gets an adapter, or a layer is smaller than the adapters' rank.
    """
    try:
        with init_empty_weights():
            # PEFT fills in the config that it is given.
            model = get_peft_model(AutoModelForCausalLM.from_config(config), copy.deepcopy(lora))
    except ValueError as error:  # PEFT's word for "no such layer" or "no such rank"
        raise LaunchError(str(error).splitlines()[0]) from error
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and lora.r > min(layer.in_features, layer.out_features):
            raise LaunchError(
                f"--lora_rank {lora.r} is larger than the layer {name.removeprefix('base_model.model.')} "
                f"({layer.in_features} inputs, {layer.out_features} outputs)"
            )
