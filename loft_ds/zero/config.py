"""Read a DeepSpeed JSON: unknown keys, values that DeepSpeed refuses, and settings under which LoFT cannot train."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, dict_raise_error_on_duplicate_keys

from .unsupported import find_json_refusal


class SettingsError(Exception):
    """A mistake of the user's; its message is the one line that they see."""


class _Asked(dict):
    """A dictionary that remembers which keys were looked up: how DeepSpeed itself says what it understands."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> _Asked:  # type: ignore[override]
        """For ``key in config.keys()``."""
        return self


# DeepSpeed asks for this one only where torch.distributed runs.
_ASKED_LATER = {"sequence_parallel_size"}


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The settings in a DeepSpeed JSON file, with every key known to this DeepSpeed.

    Args:
        path: The file.

    Raises:
        SettingsError: If there is no such file, it is no JSON, or DeepSpeed does not know or accept something in it.
    """
    if not Path(path).is_file():
        raise SettingsError(f"{path}: no such file")
    try:
        config = json.loads(
            Path(path).read_text(encoding="utf-8"), object_pairs_hook=dict_raise_error_on_duplicate_keys
        )
    except ValueError as error:  # a JSONDecodeError is one too
        raise SettingsError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise SettingsError(f"{path}: must hold one JSON object")

    # "auto" is Transformers' word, filled in later; the batch sizes must then fit the world, which does not exist yet.
    batch = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    given = {key: value for key, value in config.items() if value != "auto" and key not in batch}
    asked = _Asked({**given, "train_micro_batch_size_per_gpu": 1})
    try:
        DeepSpeedConfig(asked)
    except pydantic.ValidationError as error:
        raise SettingsError(f"{path}: {_explain(error)}") from error
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    known = asked.keys_asked | _ASKED_LATER
    for key in config:
        if key not in known:
            raise SettingsError(f"{path}: unknown key '{key}'{_nearest(key, known)}")
    return config


def _explain(error: pydantic.ValidationError) -> str:
    """One line for the first thing that pydantic found wrong in a section."""
    first = error.errors()[0]
    *parents, key = map(str, first["loc"])
    place = ".".join(parents) or error.title
    if first["type"] != "extra_forbidden":
        return f"'{key}' in {place}: {first['msg']}"
    return f"unknown key '{key}' in {place}{_nearest(key, _fields(error.title, parents))}"


def _fields(title: str, parents: list[str]) -> list[str]:
    """The keys of the section that lies ``parents`` deep in the DeepSpeed model called ``title``."""
    schemas = {model.__name__: model for model in _subclasses(DeepSpeedConfigModel)}
    schema: Any = schemas[title]
    for parent in parents:
        annotation = schema.model_fields[parent].annotation
        kinds = (annotation, *typing.get_args(annotation))
        schema = next(kind for kind in kinds if hasattr(kind, "model_fields"))
    return list(schema.model_fields)


def _subclasses(cls: type) -> Iterable[type]:
    child: type
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _nearest(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, sorted(known), n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def check_loft_settings(path: str, config: dict[str, Any], *, auto_fp16: bool = False) -> None:
    """Refuses settings under which something other than LoFT would train, or that LoFT refuses at the first step.

    Args:
        path: The file, for the message.
        config: Its settings.
        auto_fp16: What ``"auto"`` will stand for in ``fp16.enabled``.

    Raises:
        SettingsError: With what to do instead, from the table in :mod:`loft_ds.zero.unsupported`.
    """
    fp16 = config.get("fp16") or {}
    if fp16.get("enabled") == "auto":
        config = {**config, "fp16": {**fp16, "enabled": auto_fp16}}
    refusal = find_json_refusal(config)
    if refusal is not None:
        raise SettingsError(f"{path}: {refusal}")
