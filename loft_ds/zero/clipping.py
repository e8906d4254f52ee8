"""Take DeepSpeed's gradient clipping over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass
class Clipping:
    """Moves ``gradient_clipping`` from DeepSpeed, which clips by the norm of the raw factor gradients, to LoFT.

    Attributes:
        engine: the engine that steps LoFT's optimizer.
    """

    engine: DeepSpeedEngine

    @property
    def said(self) -> bool:
        """Whether the JSON says a norm, or DeepSpeed fills in its own (1.0 since 0.19.3)."""
        return "gradient_clipping" in self.engine._config._param_dict

    def take(self) -> float:
        """The clipping norm that DeepSpeed was configured with, 0.0 if none or if it has been taken before."""
        config, wrapper = self.engine._config, self.engine.optimizer
        # Loading a checkpoint writes the saved value back into the wrapper (zero/stage_1_and_2.py, load_state_dict).
        norm = max(float(config.gradient_clipping or 0.0), float(getattr(wrapper, "clip_grad", 0.0) or 0.0))
        config.gradient_clipping = 0.0
        if hasattr(wrapper, "clip_grad"):
            wrapper.clip_grad = 0.0
        return norm

    @property
    def pending(self) -> bool:
        """Whether DeepSpeed would clip its next step."""
        return bool(self.engine._config.gradient_clipping or getattr(self.engine.optimizer, "clip_grad", 0.0))

    def report(self, norm: Tensor) -> None:
        """Let ``engine.get_global_grad_norm()``, and with it the Trainer's log, show LoFT's norm."""
        self.engine.optimizer._global_grad_norm = norm
