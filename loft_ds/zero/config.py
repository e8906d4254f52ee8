"""Read a DeepSpeed JSON: unknown keys, values that DeepSpeed refuses, and settings under which LoFT cannot train."""

from __future__ import annotations

import difflib
import json
import re
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pydantic
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, dict_raise_error_on_duplicate_keys
from deepspeed.utils import logger


class SettingsError(Exception):
    """Mistakes of the user's; its message is what they see, one line each."""


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

# They must fit the world, which may not exist yet.
_BATCH = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}

# From this likeness on (difflib's ratio) an unknown key is taken for one of DeepSpeed's, mistyped.
_MISTYPED = 0.8


def read_deepspeed_json(path: str, *checks: Callable[[dict[str, Any]], Iterable[str]]) -> dict[str, Any]:
    """The settings in a DeepSpeed JSON file. All that is wrong with them is said at once.

    DeepSpeed ignores keys that it does not know at the top level. They are a warning, unless one looks like a key that
    it knows: then what is meant would be ignored.

    Args:
        path: The file.
        checks: What else may be wrong, as :func:`.unsupported.find_json_refusals` finds it. They see the settings
            without those that DeepSpeed refuses.

    Raises:
        SettingsError: If there is no such file, it is no JSON, DeepSpeed does not know or accept something in it, or a
            check finds something.
    """
    config = _load(path)
    # "auto" is Transformers' word, filled in later.
    given = {key: value for key, value in config.items() if value != "auto" and key not in _BATCH}
    sound, mistakes = _sift(given)
    asked = _Asked(sound)
    _refusal(asked)  # there is none, and DeepSpeed has looked for all that it knows
    known = sorted(asked.keys_asked | _ASKED_LATER)
    ignored = []
    for key in config:
        if key not in known:
            meant = _nearest(key, known, _MISTYPED)
            if meant:
                mistakes.append(f"unknown key '{key}'{meant}")
            else:
                ignored.append(f"'{key}'")
    later = {key: value for key, value in config.items() if key not in given}
    usable = later | {key: sound[key] for key in given if key in sound}
    for check in checks:
        mistakes += check(usable)
    if mistakes:
        raise SettingsError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    if ignored:
        warnings.warn(f"{path}: DeepSpeed ignores {', '.join(ignored)}", stacklevel=2)
    return config


def _load(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise SettingsError(f"{path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        if re.search(r'^\W*(compute_environment|distributed_type)"?\s*:', text, re.MULTILINE):  # in YAML or in JSON
            raise SettingsError(
                f"{path}: is a configuration of Accelerate's, not a DeepSpeed JSON: give it to `accelerate launch "
                "--config_file` and leave --deepspeed out, or give the JSON that its deepspeed_config_file names"
            )
        config = json.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except ValueError as error:  # a JSONDecodeError is one too
        raise SettingsError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise SettingsError(f"{path}: must hold one JSON object")
    return config


def _sift(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What DeepSpeed accepts of some settings, and what is wrong with the others.

    DeepSpeed stops at the first section that it refuses, so it gets one section after the other.
    """
    sound: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}  # else it refuses all
    mistakes = []
    # Some settings are good at some stages only: those of ZeRO go first.
    for key in sorted(given, key=lambda key: key != "zero_optimization"):
        settings = {**sound, key: given[key]}
        while (error := _refusal(settings)) is not None:
            before = settings
            if isinstance(error, pydantic.ValidationError):
                for found in error.errors():
                    inside = [str(part) for part in found["loc"]]
                    # One model holds several sections, those of the monitors, and names them itself.
                    place = inside if inside[:1] == [key] else [key, *inside]
                    mistakes.append(_explain(error.title, place, inside, found))
                    settings = _without(settings, place)
            elif isinstance(error, (AttributeError, TypeError)) and not isinstance(given[key], dict):
                mistakes.append(f"'{key}' must hold settings, not {given[key]!r}")
            else:
                message = " ".join(str(error).split())
                mistakes.append(message if key in message else f"'{key}': {message}")
            if settings == before:
                settings = sound
        sound = settings
    return sound, mistakes


def _refusal(settings: dict[str, Any]) -> Exception | None:
    """What DeepSpeed raises for some settings. It says what it warns of when it builds its engine."""
    if isinstance(settings.get("zero_optimization"), bool):  # an old form, at which Transformers stumbles
        return TypeError()
    disabled, logger.disabled = logger.disabled, True
    try:
        DeepSpeedConfig(settings)
    except (DeepSpeedConfigError, AssertionError, AttributeError, TypeError, ValueError) as error:
        return error
    finally:
        logger.disabled = disabled
    return None


def _without(settings: Any, place: list[str]) -> Any:
    """A copy of nested settings without what lies at a place."""
    key, *rest = place
    if not isinstance(settings, dict) or key not in settings:
        return settings
    kept = {other: value for other, value in settings.items() if other != key}
    return {**kept, key: _without(settings[key], rest)} if rest else kept


def _explain(title: str, place: list[str], inside: list[str], found: Any) -> str:
    """One line for one thing that pydantic found wrong: at a place in the file, in the DeepSpeed model ``title``."""
    *parents, key = place
    if found["type"] == "extra_forbidden":
        return f"unknown key '{key}' in {'.'.join(parents)}{_nearest(key, _fields(title, inside[:-1]))}"
    return f"'{'.'.join(place)}': {found['msg']}"


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


def _nearest(key: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=cutoff)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
