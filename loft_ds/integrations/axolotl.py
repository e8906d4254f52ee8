"""LoFT in axolotl: a plugin that puts LoFT in its Trainer's optimizer's place.

In the YAML: ``plugins: [loft_ds.integrations.axolotl.LoFTPlugin]``, and a ``learning_rate`` of LoFT's size.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]

from ..hf import LoFT


class LoFTPlugin(BasePlugin):
    """Hands every Trainer that axolotl has made LoFT's factory, before it builds its optimizer."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Called by axolotl; it reads ``optimizer_cls_and_kwargs`` when training begins."""
        trainer.optimizer_cls_and_kwargs = (LoFT, {})
