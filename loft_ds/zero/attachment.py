"""Finds out where an optimizer's master weights lie, when the first gradients arrive, and who trains them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..factors import Trainable, shape_of
from ..kernels import prepare
from ..sharding import Layout, Whole
from .clipping import Clipping
from .engine import find_engine
from .stages import layout_of

if TYPE_CHECKING:
    from ..optimizer import LoFTAdamW


# The watch over each parameter, and whose it is. Not its attribute: a model is to be pickled without its optimizer.
_WATCHED: MutableMapping[Tensor, tuple[Any, weakref.ref[Attachment]]] = WeakIdKeyDictionary()


class Attachment:
    """What one LoFTAdamW knows of the engine that steps it.

    Args:
        optimizer: the optimizer. Its parameters are watched from now on, in place of the LoFTAdamW built before.
        trainable: what it trains.
    """

    def __init__(self, optimizer: LoFTAdamW, trainable: Trainable) -> None:
        self._trainable = trainable
        self._own = {id(p) for p in trainable.parameters.values()}
        self._shapes = sorted(shape_of(p) for p in trainable.parameters.values())
        self._layout: Layout | None = None
        self._clipping: Clipping | None = None
        self._arrived: set[int] = set()
        self._numbers = {id(f.param): i for i, f in enumerate(trainable.factors)}
        self._arrivals: list[int] | None = [0] * len(self._numbers)
        self._rehearsed = False
        self._settled = False
        watch = _Watch(optimizer, self)
        for p in trainable.parameters.values():
            watch.over(p)

    @property
    def arrivals(self) -> list[int] | None:
        """How many gradients of each factor have come since the last step, on this rank.

        DeepSpeed fills in zeros where there is none. None where that is not so, as in plain torch, and where another
        optimizer has been built since then and watches instead.
        """
        return None if self._clipping is None else self._arrivals

    def find(self, optimizer: LoFTAdamW) -> Layout | None:
        """The layout in which gradients arrive; None where DeepSpeed is still building its engine.

        Raises:
            RuntimeError: DeepSpeed trains the parameters with another optimizer.
            NotImplementedError: an engine or a setting that LoFT does not know.
        """
        if self._layout is None:
            engine = find_engine(optimizer, self._trainable)
            if engine is not None:
                self._layout = layout_of(engine, self._trainable)
                held, _ = self._layout.held(self._trainable.factors[0].param)
                prepare(held.device)  # that of the CPU where DeepSpeed offloads the optimizer
                self._clipping = Clipping(engine)
            elif self._handed_own_parameters(optimizer):
                self._layout = Whole(self._trainable.factors, self._trainable.others)
        return self._layout

    def on_gradient(self, optimizer: LoFTAdamW, param: Tensor) -> None:
        """Take DeepSpeed's clipping over when a gradient arrives: before the first step would clip.

        Until an engine is found or a step is taken every backward pass looks anew: one may come before
        ``deepspeed.initialize``. (It looks at all Python objects, which takes a while.)
        """
        if self._arrivals is not None and (number := self._numbers.get(id(param))) is not None:
            self._arrivals[number] += 1
        if not self._settled and self._clipping is None:
            if not self._arrived or id(param) in self._arrived:
                self._arrived.clear()
                self._layout = None
                self.find(optimizer)
            self._arrived.add(id(param))
        if self._clipping is not None and self._clipping.pending:
            norm = self._clipping.take()
            if optimizer.max_grad_norm is None or optimizer.max_grad_norm == norm:
                optimizer.max_grad_norm = norm
            elif self._clipping.said:
                raise ValueError(
                    f'"gradient_clipping": {norm} in the DeepSpeed JSON contradicts '
                    f"max_grad_norm={optimizer.max_grad_norm}: set one of them, or both alike."
                )

    def to_step(self, optimizer: LoFTAdamW) -> Layout | None:
        """The layout of the step that ``optimizer.step`` is called for.

        None for the one rehearsal with zero gradients in which DeepSpeed's stage 0 builds its float32 clones
        (fp16/unfused_optimizer.py, initialize_optimizer_states).

        Raises:
            RuntimeError: gradients came to this optimizer, but none to the parameters it was built from.
        """
        if self._layout is None and self._handed_own_parameters(optimizer):
            self.find(optimizer)
        if self._layout is not None:
            return self._layout
        handed = [p for group in optimizer.param_groups for p in group["params"]]
        clones = sorted(p.shape for p in handed) == self._shapes
        if clones and not self._rehearsed and not any(p.grad is not None and bool(p.grad.any()) for p in handed):
            self._rehearsed = True
            return None
        raise RuntimeError(
            "LoFTAdamW was called to step, but no gradient reached the parameters of the model it was built from. "
            "Build it from the very model object that is trained, after peft.get_peft_model and set_adapter."
        )

    def stepped(self, norm: Tensor) -> None:
        """A step was taken: from now on the layout stays, and DeepSpeed's reports show LoFT's norm."""
        if not self._settled and self._clipping is None:
            self._warn_of_half_precision()
        self._settled = True
        self._arrivals = None if self._arrivals is None else [0] * len(self._numbers)
        if self._clipping is not None:
            self._clipping.report(norm)

    def _warn_of_half_precision(self) -> None:
        halves = [name for name, p in self._trainable.parameters.items() if p.dtype.itemsize == 2]
        if halves:
            warnings.warn(
                f"{len(halves)} trained parameters have 16 bits, {halves[0]} first, and nothing keeps them in more: "
                "small steps are lost in their rounding. Cast the adapters to float32 (p.data = p.data.float()), or "
                "train under DeepSpeed, which keeps float32 masters.",
                stacklevel=2,
            )

    def watch_no_more(self) -> None:
        """Another optimizer watches these parameters from now on."""
        self._arrivals = None

    def _handed_own_parameters(self, optimizer: LoFTAdamW) -> bool:
        return all(id(p) in self._own for group in optimizer.param_groups for p in group["params"])


class _Watch:
    """What hangs on the parameters: tells of gradients, and finds out who trains when the optimizer is gone.

    It does not keep the optimizer alive. An optimizer that a Trainer dropped for another is dead by the first
    gradient, and that it should not be is what the watch is for.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, attachment: Attachment) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._attachment = weakref.ref(attachment)
        self._trainable = attachment._trainable
        self._handles: list[Any] = []

    def over(self, param: nn.Parameter) -> None:
        """Watch a parameter, in place of the LoFTAdamW built before."""
        if param in _WATCHED:
            handle, earlier = _WATCHED[param]
            handle.remove()
            if (attachment := earlier()) is not None:
                attachment.watch_no_more()
        handle = param.register_post_accumulate_grad_hook(self._on_gradient)
        _WATCHED[param] = handle, self._attachment
        self._handles.append(handle)

    def _on_gradient(self, param: Tensor) -> None:
        optimizer, attachment = self._optimizer(), self._attachment()
        if optimizer is not None and attachment is not None:
            attachment.on_gradient(optimizer, param)  # type: ignore[arg-type]
            return
        for handle in self._handles:
            handle.remove()
        find_engine(None, self._trainable)
