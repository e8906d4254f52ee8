"""What can be told to be wrong before a process group exists or a weight is loaded: one clear line each."""

from __future__ import annotations

import copy

from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PretrainedConfig

from loft_ds.zero.config import SettingsError


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
            base = AutoModelForCausalLM.from_config(config)
            names = [f".{name}" for name, _ in base.named_parameters()]
            for wanted in lora.target_parameters or []:  # of these PEFT takes what there is
                if not any(name.endswith(f".{wanted}") for name in names):
                    raise LaunchError(f"--target_parameters {wanted}: the model has no such parameter")
            # PEFT fills in the config that it is given.
            model = get_peft_model(base, copy.deepcopy(lora))
    except ValueError as error:  # PEFT's word for "no such layer" or "no such rank"
        raise LaunchError(str(error).splitlines()[0]) from error
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and lora.r > min(layer.in_features, layer.out_features):
            raise LaunchError(
                f"--lora_rank {lora.r} is larger than the layer {name.removeprefix('base_model.model.')} "
                f"({layer.in_features} inputs, {layer.out_features} outputs)"
            )
