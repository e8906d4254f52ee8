"""LoFT for large models: low-rank adaptation that behaves like full fine-tuning, under DeepSpeed ZeRO."""

from .optimizer import LoFTAdamW

__all__ = ["LoFTAdamW"]
