"""LoFT in the Hugging Face Trainer, with and without DeepSpeed."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedSchedulerWrapper
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from .checkpoint import CheckpointError, last_tag, load_checkpoint, naming, save_checkpoint
from .export import adapter_state_dict
from .optimizer import LoFTAdamW
from .ranks import all_gather, together
from .zero.unsupported import find_model_refusal

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import Trainer as Base
else:
    Base = object  # the mixin comes before a Trainer of the user's choice


T = TypeVar("T")


class LoFT:
    """LoFT by its name: ``LoFT(model, lr=1e-4)`` is a :class:`LoFTAdamW`.

    It is also the factory for a Trainer that one cannot subclass: ``optimizer_cls_and_kwargs=(LoFT, {})``. The Trainer
    calls ``LoFT()(model)``, and LoFT takes from its TrainingArguments what :class:`LoFTMixin` takes, the clipping norm
    included. The dictionary holds arguments of :class:`LoFTAdamW` in place of those, and further ones.
    """

    def __new__(cls, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> Any:
        """The optimizer of a model; without one the factory."""
        if model is None:
            if kwargs:
                given = ", ".join(kwargs)
                raise TypeError(f"LoFT is built from the model, not from {given} alone: LoFT(model, lr=...)")
            return super().__new__(cls)
        return LoFTAdamW(model, *args, **kwargs)

    def __call__(self, model: nn.Module, args: Any = None, **kwargs: Any) -> LoFTAdamW:
        """Called by a Trainer.

        Args:
            model: the Trainer's.
            args: its TrainingArguments, where it hands them over as axolotl's does. LoFT has them from the Trainer.
            kwargs: the dictionary.

        Raises:
            ValueError: a search tries values that the dictionary overrides; arguments, and no Trainer that calls;
                several processes were launched, and each would train by itself.
        """
        if (trainer := find_caller(Trainer)) is None:
            if args is not None:
                raise ValueError("no transformers.Trainer calls: say LoFTAdamW's own arguments in place of a Trainer's")
            return LoFTAdamW(model, **kwargs)
        check_that_ranks_meet(trainer.args)
        _check_search(trainer, kwargs)
        callbacks = trainer.callback_handler.callbacks
        if not trainer.is_deepspeed_enabled and not any(isinstance(each, _NoOtherClipping) for each in callbacks):
            trainer.args = copy.copy(trainer.args)  # a step that fails would leave the user's own at 0
            trainer.add_callback(_NoOtherClipping())
        settings = settings_of(trainer.args, model, trainer.get_decay_parameter_names(model))
        settings["max_grad_norm"] = clipping_norm(trainer)
        return LoFTAdamW(model, **{**settings, **kwargs})


def find_caller(kind: type[T]) -> T | None:
    """The trainer that calls, of this kind: it hands neither itself nor its arguments over."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back
    return frame and frame.f_locals["self"]


class _NoOtherClipping(TrainerCallback):
    """Keeps a Trainer that is not LoFT's from clipping by the norm of the factors' gradients: LoFT clips in its step.

    Its ``max_grad_norm`` is 0 from a step's begin until after it would clip, and otherwise as the user has it.
    """

    def __init__(self) -> None:
        self._said: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._said is None or args.max_grad_norm:  # or the step before was not ended, as where memory was short
            self._said, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.max_grad_norm, self._said = self._said, None


def check_that_loft_trains(optimizer: Any, remedy: str) -> None:
    """Called when training begins.

    Args:
        optimizer: a Trainer's, in the wrappers of Accelerate and DeepSpeed.
        remedy: what the user is told to do.

    Raises:
        RuntimeError: it is another one than LoFT.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, LoFTAdamW):
        raise RuntimeError(f"{type(optimizer).__name__} would train, and not LoFT: {remedy}")


class OnlyLoFT(TrainerCallback):
    """Raises when training begins and something else than LoFT would train, in a Trainer that is not LoFT's.

    Args:
        remedy: what the user is told to do.
    """

    def __init__(self, remedy: str) -> None:
        self._remedy = remedy

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        check_that_loft_trains(optimizer, self._remedy)


def check_that_ranks_meet(args: TrainingArguments) -> None:
    """Refuse a launcher's processes that know nothing of each other: each would train by itself, into one folder.

    So it is on a machine without an accelerator, unless ``use_cpu`` is set.

    Raises:
        ValueError: there are several.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > args.world_size == 1:
        raise ValueError(
            f"{launched} processes were launched, and each would train by itself: pass TrainingArguments(use_cpu=True) "
            "on a machine without an accelerator"
        )


def dropped_arguments(args: Any, kind: type[TrainingArguments] = TrainingArguments) -> list[str]:
    """The TrainingArguments that choose an optimizer and are not at their defaults: LoFT would drop them.

    Args:
        args: what a user said, in attributes of those names.
        kind: the TrainingArguments that they are, or will be: each may have a default of its own for ``optim``.
    """
    defaults = {field.name: field.default for field in fields(kind)}
    chosen = ("optim", "optim_args", "optim_target_modules")
    return [name for name in chosen if getattr(args, name) != defaults[name]]


def settings_of(args: TrainingArguments, model: nn.Module, decayed: Collection[str]) -> dict[str, Any]:
    """The arguments of :class:`LoFTAdamW` that TrainingArguments say, but for the clipping norm.

    Args:
        args: a Trainer's.
        model: what trains of it is in two groups.
        decayed: names of the parameters that weight decay is for.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "params": [
            {"params": [p for name, p in trained if name in decayed]},
            {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
        ],
    }


def clipping_norm(trainer: Trainer) -> float | None:
    """LoFT's norm: the argument, unless a DeepSpeed JSON says one; Transformers sees to it that both agree."""
    if not trainer.is_deepspeed_enabled:
        return trainer.args.max_grad_norm or None
    if "gradient_clipping" in trainer.accelerator.state.deepspeed_plugin.deepspeed_config:
        return None
    return trainer.args.max_grad_norm or math.inf  # of a silent JSON DeepSpeed makes 1.0


# What a search names an argument of LoFTAdamW by.
_SEARCHED = {
    "learning_rate": "lr",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}


def _check_search(trainer: Trainer, chosen: Mapping[str, Any]) -> None:
    """Refuse a hyperparameter search over what LoFT's own arguments say: every trial would be the same."""
    for name in trainer.state.trial_params or ():
        if _SEARCHED.get(name) in chosen:
            raise ValueError(
                f"the search tries values of {name}, and LoFT's own argument {_SEARCHED[name]!r} would override each: "
                "leave it out"
            )


class LoFTMixin(Base):
    """LoFT for any subclass of ``transformers.Trainer``: ``class MyTrainer(LoFTMixin, SFTTrainer)``.

    Learning rate, betas, eps and weight decay come from the TrainingArguments (biases and norms are not decayed, as
    the Trainer has it), ``max_grad_norm`` is LoFT's norm and the logged ``grad_norm`` too.

    Args:
        use_loft: False for the Trainer's own optimizer.
        loft_kwargs: arguments of :class:`LoFTAdamW` in place of those, and further ones. Parameter groups are
            ``{"params": [{"params": head, "lr": 1e-2}, {"params": rest}]}``, together all that trains; what a group
            does not say comes from the TrainingArguments, weight decay for biases and norms included.

    Raises:
        ValueError: an optimizer is chosen in another way too, which the Trainer would drop without a word;
            ``save_on_each_node`` is set (a checkpoint's parts are in one folder); or several processes were launched,
            and each would train by itself.
        RuntimeError: when training begins: something else than LoFT would train.
        NotImplementedError: when training begins: weights that DeepSpeed cannot take.
    """

    optimizer: torch.optim.Optimizer | None
    _loft: LoFTAdamW

    def __init__(
        self, *args: Any, use_loft: bool = True, loft_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.use_loft = use_loft
        self.loft_kwargs = loft_kwargs or {}
        super().__init__(*args, **kwargs)
        check_that_ranks_meet(self.args)
        if use_loft and (dropped := self._dropped()):
            raise ValueError(
                f"LoFTTrainer builds LoFTAdamW by itself and would drop {dropped}: leave that out and pass "
                "loft_kwargs={...} (parameter groups as its 'params'), or use_loft=False"
            )
        if use_loft and self.args.save_on_each_node:
            raise ValueError("LoFT saves into one folder that all ranks see: leave save_on_each_node out")

    def _dropped(self) -> str | None:
        """What chooses an optimizer besides LoFT, if anything does."""
        if self.optimizer is not None:
            return "optimizers=(...)"
        if self.optimizer_cls_and_kwargs is not None:
            return "optimizer_cls_and_kwargs=(...)"
        order = type(self).__mro__
        for base in order[order.index(LoFTMixin) + 1 : order.index(Trainer)]:
            for method in ("create_optimizer", "get_optimizer_cls_and_kwargs"):
                if method in vars(base):
                    return f"{base.__name__}.{method}"
        return next((f"TrainingArguments({name}=...)" for name in dropped_arguments(self.args, type(self.args))), None)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """Build LoFTAdamW from the TrainingArguments, in the Trainer's two groups of parameters."""
        if not self.use_loft or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        if self.is_deepspeed_enabled and (refusal := find_model_refusal(model)):
            raise NotImplementedError(refusal)
        _check_search(self, self.loft_kwargs)
        settings = settings_of(self.args, model, self.get_decay_parameter_names(model))
        settings["max_grad_norm"] = clipping_norm(self)
        self.optimizer = self._loft = LoFTAdamW(model, **{**settings, **self.loft_kwargs})
        return self._loft

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        """Leave clipping to LoFT: it clips by another norm, inside its step."""
        if not self.use_loft or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return self._loft._global_grad_norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float | None:
        if not self.use_loft or self.is_deepspeed_enabled:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._loft._global_grad_norm

    @property
    def _trained(self) -> DeepSpeedEngine | LoFTAdamW:
        """What :mod:`loft_ds.checkpoint` saves and loads: with DeepSpeed or without, in one format, so that a run may
        go on under another world size or stage, or without DeepSpeed. The Trainer's loader passes over what it does
        not know, and would go on with empty moments.
        """
        return self.model_wrapped if self.is_deepspeed_enabled else self._loft

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's; ``resume_from_checkpoint=True`` takes the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_checkpoint()
            if resume_from_checkpoint is None:
                raise CheckpointError(f"{self.args.output_dir}: holds no whole checkpoint to resume from")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def last_checkpoint(self) -> str | None:
        """The last checkpoint in the output folder that was written to its end, as the first rank sees it; None where
        there is none. A collective.
        """
        folders = [c for c in Path(self.args.output_dir).glob("checkpoint-*") if _is_whole(c)]
        last = max(folders, key=lambda c: int(c.name.rsplit("-", 1)[1]), default=None)
        found: str | None = all_gather(last and str(last))[0]
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with naming(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        with together():  # next the first rank says that the checkpoint is whole, and deletes the one before
            super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.use_loft:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_checkpoint(self._trained, output_dir)
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.use_loft:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # Also what was chosen where nobody calls create_optimizer, or another one than this class's.
        check_that_loft_trains(
            self.optimizer,
            'leave "optimizer" out of the DeepSpeed JSON, let an own create_optimizer call super().create_optimizer(), '
            "or pass use_loft=False",
        )
        if resume_from_checkpoint is None:
            return prepared
        schedule = Path(resume_from_checkpoint) / SCHEDULER_NAME
        in_json = isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper)
        if last_tag(resume_from_checkpoint) is not None and schedule.is_file() == in_json:
            saved, now = ("the Trainer", "the DeepSpeed JSON") if in_json else ("the DeepSpeed JSON", "the Trainer")
            raise CheckpointError(f"{resume_from_checkpoint}: its schedule is one of {saved}, this run's of {now}")
        load_checkpoint(self._trained, resume_from_checkpoint)
        if not in_json:
            self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))
        if self.accelerator.scaler is not None:  # of float16 without DeepSpeed
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which would take one more step where the last checkpoint is of the last step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
            return
        done, last = self.state.global_step, self.state.max_steps
        words = f"nothing is left to train: the checkpoint is of step {done}, and the last is {last}"
        warnings.warn(words, stacklevel=2)
        self.control.should_training_stop = True

    def _load_best_model(self) -> None:
        # State and weights together: bases are those of the weights.
        if self.use_loft and not self.args.save_only_model:
            load_checkpoint(self._trained, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter as PEFT does, from any ZeRO stage, without the frozen weights passing through memory."""
        if not self.is_deepspeed_enabled or not isinstance(self.model, PeftModel):
            super().save_model(output_dir, _internal_call)
            return
        engine = None if self.model_wrapped is self.model else self.model_wrapped
        state = adapter_state_dict(self.model, engine)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end, LoFT's or not: one that is not LoFT's is then refused by name."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())  # written last, and not aside
    except (OSError, ValueError):
        return False
    return True


class SaveOnSIGTERM(TrainerCallback):
    """On SIGTERM, which schedulers send before they take a machine away: save when the step ends, and stop training.

    The signal may reach one rank only, or each in another step, and saving is a collective. So all ranks agree when a
    step ends: an all-reduce of one number, at a moment when LoFT has just waited for the device anyway. (The
    Trainer's own ``enable_jit_checkpoint`` asks nobody.)

    Attributes:
        sent_to: a rank that the signal reached, the same on all ranks; None while there was none.
    """

    def __init__(self) -> None:
        self.sent_to: int | None = None
        self._received = False

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = signal.signal(signal.SIGTERM, self._receive)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        word = torch.tensor(args.process_index + 1 if self._received else 0, device=args.device)
        if dist.is_initialized():
            dist.all_reduce(word, dist.ReduceOp.MAX)
        if word.item():
            self.sent_to = int(word) - 1
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the time until SIGKILL is short


class LoFTTrainer(LoFTMixin, Trainer):
    """A Trainer that trains with LoFT: see :class:`LoFTMixin`."""
