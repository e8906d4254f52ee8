"""The two passes over the second moments of a batch of pairs alike, and where these lie.

In plain torch (:mod:`.tiled`), in C++ for x86 CPUs (:mod:`.compiled`), and in Triton for CUDA (:mod:`.fused`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import compiled, tiled
from .reference import Precision, Quotient
from .stream import Resident, Stream, at_home, zeros_at_home
from .tiled import normalized_update

__all__ = [
    "Precision",
    "Quotient",
    "Resident",
    "Stream",
    "accumulate_second_moment_",
    "at_home",
    "normalized_update",
    "prepare",
    "projected_update",
    "zeros_at_home",
]


@functools.cache
def _fused() -> ModuleType | None:
    """The Triton kernels, imported when the first CUDA tensor asks for them; None where Triton is missing."""
    try:
        from . import fused
    except ImportError as error:
        logging.getLogger(__name__).warning("LoFT runs its plain torch kernels on this GPU: %s", error)
        return None
    return fused


def _implementation(factor: Tensor, packed: Sequence[Tensor]) -> ModuleType:
    fast = _fused() if factor.is_cuda else compiled if factor.device.type == "cpu" else None
    return fast if fast is not None and fast.supports(factor, packed[0]) else tiled


def prepare(device: torch.device | None = None) -> None:
    """Builds what a CPU will need: in the middle of a step other ranks would wait for it.

    Args:
        device: that steps will be made on; by default the machine's accelerator, if it has one.
    """
    if not torch.accelerator.is_available() if device is None else device.type == "cpu":
        compiled.library()


def projected_update(
    momentum: Tensor,
    packed: Sequence[Tensor],
    basis: Tensor,
    quotient: Quotient,
) -> Tensor:
    """``U @ basis`` (b, k, r) by the fastest kernel for these tensors: :func:`tiled.projected_update`."""
    return _implementation(momentum, packed).projected_update(momentum, packed, basis, quotient)


def accumulate_second_moment_(
    packed: Sequence[Tensor],
    gradient: Tensor,
    beta2: float,
    *,
    pending: Tensor | None = None,
    rotation: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One pass over the second moments, in place, by the fastest kernel: :func:`tiled.accumulate_second_moment_`."""
    _implementation(gradient, packed).accumulate_second_moment_(
        packed, gradient, beta2, pending=pending, rotation=rotation, seed=seed
    )
