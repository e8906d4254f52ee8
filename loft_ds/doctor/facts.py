"""What a rank knows of itself: its software, its device, what is free, and what the job would need of it."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from ..kernels import compiled
from ..zero.config import SettingsError
from .findings import GB, first_line
from .job import needs, read_settings

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "loft_ds")


def known(options: argparse.Namespace) -> dict[str, Any]:
    """What this rank knows of itself, or under ``ill`` why it could not find out."""
    node = socket.gethostname()
    try:
        return {"node": node, "ill": None, **facts(options)}
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        return {"node": node, "ill": first_line(error)}


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What this rank knows of itself; ``same`` is what must be alike on all."""
    accelerator = get_accelerator()
    on_gpu = accelerator.device_name() != "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and local >= accelerator.device_count():
        raise RuntimeError(f"local rank {local}, but there are {accelerator.device_count()} devices")
    accelerator.set_device(local)
    backend = accelerator.communication_backend_name()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else ""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else accelerator.device_name()
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else accelerator.available_memory()
    world = int(os.environ["WORLD_SIZE"])
    settings, wrong, planned, unplanned = {}, None, None, None
    try:
        settings = read_settings(options, world)
    except SettingsError as error:
        wrong = str(error)
    try:
        planned = needs(options, settings, world) if options.model and not wrong else None
    except (OSError, ValueError) as error:
        unplanned = f"{options.model}: {first_line(error)}"
    content = Path(options.deepspeed).read_bytes() if options.deepspeed and Path(options.deepspeed).is_file() else b""
    return {
        "same": {
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
            "backend": f"{backend} {nccl}".strip(),
            "device": f"{name}, {accelerator.total_memory() / GB:.0f} GB" if on_gpu else name,
            **({} if on_gpu else {"kernels": compiled.capability() if compiled.library() else "plain torch"}),
        },
        "settings": settings,
        "wrong": wrong,
        "digest": hashlib.sha256(content).hexdigest()[:12],
        "disk": shutil.disk_usage(_existing(Path(options.output_dir))).free,
        "gpu": free if on_gpu else None,
        "host": psutil.virtual_memory().available,
        "planned": planned,
        "unplanned": unplanned,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
