"""LoFT in axolotl: a plugin that puts LoFT in its Trainer's optimizer's place.

In the YAML: ``plugins: [loft_ds.integrations.axolotl.LoFTPlugin]``, and a ``learning_rate`` of LoFT's size.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
from torch import nn
from transformers import TrainingArguments

from ..optimizer import LoFTAdamW
from .arguments import build_optimizer


class LoFTFactory:
    """What axolotl's Trainer calls as ``LoFTFactory()(model, training_args, **kwargs)``."""

    def __call__(self, model: nn.Module, training_args: TrainingArguments, **kwargs: Any) -> LoFTAdamW:
        """LoFT with the Trainer's arguments; ``kwargs`` are of :class:`LoFTAdamW`."""
        return build_optimizer(model, training_args, **kwargs)


class LoFTPlugin(BasePlugin):
    """Hands every Trainer that axolotl has made LoFT's factory, before it builds its optimizer."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Called by axolotl; it reads ``optimizer_cls_and_kwargs`` when training begins."""
        trainer.optimizer_cls_and_kwargs = (LoFTFactory, {})
