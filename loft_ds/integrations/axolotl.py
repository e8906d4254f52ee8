"""LoFT in axolotl: a plugin that puts LoFT in its Trainer's optimizer's place.

In the YAML: ``plugins: [loft_ds.integrations.axolotl.LoFTPlugin]``, and a ``learning_rate`` of LoFT's size.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]

from ..hf import LoFT, OnlyLoFT

# What else of the YAML is for an optimizer that LoFT takes the place of. ReLoRA empties state by names of AdamW's.
_DROPPED = (
    "embedding_lr",
    "embedding_lr_scale",
    "loraplus_lr_ratio",
    "lr_groups",
    "optim_args",
    "optim_target_modules",
    "relora",
)


class LoFTPlugin(BasePlugin):
    """Hands every Trainer that axolotl has made LoFT's factory, before it builds its optimizer."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Called by axolotl; it reads ``optimizer_cls_and_kwargs`` when training begins.

        Raises:
            ValueError: the YAML has settings of another optimizer, besides ``optimizer``.
        """
        if dropped := [name for name in _DROPPED if cfg.get(name)]:
            raise ValueError(f"LoFT would drop {', '.join(dropped)}: leave that out of the YAML")
        trainer.optimizer_cls_and_kwargs = (LoFT, {})
        trainer.add_callback(OnlyLoFT('leave "optimizer" out of the DeepSpeed JSON'))
