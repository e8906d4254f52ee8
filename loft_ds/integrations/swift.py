"""LoFT in ms-swift 4: this file is a plugin, and ``loft`` one more optimizer.

``swift sft --external_plugins "$(python -m loft_ds.integrations.swift)" --optimizer loft --tuner_type lora ...``
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loft_ds import LoFTAdamW


def register() -> None:
    """Make ``--optimizer loft`` known to ms-swift."""
    from swift.optimizers import OptimizerCallback, optimizers_map  # type: ignore[import-not-found]

    from loft_ds import LoFT  # ms-swift loads this file outside its package

    class LoFTOptimizerCallback(OptimizerCallback):
        """Builds LoFT from the arguments of ms-swift's Trainer."""

        def create_optimizer(self, model: Any = None) -> LoFTAdamW:
            return LoFT()(self.trainer.model if model is None else model)

    optimizers_map["loft"] = LoFTOptimizerCallback


if __name__ == "__main__":
    print(__file__)
else:
    register()
