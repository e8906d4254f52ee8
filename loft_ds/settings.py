"""A DeepSpeed JSON: unknown keys, values that DeepSpeed refuses, and settings under which LoFT cannot train."""

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
        SettingsError: With what to do instead.
    """
    zero = config.get("zero_optimization", {})
    stage, offload = zero.get("stage", 0), zero.get("offload_optimizer") or {}
    fp16, autocast = config.get("fp16", {}), config.get("torch_autocast", {})
    in_fp16 = auto_fp16 if fp16.get("enabled") == "auto" else fp16.get("enabled") is True
    refused = [
        (
            "optimizer" in config,
            "its section 'optimizer' would train in place of LoFT; remove it (--optimizer lora or full may have one)",
        ),
        (
            stage > 0 and config.get("zero_allow_untested_optimizer") is not True,
            'LoFT under ZeRO needs "zero_allow_untested_optimizer": true',
        ),
        (
            offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer") is not False,
            'with offload_optimizer LoFT needs "zero_force_ds_cpu_optimizer": false, or DeepSpeedCPUAdam takes its '
            "place",
        ),
        # The rest as loft_ds.sharding.deepspeed and DeepSpeed itself refuse it, once the model is loaded.
        (
            stage == 0 and in_fp16 and fp16.get("loss_scale") != 1,
            "LoFT does not support fp16 at ZeRO stage 0, where DeepSpeed divides the gradients by a loss scale that it "
            'never multiplied the loss with: use stage 1, which does both, or "bf16"',
        ),
        (
            offload.get("device") == "nvme",
            'LoFT does not support offload_optimizer.device "nvme": use "cpu"',
        ),
        (
            stage == 3 and (offload.get("super_offload", False) or offload.get("ratio", 1) != 1),
            "offload_optimizer.super_offload and a ratio below 1 are for DeepSpeedCPUAdam alone: leave them out",
        ),
        (zero.get("zenflow") is not None, "LoFT does not support ZenFlow: leave 'zenflow' out"),
        (zero.get("mics_shard_size", -1) > 0, "LoFT does not support MiCS: leave 'mics_shard_size' out"),
        (
            config.get("tensor_parallel", {}).get("autotp_size", 0) > 1,
            "LoFT does not support tensor parallelism: use data parallelism alone (tensor_parallel.autotp_size 1)",
        ),
        (
            autocast.get("enabled") is True and autocast.get("dtype") in ("fp16", "float16", "half", "torch.float16"),
            'LoFT does not support torch_autocast in float16: use "fp16" or torch_autocast with bfloat16',
        ),
    ]
    for wrong, advice in refused:
        if wrong:
            raise SettingsError(f"{path}: {advice}")
