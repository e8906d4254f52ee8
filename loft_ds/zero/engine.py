"""Find the live DeepSpeed engine that steps LoFT's optimizer."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

from ..factors import Trainable
from .unsupported import CPU_ADAM, OTHER_OPTIMIZER

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch.optim import Optimizer


def _engines(*, frozen: bool = False) -> list[DeepSpeedEngine]:
    """The live engines of this process. DeepSpeed keeps no registry and gives its optimizer no way back to it.

    Args:
        frozen: also those that ``gc.freeze()`` has hidden; all there is is frozen then.
    """
    from deepspeed import DeepSpeedEngine

    if frozen:
        gc.unfreeze()
    # By type(), not isinstance: proxies among the tracked objects answer __class__ with an exception.
    engines = [o for o in gc.get_objects() if issubclass(type(o), DeepSpeedEngine)]
    if frozen:
        gc.freeze()
    return [e for e in engines if getattr(e, "basic_optimizer", None) is not None]  # others only evaluate


def find_engine(optimizer: Optimizer | None, trainable: Trainable) -> DeepSpeedEngine | None:
    """The engine that steps ``optimizer``.

    Args:
        optimizer: LoFT's; None if it is gone.
        trainable: the parameters that it trains.

    Returns:
        None without DeepSpeed, or while DeepSpeed still builds its engine.

    Raises:
        RuntimeError: an engine trains these parameters with an optimizer that is not LoFT. (One with another LoFTAdamW
            is an earlier run's, still referenced: that optimizer no longer gets any gradient.)
    """
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None or not deepspeed.comm.is_initialized():  # then there is none, and looking would take a while
        return None
    engines = _engines()
    if gc.get_freeze_count() and not any(engine.basic_optimizer is optimizer for engine in engines):
        engines = _engines(frozen=True)
    for engine in engines:
        if engine.basic_optimizer is optimizer:
            return engine
    ours = {id(f.param) for f in trainable.factors}
    for engine in engines:
        row = next((row for row in (CPU_ADAM, OTHER_OPTIMIZER) if row.found_in_engine(engine)), None)
        if row is not None and any(id(p) in ours for p in engine.module.parameters()):
            raise RuntimeError(
                "LoFTAdamW was swapped out, and DeepSpeed trains these parameters with "
                f"{type(engine.basic_optimizer).__name__}: {row.remedy}"
            )
    return None
