"""What a checkpoint's ``manifest.json`` says, and whether that fits a model and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..factors import shape_of
from ..optimizer import LoFTAdamW
from ..sharding import Layout
from .engine import engine_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# 1: loft_ds 0.1, which kept the rows before the last move ("previous") and took another step with them.
FORMAT = 2
MANIFEST = "manifest.json"
BUFFERS = "buffers.safetensors"

# The tensors of a parameter's state. Those of a pair are (r, r), the same on all ranks that own rows of the factor.
PAIR_STATE = ("basis", "weights", "rotation")
# These have a row for each feature row of the factor, in their last dimension but one.
ROW_STATE = ("momentum", "second_moment", "pending", "before")
# Of a parameter that belongs to no pair, flat.
FLAT_STATE = ("exp_avg", "exp_avg_sq")


def first_owner(bounds: Sequence[int]) -> int:
    """The first rank that holds anything, where rank q holds ``bounds[q]:bounds[q + 1]``; 0 where there is nothing."""
    return next((rank for rank, stop in enumerate(bounds[1:]) if stop > 0), 0)


def manifest_of(
    optimizer: LoFTAdamW,
    layout: Layout,
    engine: DeepSpeedEngine | None,
    states: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """What the first rank writes down.

    Args:
        optimizer: whose state is saved.
        layout: the optimizer's.
        engine: the one that steps the optimizer, if there is one.
        states: of each parameter its ``step``, and under ``state`` which tensors there are of its state.
        files: the digest of every file.
    """
    factors = optimizer.trainable.factor_by_name
    parameters = {}
    for name, param in optimizer.trainable.parameters.items():
        parameters[name] = {
            **_description(name, optimizer),
            **states[name],
            "held": layout.held(param)[1].tolist(),
            "rows": layout.row_bounds(factors[name]).tolist() if name in factors else None,
        }
    groups = [
        {
            "parameters": names,
            "settings": {k: v for k, v in group.items() if k != "params" and isinstance(v, int | float | tuple | list)},
        }
        for group, names in zip(optimizer.param_groups, _group_names(optimizer), strict=True)
    ]
    return {
        "format": FORMAT,
        "world": layout.world,
        "variant": optimizer.variant,
        "parameters": parameters,
        "groups": groups,
        "engine": None if engine is None else engine_state(engine),
        "files": dict(files),
    }


def compare(manifest: dict[str, Any], optimizer: LoFTAdamW, file: Path) -> None:
    """Refuse a checkpoint of something else.

    Args:
        manifest: what the checkpoint says.
        optimizer: which would go on from it.
        file: where it says so.

    Raises:
        CheckpointError: naming the file and the first difference.
    """
    if manifest["format"] == 1:
        raise CheckpointError(
            f"{file}: was written by loft_ds 0.1, whose step was another one, so that this version cannot go on from "
            "its state. Finish the run with loft_ds 0.1, or export_adapter there and start the optimizer anew from the "
            "adapter."
        )
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{file}: is of format {manifest['format']}, this version reads {FORMAT}")
    for key, value in optimizer.variant.items():
        if manifest["variant"].get(key) != value:
            raise CheckpointError(f"{file}: was saved with {key}={manifest['variant'].get(key)}, not {key}={value}")
    saved, own = manifest["parameters"], optimizer.trainable.parameters
    for name in own:
        if name not in saved:
            raise CheckpointError(f"{file}: has no {name}, which this model trains")
    for name in saved:
        if name not in own:
            raise CheckpointError(f"{file}: has {name}, which this model does not train")
        for key, value in _description(name, optimizer).items():
            if saved[name].get(key) != value:
                raise CheckpointError(f"{file}: {name} has {key} {saved[name].get(key)}, in this model {value}")
    if [group["parameters"] for group in manifest["groups"]] != _group_names(optimizer):
        raise CheckpointError(f"{file}: its parameters are in {len(manifest['groups'])} other groups than here")


def _description(name: str, optimizer: LoFTAdamW) -> dict[str, Any]:
    """What must be the same for a parameter's state to mean the same."""
    factor, shape = optimizer.trainable.factor_by_name.get(name), list(shape_of(optimizer.trainable.parameters[name]))
    if factor is None:
        return {"role": "other", "shape": shape}
    return {"role": factor.side, "shape": shape, "experts": factor.experts, "partner": factor.partner.name}


def _group_names(optimizer: LoFTAdamW) -> list[list[str]]:
    """The names of the parameters in each group, as the optimizer was built."""
    names = {id(p): name for name, p in optimizer.trainable.parameters.items()}
    return [sorted(names[id(p)] for p in group) for group in optimizer.group_members]
