"""What every result file says of how it came about: command, date, commit, device and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "triton")


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Command, date (UTC), commit, device and versions of the running script.

    Folders of this machine are left out of the command: an absolute path is named by its last part.

    Args:
        device: where the work is done; by default the accelerator if there is one.
    """
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return {
        "command": shlex.join(["python", name, *arguments]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit_of(ROOT),
        "device": device_name(device),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
    }


def device_name(device: torch.device | None = None) -> str:
    """The device in words: the GPU's name, or the CPU's model, its cores and torch's threads."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = f"{len(models)} cores of {models[0]}" if models else platform.processor()
    return f"{model}, {(n := torch.get_num_threads())} thread{'s' * (n > 1)}"


def commit_of(folder: Path) -> str | None:
    """The commit that a checkout stands at, with ``+`` where its tracked files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    # Results are what the script is writing.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return f"{commit}{'+' if changed else ''}" if commit else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
