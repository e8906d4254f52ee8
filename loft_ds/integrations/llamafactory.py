"""LoFT in LLaMA-Factory 0.9, which loads nothing of a user's: this module starts it, with LoFT among its plug-ins.

``python -m loft_ds.integrations.llamafactory CONFIG.yaml`` in place of ``llamafactory-cli train CONFIG.yaml``. With
``USE_V1=1`` it is the new trainer, and the YAML says ``optim_config: {name: loft}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ..hf import LoFT, OnlyLoFT, find_caller
from ..optimizer import LoFTAdamW


class LoFTCallback(OnlyLoFT):
    """Puts LoFT in its Trainer's optimizer's place: for a program that lets one pass a callback, and no optimizer.

    Raises:
        RuntimeError: when training begins: the program has chosen another optimizer all the same.
    """

    def __init__(self) -> None:
        super().__init__(
            "leave use_galore, use_apollo, use_badam, use_adam_mini, use_muon and loraplus_lr_ratio out of the YAML"
        )

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = find_caller(Trainer)
        assert trainer is not None, "a Trainer calls its callbacks"
        trainer.optimizer_cls_and_kwargs = (LoFT, {})


def register() -> None:
    """Make ``optim_config: {name: loft}`` known to the new trainer."""
    from llamafactory.v1.core.base_trainer import BaseTrainer  # type: ignore[import-not-found]
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin  # type: ignore[import-not-found]

    @OptimizerPlugin("loft").register()
    def create_optimizer(model: nn.Module, config: Mapping[str, Any]) -> LoFTAdamW:
        trainer = find_caller(BaseTrainer)
        assert trainer is not None, "a trainer asks for its optimizer"
        args = trainer.args
        settings = {"lr": args.learning_rate}
        if args.dist_config is None or args.dist_config.name != "deepspeed":  # there its JSON has the norm
            # The trainer always clips, by the norm of the factors' gradients. LoFT clips in its step.
            settings["max_grad_norm"], args.max_grad_norm = args.max_grad_norm, math.inf
        own = {name: value for name, value in config.items() if name != "name"}
        return LoFTAdamW(model.module if isinstance(model, DistributedDataParallel) else model, **{**settings, **own})


def main() -> None:
    """Train as the command line says."""
    from llamafactory.v1.utils.env import is_env_enabled  # type: ignore[import-not-found]

    if is_env_enabled("USE_V1"):
        from llamafactory.v1.launcher import main as run  # type: ignore[import-not-found]

        register()
        run()
    else:
        from llamafactory.train.tuner import run_exp  # type: ignore[import-not-found]

        run_exp(callbacks=[LoFTCallback()])


if __name__ == "__main__":
    main()
