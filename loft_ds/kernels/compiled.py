"""The two passes over the second moment on x86 CPUs, in C++: ``compiled.cpp``, built on first use.

Built as torch builds extensions, for each set of instructions by itself, and kept in torch's folder of extensions.
A row's result depends on that row and the partner alone, to the last bit: rows may be split over ranks in any way.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import Quotient
from .storage import seed_word

_LOADING = threading.Lock()  # torch ends a process that loads the same operators twice
SOURCE = Path(__file__).with_suffix(".cpp")
# As torch names what the CPU has, from the least to the most; ATEN_CPU_CAPABILITY in the environment lowers it.
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
INSTRUCTIONS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": _AVX512, "AVX512_BF16": (*_AVX512, "-mavx512bf16")}
# The products of a block of columns are r (r + 1) / 2 of 256 bytes: here 2 MiB a thread.
LARGEST_RANK = 128


def load_library(capability: str) -> Any:
    """The operators for one of :data:`INSTRUCTIONS`, built if they have not been.

    Each process that finds none builds its own and puts it in place at once: no lock is left by one that is killed.

    Raises:
        RuntimeError: they cannot be built.
        OSError: nor loaded.
        ImportError: torch's builder wants a package that is not there.
    """
    from torch.utils import cpp_extension  # it imports setuptools, which not every environment has

    library = f"loft_ds_{capability.lower()}"
    flags = ["-O3", "-fopenmp", f"-DLIBRARY={library}", *INSTRUCTIONS[capability]]
    version = hashlib.sha256(" ".join([torch.__version__, *flags, SOURCE.read_text()]).encode()).hexdigest()[:16]
    name = f"{library}_{version}"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    built = root / f"{name}.so"
    if built.exists():
        torch.ops.load_library(built)
    else:
        if shutil.which(compiler := os.environ.get("CXX", "c++")) is None:
            raise RuntimeError(f"there is no {compiler} on PATH")
        logging.getLogger(__name__).warning("LoFT builds its kernels for this CPU, once: some seconds, %s", built)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            cpp_extension.load(
                name,
                [str(SOURCE)],
                extra_cflags=flags,
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
            )
            (Path(folder) / built.name).replace(built)
    return getattr(torch.ops, library)


def capability() -> str:
    """What this CPU has: one of :data:`INSTRUCTIONS`, or another of torch's names."""
    has = torch.backends.cpu.get_cpu_capability()
    return f"{has}_BF16" if has == "AVX512" and torch.cpu._is_avx512_bf16_supported() else has


def library() -> Any | None:
    """The operators for this CPU; None where there are none for it or, with a line in the log, they cannot be built."""
    with _LOADING:
        return _library()


@functools.cache
def _library() -> Any | None:
    has = capability()
    if has not in INSTRUCTIONS:
        return None
    try:
        return load_library(has)
    except (ImportError, OSError, RuntimeError) as error:
        message = "LoFT runs its plain torch kernels on this CPU, which are slower: %s"
        logging.getLogger(__name__).warning(message, str(error).strip().splitlines()[0][:200])
        return None


def supports(factor: Tensor, packed: Tensor) -> bool:
    """Whether there are operators for tensors of these shapes and dtypes."""
    stored = packed.dtype in (torch.float32, torch.bfloat16)
    return factor.dtype == torch.float32 and stored and factor.shape[-1] <= LARGEST_RANK and library() is not None


def projected_update(
    momentum: Tensor,
    packed: Sequence[Tensor],
    basis: Tensor,
    quotient: Quotient,
) -> Tensor:
    """``U @ basis`` (b, k, r) without ``U``. See :func:`tiled.projected_update`."""
    keys, values = (each.mT.contiguous() for each in quotient.keys_and_values(basis))
    laid = [each.contiguous() for each in packed]
    halves = quotient.precision == "bf16"
    return _operators().projected_update(
        momentum.contiguous(), laid, keys, values, quotient.eps, quotient.bound, halves
    )


def accumulate_second_moment_(
    packed: Sequence[Tensor],
    gradient: Tensor,
    beta2: float,
    *,
    pending: Tensor | None = None,
    rotation: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One pass over the second moments, in place. See :func:`tiled.accumulate_second_moment_`."""
    laid = [each.contiguous() for each in packed]
    _operators().accumulate_second_moment_(
        laid,
        gradient.contiguous(),
        None if pending is None else pending.contiguous(),
        None if rotation is None else rotation.contiguous(),
        beta2 if pending is None else beta2**2,
        1 - beta2,
        beta2 * (1 - beta2),
        seed_word(seed),
    )
    for target, source in zip(packed, laid, strict=True):
        if target is not source:
            target.copy_(source)


def _operators() -> Any:
    operators = library()
    assert operators is not None, "supports() is asked first"
    return operators
