"""LoFTAdamW as a Trainer's arguments say it, where the Trainer itself cannot be LoFT's."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from ..hf import settings_of
from ..optimizer import LoFTAdamW


def build_optimizer(model: nn.Module, args: TrainingArguments, **kwargs: Any) -> LoFTAdamW:
    """LoFT with the learning rate, betas, eps, weight decay and clipping norm of a Trainer's arguments.

    Biases and norms are not decayed, as the Trainer has it. Without DeepSpeed the Trainer would first clip by the norm
    of the factors' gradients, so ``args.max_grad_norm`` becomes 0 there, and LoFT clips by its own norm instead.

    Args:
        model: a PEFT model.
        args: the Trainer's; see above for what is written into them.
        kwargs: arguments of :class:`LoFTAdamW` in place of those.
    """
    settings = settings_of(args, model, Trainer.get_decay_parameter_names(None, model))
    if args.deepspeed_plugin is None:  # under DeepSpeed the JSON has it: see docs/settings.md
        settings["max_grad_norm"] = args.max_grad_norm or None
        args.max_grad_norm = 0.0
    return LoFTAdamW(model, **{**settings, **kwargs})
