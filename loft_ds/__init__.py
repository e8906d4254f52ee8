"""LoFT for large models: low-rank adaptation that behaves like full fine-tuning, under DeepSpeed ZeRO."""

from .checkpoint import load_checkpoint, save_checkpoint
from .durable import CheckpointError
from .export import export_adapter
from .hf import LoFT, LoFTMixin, LoFTTrainer, SaveOnSIGTERM
from .optimizer import LoFTAdamW

__all__ = [
    "CheckpointError",
    "LoFT",
    "LoFTAdamW",
    "LoFTMixin",
    "LoFTTrainer",
    "SaveOnSIGTERM",
    "export_adapter",
    "load_checkpoint",
    "save_checkpoint",
]
