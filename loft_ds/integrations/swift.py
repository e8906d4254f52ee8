"""LoFT in ms-swift 4: this file is a plugin, and ``loft`` one more optimizer.

``swift sft --external_plugins "$(python -m loft_ds.integrations.swift)" --optimizer loft --tuner_type lora ...``
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loft_ds import LoFTAdamW

# Arguments that choose an optimizer, and that ms-swift passes over where --optimizer is said.
_DROPPED = ("aligner_lr", "lorap_lr_ratio", "use_galore", "vit_lr")


def register() -> None:
    """Make ``--optimizer loft`` known to ms-swift."""
    from swift.optimizers import OptimizerCallback, optimizers_map  # type: ignore[import-not-found]

    from loft_ds import LoFT  # ms-swift loads this file outside its package

    class LoFTOptimizerCallback(OptimizerCallback):
        """Builds LoFT from the arguments of ms-swift's Trainer."""

        def create_optimizer(self, model: Any = None) -> LoFTAdamW:
            model = self.trainer.model if model is None else model
            settings = (self.args, *getattr(model, "peft_config", {}).values())  # LoRA+'s is the adapter's
            if dropped := [name for name in _DROPPED if any(getattr(each, name, None) for each in settings)]:
                raise ValueError(f"LoFT would drop {', '.join(f'--{name}' for name in dropped)}: leave that out")
            return LoFT()(model)

    optimizers_map["loft"] = LoFTOptimizerCallback


if __name__ == "__main__":
    print(__file__)
else:
    register()
