"""What can be told to be wrong before a process group exists or a weight is loaded: one clear line each."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub import get_token
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from ..hf import dropped_arguments
from ..zero.config import SettingsError
from .arguments import ADAPTER_FLAGS, FLAGS_OF, LOFT_FLAGS, LaunchArguments, Optimizer, world_size

# Those of PEFT's starts that need no data and no configuration of their own.
STARTS = re.compile(r"true|gaussian|orthogonal|olora|pissa(_niter_[1-9][0-9]*)?|gradients")


class LaunchError(SettingsError):
    """A mistake in the command line, or in a file that it names."""


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that would be dropped without a word, and those that need what is not there.

    Raises:
        LaunchError: Such a flag is given.
    """
    flags = LOFT_FLAGS + ADAPTER_FLAGS + tuple(FLAGS_OF) + sum(FLAGS_OF.values(), ())
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
    for owner, owned in FLAGS_OF.items():
        for flag in owned:
            if flag in given and owner not in given:
                raise LaunchError(f"--{flag} is of --{owner}, which is not given")
    quantised = given & {"load_in_4bit", "load_in_8bit"}
    if len(quantised) == 2:
        raise LaunchError("--load_in_4bit and --load_in_8bit: choose one")
    if quantised and importlib.util.find_spec("bitsandbytes") is None:
        raise LaunchError(f"--{quantised.pop()} needs bitsandbytes: pip install 'loft_ds[quantised]'")
    if not STARTS.fullmatch(args.init_lora_weights):
        raise LaunchError(
            f"--init_lora_weights {args.init_lora_weights}: it is to be true, gaussian, orthogonal, olora, pissa, "
            "pissa_niter_N or gradients; other starts need data or a configuration, and a script of your own"
        )
    if quantised and args.init_lora_weights == "gradients":
        raise LaunchError("--init_lora_weights gradients: quantised weights have no gradient")
    if args.packing and importlib.util.find_spec("trl") is None:
        raise LaunchError("--packing needs TRL: pip install 'loft_ds[trl]'")
    for name in {args.report_to or "none"} - {"all", "none", "flyte", *get_available_reporting_integrations()}:
        raise LaunchError(f"--report_to {name}: it is not installed, or Transformers does not know it")
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise LaunchError("--push_to_hub needs a token: `hf auth login`, or HF_TOKEN")
    if args.streaming and args.max_steps <= 0:
        raise LaunchError("--streaming does not know how long the text is: say --max_steps in place of epochs")
    if args.head_learning_rate is not None and not args.modules_to_save:
        raise LaunchError("--head_learning_rate: nothing trains outside the adapters; name it by --modules_to_save")


def find_mismatches(settings: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Where a DeepSpeed JSON and the flags contradict each other: the Trainer says so once the weights are loaded."""
    config = HfTrainerDeepSpeedConfig(settings)
    config.trainer_config_process(argparse.Namespace(**vars(args), world_size=world_size()))
    said = [line.removeprefix("- ds ").replace(" vs hf ", ", but the flags say ") for line in config.mismatches]
    wrong = [f'{contradiction}; let them agree, or write "auto" in the file' for contradiction in said]
    if config.is_zero3() and args.init_lora_weights == "gradients":
        wrong.append(
            "--init_lora_weights gradients: at stage 3 no rank has a whole weight; choose another stage or start"
        )
    return wrong


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
