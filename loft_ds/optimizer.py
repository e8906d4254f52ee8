"""LoFTAdamW: low-rank factors updated so that ``W`` moves as AdamW on ``W`` itself would move it."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import algebra, kernels
from .adapters import find_trainable, lost_starts
from .blocks import JOINT_RANK, Blocks
from .quantised import check_unpacked, four_bit_layers, keep_gradients
from .runtime import Runtime
from .sharding import Layout
from .state_dict import Snapshot, build, own, pack, unpack
from .zero.attachment import Attachment

CLIPPED = (
    "the norm of the factors' own gradients was {:.6g} in {} steps running: something clips by it, before LoFT clips "
    "by the norm of full gradients. Leave clip_grad_norm_ out (of a Trainer: max_grad_norm=0.0) and pass "
    "LoFTAdamW(max_grad_norm=...)."
)


class LoFTAdamW(Optimizer):
    """LoFT (Tastan et al., ICLR 2026, arXiv 2505.21289) for the LoRA factors of a PEFT model, AdamW for the rest.

    Works as it is in plain torch, under DDP and under DeepSpeed ZeRO stages 0 to 3, where it finds this rank's share
    of each factor by itself: ``deepspeed.initialize(model=model, optimizer=LoFTAdamW(model))``. State and work are
    split by feature rows. Arithmetic and state are float32, float64 for float64 parameters. :mod:`loft_ds.step` is the
    method, on one page.

    There is no ``alpha`` to tune: PEFT's scaling is read from the layers, and the trajectory of ``W`` does not depend
    on it. The factors are changed beyond what the step asks for, to the shortest ones of the same product.

    ``state`` is keyed by parameter name, because under ZeRO the parameters are not what the optimizer is handed. It is
    made when it is asked for: counters, and views of the tensors that :class:`loft_ds.pairs.Side` describes, of this
    rank's rows from ``start`` on. All have a leading dimension E where the factor is that of E experts: PEFT's
    ``target_parameters`` are one pair each.

    Args:
        model: a PEFT model; its trainable parameters are the optimizer's.
        lr: learning rate, of the size that full fine-tuning with AdamW takes: docs/settings.md says a good first one,
            docs/results/quality.md has the sweeps.
        betas: decay of momentum and second moment.
        eps: AdamW's.
        weight_decay: decoupled, multiplied by the learning rate.
        max_grad_norm: clip by the norm of the projected full gradients of the factors about to move and the gradients
            of all other parameters; None for no clipping. Under DeepSpeed ``gradient_clipping`` in the JSON sets it, by
            the Trainer 1.0.
        turns: in place of the one of ``blocks``: "joint" for both factors on every step, "alternate" for one, as
            published and at half the work, "auto" for the first up to rank ``JOINT_RANK``.
        blocks: the paper's building blocks as switches; ``Blocks.published()`` is the method as in the paper.
        second_moment_dtype: torch.bfloat16 halves LoFT's largest state and moves the trajectory a little:
            docs/results/precision.md. None for that of all other state.
        denominator_precision: the least that the products for AdamW's denominators may have, as torch names it in
            ``fp32_precision``: "ieee", "tf32" or "bf16". Less is quicker where the hardware has it, and moves the
            trajectory a little: docs/results/precision.md. The first steps are in full precision in any case.
        offload_second_moment: keep it in CPU memory, pinned where there is an accelerator. Once a turn it passes in
            chunks through the device, where the arithmetic stays; not a bit of the result changes.
        params: parameters or parameter groups in place of one group of all, to give them ``lr``, ``weight_decay``,
            ``betas`` or ``eps`` of their own. Together they must be the model's trainable parameters.

    Raises:
        TypeError: parameters in place of a model.
        ValueError: a setting out of range; a model without a LoRA pair that LoFT can treat; groups that are not the
            model's trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        turns: Literal["auto", "joint", "alternate"] | None = None,
        blocks: Blocks | None = None,
        second_moment_dtype: torch.dtype | None = None,
        denominator_precision: kernels.Precision = "ieee",
        offload_second_moment: bool = False,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
    ) -> None:
        blocks = blocks or Blocks()
        self.blocks = blocks if turns is None else replace(blocks, turns=turns)
        in_matrices = self.blocks.in_matrices
        if second_moment_dtype not in (None, torch.bfloat16) or (second_moment_dtype and not in_matrices):
            raise ValueError("second_moment_dtype must be None, or torch.bfloat16 for the matrix form")
        if denominator_precision not in get_args(kernels.Precision):
            raise ValueError(f'denominator_precision must be "ieee", "tf32" or "bf16", not {denominator_precision!r}')
        if denominator_precision != "ieee" and not (in_matrices and self.blocks.projected_update):
            raise ValueError("denominator_precision is for the projected update of the matrix form")
        if offload_second_moment and not in_matrices:
            raise ValueError(
                "offload_second_moment is for the matrix form: the elementwise one is as small as momentum"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, not {max_grad_norm}")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"LoFTAdamW is built from the model, not from {type(model).__name__}: it reads each pair's layer. "
                "Where DeepSpeed is to build it, pass optimizer=lambda params: LoFTAdamW(model, params=params)."
            )
        self.model = model
        self.trainable = find_trainable(model)
        kernels.prepare()
        self._four_bit_layers = four_bit_layers(model)
        keep_gradients(model)
        self.max_grad_norm = max_grad_norm
        self.second_moment_dtype = second_moment_dtype
        self.denominator_precision = denominator_precision
        self.offload_second_moment = offload_second_moment
        self._runtime = Runtime(
            self.trainable, self.blocks, second_moment_dtype, offload_second_moment, denominator_precision
        )
        self.place = self._runtime.place
        trained = list(self.trainable.parameters.values())
        if strange := [name for name, p in self.trainable.parameters.items() if p.is_complex()]:
            raise ValueError(
                f"{strange[0]} is complex: LoFTAdamW trains real numbers. Leave it out, or train its parts."
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(_groups(trained if params is None else params, trained), defaults)
        self.register_state_dict_post_hook(pack)
        for group in self.param_groups:
            _check(group)
        self.group_members = [list(group["params"]) for group in self.param_groups]  # DeepSpeed rewrites the groups
        # Under this name engine.get_global_grad_norm() looks for it; written in place, so that whoever asks before a
        # step for the norm to log (the Trainer) reads that step's.
        self._global_grad_norm = torch.full((), math.nan, dtype=torch.float64, device=trained[0].device)
        self._attachment = Attachment(self, self.trainable)
        self._others_clipping = _OthersClipping()
        if self.trainable.untreated:
            listed = [f"{name} ({reason})" for name, reason in sorted(self.trainable.untreated.items())]
            rest = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            warnings.warn(
                f"LoFT does not treat these adapter parameters, AdamW moves them: {', '.join(listed[:8])}{rest}",
                stacklevel=2,
            )
        if lost := lost_starts(model):
            starts = ", ".join(f"{adapter} ({start})" for adapter, start in lost.items())
            warnings.warn(
                f"the start of {starts} was taken out of the frozen weights, and PEFT cannot do so again: what is "
                "saved is no adapter of the model on disk. Keep the start too (export_adapter before the first step): "
                "PEFT's path_initial_model_for_weight_conversion=START makes of both one adapter of twice the rank.",
                stacklevel=2,
            )

    @property
    def state(self) -> defaultdict[Any, dict[str, Any]]:
        """All state by parameter name, made anew each time: assign to it. To write into it raises.

        Empty for whatever else DeepSpeed looks up in it, as torch's own is.
        """
        return defaultdict(dict, {name: Snapshot(each) for name, each in self._runtime.state.items()})

    @state.setter
    def state(self, state: Mapping[Any, dict[str, Any]]) -> None:
        self._runtime.state = state

    @property
    def variant(self) -> dict[str, bool | int | str]:
        """The switches of the method: state that one variant has gathered means nothing to another."""
        variant = {**asdict(self.blocks), "dtype": str(self.second_moment_dtype)}
        if self.blocks.turns == "auto":
            variant["joint_rank"] = JOINT_RANK  # may be another one in another version
        return variant

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, for what :meth:`state_dict` gave on the same world size and stage.

        Raises:
            ValueError: a state of other parameters, of another optimizer or of another variant of the method.
        """
        last = self.register_load_state_dict_pre_hook(unpack)  # after those that a user has registered
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        loaded = state.pop("state", None)  # torch would put it past the property
        super().__setstate__(state)
        if loaded is not None:
            self.state = loaded

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with its model, and built anew from it."""
        settings = {
            "max_grad_norm": self.max_grad_norm,
            "blocks": self.blocks,
            "second_moment_dtype": self.second_moment_dtype,
            "denominator_precision": self.denominator_precision,
            "offload_second_moment": self.offload_second_moment,
            **self.defaults,
        }
        return build, (type(self), self.model, settings, self.param_groups, own(self.state))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is built: factors are paired at construction."""
        if hasattr(self, "group_members"):
            raise ValueError("LoFTAdamW pairs factors at construction: pass all groups as params=[...]")
        super().add_param_group(param_group)

    @property
    def grad_norm(self) -> float:
        """The norm that the last step was clipped by, before clipping: see ``max_grad_norm``. NaN before any step."""
        return float(self._global_grad_norm)

    def attach(self) -> Layout | None:
        """Find out where the master weights lie: with the DeepSpeed engine that steps this optimizer, or in the
        parameters themselves. None where DeepSpeed is still building its engine.

        The first gradient does this unasked; :mod:`loft_ds.checkpoint` asks before it.

        Raises:
            RuntimeError: DeepSpeed trains the parameters with another optimizer.
            NotImplementedError: an engine or a setting that LoFT does not know.
        """
        return self._attachment.find(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Under DeepSpeed it is called once a group or sub-group; the last of these calls moves all.

        Raises:
            RuntimeError: a layout that is not known, a step in which no factor pair has a gradient, or frozen weights
                that pass none on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_unpacked(self._four_bit_layers)
        layout = self._attachment.to_step(self)
        if layout is not None and layout.collect(self.param_groups):
            device = self._global_grad_norm.device.type
            with torch.autocast(device, enabled=False), algebra.products_in("ieee"):
                norm = self._runtime.take_step(layout, self.max_grad_norm, self._attachment.arrivals)
            self._global_grad_norm = self._global_grad_norm.to(norm.device).copy_(norm)  # a model may have been moved
            self._attachment.stepped(self._global_grad_norm)
            if self._attachment.arrivals is None:  # not under DeepSpeed, whose clipping is taken over
                self._others_clipping.look([p.grad for group in self.param_groups for p in group["params"]], norm)
        return loss


class _OthersClipping:
    """Warns of who clips by the norm of the factors' own gradients: it is then the same in several steps running.

    Nothing else tells of it: the gradients come into the step as if they had been smaller. In 16 bits, and of norms
    below 1e-2, the clipped norm is rounded too much to tell.
    """

    RUNNING = 6  # smooth losses pass a longest gradient too, but not so slowly; even, since alternating turns differ
    ALIKE, MOVED = 1e-5, 1e-3  # relative; the first is above the rounding of whoever clips in float32

    def __init__(self) -> None:
        self._norms: deque[list[float]] = deque(maxlen=self.RUNNING)
        self._warned = False

    def look(self, gradients: Iterable[Tensor | None], norm: Tensor) -> None:
        """Called with the gradients of each step, and LoFT's norm of them."""
        if self._warned:
            return
        norms = torch._foreach_norm([each for each in gradients if each is not None], 2, dtype=torch.float64)
        raw = torch.stack([each.to(norm.device) for each in norms]).norm()
        self._norms.append(torch.stack([raw, norm]).tolist())  # after a step, which has waited for the device
        if len(self._norms) < self.RUNNING:
            return
        raws, ours = zip(*self._norms, strict=True)
        still, odd, even = (1 - min(each) / (max(each) or 1.0) for each in (raws, ours[::2], ours[1::2]))
        if still < self.ALIKE and min(odd, even) > self.MOVED:
            self._warned = True
            warnings.warn(CLIPPED.format(self._norms[-1][0], self.RUNNING), stacklevel=2)


def _groups(params: Iterable[Any], trained: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups without the empty ones, which DeepSpeed drops and torch's schedulers then trip over.

    Of parameters, or of pairs of a name and a parameter, as torch's optimizers take them.
    """
    groups = list(params)
    groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
    groups = [{**g, "params": [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])} for g in groups]
    given = {id(p[1] if isinstance(p, tuple) else p) for g in groups for p in g["params"]}
    wanted = {id(p) for p in trained}
    if given != wanted:
        raise ValueError(
            f"params must be the model's trainable parameters: {len(wanted - given)} of them are missing and "
            f"{len(given - wanted)} others are given"
        )
    return [g for g in groups if g["params"]]


def _check(group: dict[str, Any]) -> None:
    if not group["lr"] >= 0 or not group["eps"] >= 0 or not group["weight_decay"] >= 0:
        raise ValueError(
            f"lr, eps and weight_decay must not be negative: {group['lr']}, {group['eps']}, {group['weight_decay']}"
        )
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must lie in [0, 1): {group['betas']}")
