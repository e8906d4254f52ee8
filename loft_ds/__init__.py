"""LoFT for large models: low-rank adaptation that behaves like full fine-tuning, under DeepSpeed ZeRO."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blocks import Blocks
    from .checkpoint import load_checkpoint, save_checkpoint
    from .errors import CheckpointError
    from .export import export_adapter
    from .hf import LoFT, LoFTMixin, LoFTTrainer, SaveOnSIGTERM
    from .optimizer import LoFTAdamW
    from .start import start_from_gradients
    from .zero.offload import offload_states, reload_states

__all__ = [
    "Blocks",
    "CheckpointError",
    "LoFT",
    "LoFTAdamW",
    "LoFTMixin",
    "LoFTTrainer",
    "SaveOnSIGTERM",
    "export_adapter",
    "load_checkpoint",
    "offload_states",
    "reload_states",
    "save_checkpoint",
    "start_from_gradients",
]

# Imported when first asked for: `python -m loft_ds.plan` needs neither the Trainer nor DeepSpeed.
_MODULES = {
    "Blocks": "blocks",
    "CheckpointError": "errors",
    "LoFTAdamW": "optimizer",
    "export_adapter": "export",
    "load_checkpoint": "checkpoint",
    "offload_states": "zero.offload",
    "reload_states": "zero.offload",
    "save_checkpoint": "checkpoint",
    "start_from_gradients": "start",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES.get(name, 'hf')}", __name__), name)
