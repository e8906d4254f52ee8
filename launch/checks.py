"""What can be told to be wrong before a process group exists or a weight is loaded: one clear line each."""

from __future__ import annotations

import argparse
import copy
import importlib.util
from typing import Any

from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from arguments import ADAPTER_FLAGS, FOUR_BIT_FLAGS, LOFT_FLAGS, LaunchArguments, Optimizer, world_size
from loft_ds.hf import dropped_arguments
from loft_ds.zero.config import SettingsError


class LaunchError(SettingsError):
    """A mistake in the command line, or in a file that it names."""


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that would be dropped without a word, and those that need what is not there.

    Raises:
        LaunchError: Such a flag is given.
    """
    flags = LOFT_FLAGS + ADAPTER_FLAGS + FOUR_BIT_FLAGS
    given = {flag for flag in flags if getattr(args, flag) != getattr(LaunchArguments, flag)}
    for flag in LOFT_FLAGS:
        if flag in given and args.optimizer is not Optimizer.LOFT:
            raise LaunchError(f"--{flag} is LoFT's: --optimizer {args.optimizer.value} would drop it")
    for flag in ADAPTER_FLAGS:
        if flag in given and args.optimizer is Optimizer.FULL:
            raise LaunchError(f"--{flag} is the adapters': --optimizer full has none")
    if args.optimizer is Optimizer.LOFT:
        for flag in dropped_arguments(args):
            raise LaunchError(f"--{flag} is another optimizer's: --optimizer loft would drop it")
    for flag in FOUR_BIT_FLAGS:
        if flag in given and not args.load_in_4bit:
            raise LaunchError(f"--{flag} is of --load_in_4bit, which is not given")
    quantised = given & {"load_in_4bit", "load_in_8bit"}
    if len(quantised) == 2:
        raise LaunchError("--load_in_4bit and --load_in_8bit: choose one")
    if quantised and importlib.util.find_spec("bitsandbytes") is None:
        raise LaunchError(f"--{quantised.pop()} needs bitsandbytes: pip install 'loft_ds[quantised]'")
    if args.head_learning_rate is not None and not args.modules_to_save:
        raise LaunchError("--head_learning_rate: nothing trains outside the adapters; name it by --modules_to_save")


def find_mismatches(settings: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Where a DeepSpeed JSON and the flags contradict each other: the Trainer says so once the weights are loaded."""
    config = HfTrainerDeepSpeedConfig(settings)
    config.trainer_config_process(argparse.Namespace(**vars(args), world_size=world_size()))
    said = [line.removeprefix("- ds ").replace(" vs hf ", ", but the flags say ") for line in config.mismatches]
    return [f'{contradiction}; let them agree, or write "auto" in the file' for contradiction in said]


def check_adapters(config: PretrainedConfig, lora: LoraConfig) -> None:
    """Builds the model and its adapters without any weights and looks at what came out.

    Args:
        config: The model's.
        lora: The adapters'.

    Raises:
        LaunchError: If no layer gets an adapter, a layer is smaller than the adapters' rank, or a name is unknown.
    """
    try:
        with init_empty_weights():
            base = AutoModelForCausalLM.from_config(config)
            names = [f".{name}" for name, _ in base.named_parameters()]
            for wanted in lora.target_parameters or []:  # of these PEFT takes what there is
                if not any(name.endswith(f".{wanted}") for name in names):
                    raise LaunchError(f"--target_parameters {wanted}: the model has no such parameter")
            modules = [f".{name}" for name, _ in base.named_modules()]
            for wanted in lora.modules_to_save or []:  # the same
                if not any(name.endswith(f".{wanted}") for name in modules):
                    raise LaunchError(f"--modules_to_save {wanted}: the model has no such module")
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
