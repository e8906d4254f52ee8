"""An optimizer's state in torch's form: numbered parameters, hooks, copies, and what must be equal to load one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from .optimizer import LoFTAdamW

State = dict[Any, dict[str, Any]]


class Snapshot(dict[str, Any]):
    """The state of one parameter as it is now. What was written into it would be lost, so that raises."""

    def __setitem__(self, kind: str, value: Any) -> None:
        raise TypeError(
            f"LoFT's state is made when it is asked for, and {kind!r} written into it would be lost: assign "
            "optimizer.state = {...}. In place of engine.offload_states() there is loft_ds.offload_states(engine)."
        )


def own(state: Mapping[Any, dict[str, Any]]) -> State:
    """State that shares no memory with that of an optimizer."""
    return {
        name: {kind: t.clone() if isinstance(t, Tensor) else t for kind, t in each.items()}
        for name, each in state.items()
    }


def build(
    kind: type[LoFTAdamW], model: nn.Module, settings: dict[str, Any], groups: list[dict[str, Any]], state: State
) -> LoFTAdamW:
    """An optimizer from its copied or pickled parts."""
    optimizer = kind(model, params=groups, **settings)
    optimizer.state = state
    return optimizer


def pack(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Say in each group which variant of the method a state is of, and number parameters as torch does.

    In the groups, because ``torch.distributed.checkpoint`` keeps nothing beside them. The numbers are for its sake too;
    under ZeRO, where DeepSpeed has put its own tensors into the groups, the names stay.
    """
    loft = cast("LoFTAdamW", optimizer)
    for group in state_dict["param_groups"]:
        group["variant"] = loft.variant
    numbers = _numbers(loft)
    keys = numbers or {name: name for name in state_dict["state"]}
    state_dict["state"] = {keys[name]: dict(each) for name, each in state_dict["state"].items()}


def unpack(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The other way, of state that the optimizer may keep.

    Raises:
        ValueError: a state of other parameters, of another optimizer or of another variant of the method.
    """
    loft = cast("LoFTAdamW", optimizer)
    names = {number: name for name, number in (_numbers(loft) or {}).items()}
    state = {names.get(key, key): each for key, each in state_dict["state"].items()}
    strange = [k for k, each in state.items() if each and (k not in loft.trainable.parameters or "start" not in each)]
    variants = [group.get("variant") for group in state_dict["param_groups"]]
    if strange or any(variant != loft.variant for variant in variants):
        raise ValueError(
            f"this is no state of this optimizer: it is of {strange[:1] or variants[0]}, not of {loft.variant}"
        )
    number = itertools.count()
    groups = [
        # torch.distributed.checkpoint has names here.
        {**{k: v for k, v in group.items() if k != "variant"}, "params": [next(number) for _ in group["params"]]}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": own(state), "param_groups": groups}


def _numbers(optimizer: LoFTAdamW) -> dict[str, int] | None:
    """Where each parameter is in the groups; None where other tensors are there."""
    places = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    parameters = optimizer.trainable.parameters
    if any(id(p) not in places for p in parameters.values()):
        return None
    return {name: places[id(p)] for name, p in parameters.items()}
