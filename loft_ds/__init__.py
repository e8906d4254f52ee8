"""LoFT for large models: low-rank adaptation that behaves like full fine-tuning, under DeepSpeed ZeRO."""

from .hf import LoFT, LoFTMixin, LoFTTrainer
from .optimizer import LoFTAdamW

__all__ = ["LoFT", "LoFTAdamW", "LoFTMixin", "LoFTTrainer"]
