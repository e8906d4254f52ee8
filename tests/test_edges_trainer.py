"""What a user says to a Trainer about the optimizer counts, or is refused: never dropped without a word."""

import os
from dataclasses import dataclass

import pytest
import torch
from models import trained
from test_trainer import InOrder, Regression, arguments, examples
from transformers import Trainer, TrainingArguments

from loft_ds import LoFT, LoFTAdamW, LoFTMixin, LoFTTrainer

# The module of the odd model that is trained whole: a norm, which is not decayed.
HEAD = "model.5"


class TheirOptimizer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW(trained(self.model).values(), lr=0.0)
        return self.optimizer


class TheirClass(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.AdamW, {"lr": 0.0}


class BehindOptimizer(LoFTMixin, TheirOptimizer):
    """As a user of a Trainer with an optimizer of its own would write it."""


class BehindClass(LoFTMixin, TheirClass):
    """The same for the other method that a Trainer may override."""


@pytest.mark.parametrize(
    ("kind", "more", "options", "dropped"),
    [
        (BehindOptimizer, {}, {}, r"TheirOptimizer\.create_optimizer"),
        (BehindClass, {}, {}, r"TheirClass\.get_optimizer_cls_and_kwargs"),
        (LoFTTrainer, {"optimizer_cls_and_kwargs": (LoFT, {"lr": 5e-3})}, {}, "optimizer_cls_and_kwargs"),
        (LoFTTrainer, {}, {"optim": "adafactor"}, r"TrainingArguments\(optim=\.\.\.\)"),
        (LoFTTrainer, {}, {"optim_args": "a=1"}, r"TrainingArguments\(optim_args="),
        (LoFTTrainer, {}, {"optim_target_modules": "all-linear"}, r"TrainingArguments\(optim_target_modules="),
    ],
)
def test_a_second_choice_of_an_optimizer_is_refused(tmp_path, kind, more, options, dropped):
    args = arguments(tmp_path, **options)
    with pytest.raises(ValueError, match=f"would drop {dropped}.*pass loft_kwargs"):
        kind(model=Regression(), args=args, **more)
    kind(model=Regression(), args=args, use_loft=False, **more)  # then nothing is dropped


@dataclass
class TheirArguments(TrainingArguments):
    optim: str = "adafactor"


def test_the_default_of_other_arguments_is_nobodys_choice(tmp_path):
    LoFTTrainer(model=Regression(), args=TheirArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


def build_by_factory(model, args):
    Trainer(model=model, args=args, train_dataset=examples(), optimizer_cls_and_kwargs=(LoFT, {})).create_optimizer()


@pytest.mark.parametrize("build", [LoFTTrainer, build_by_factory])
def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch, build):
    """As torchrun's do on a machine without an accelerator, where TrainingArguments are not told of it."""
    args = arguments(tmp_path)
    assert args.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, and each would train by itself"):
        build(model=Regression(), args=args)


class InFront(LoFTTrainer):
    """Overrides LoFTTrainer's own."""

    def create_optimizer(self, model=None):
        return TheirOptimizer.create_optimizer(self, model)


class InFrontAsItShould(LoFTTrainer):
    def create_optimizer(self, model=None):
        return super().create_optimizer(model)


def test_an_optimizer_in_lofts_place_does_not_begin_to_train(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(RuntimeError, match=r"^AdamW would train, and not LoFT"):
        InFront(model=Regression(), args=args, train_dataset=examples()).train()
    InFrontAsItShould(model=Regression(), args=args, train_dataset=examples()).train()


def under_deepspeed(rank, world, folder, stage, more, kind=InOrder, groups=None):
    """A Trainer under DeepSpeed: the learning rates of its groups, and the parameters after two steps."""
    import deepspeed

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        **more,
    }
    model = Regression()
    loft_kwargs = {"params": groups(model)} if groups else None
    args = arguments(folder, max_steps=2, per_device_train_batch_size=12 // world, deepspeed=settings)
    trainer = kind(model=model, args=args, train_dataset=examples(), loft_kwargs=loft_kwargs)
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    params = {}
    for name, p in trained(model).items():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            params[name] = p.detach().clone()
    return [group["lr"] for group in trainer.optimizer.param_groups], params


ADAMW_IN_JSON = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}


@pytest.mark.parametrize(("more", "kind"), [(ADAMW_IN_JSON, LoFTTrainer), ({}, InFront)], ids=["JSON", "subclass"])
def test_nor_does_one_under_deepspeed(ranks, tmp_path, more, kind):
    (said,) = ranks(1)(under_deepspeed, tmp_path, 2, more, kind)
    assert said.startswith("AdamW would train, and not LoFT")


# --- parameter groups


def head_and_rest(model):
    """As a user writes groups: the head at a learning rate of its own, the rest as the TrainingArguments have it."""
    head = [p for name, p in trained(model).items() if HEAD in name]
    rest = [p for name, p in trained(model).items() if HEAD not in name]
    return [{"params": rest}, {"params": head, "lr": 1e-2, "weight_decay": 0.0}]


def by_hand():
    """The parameters after two steps of a loop with those groups."""
    model = Regression()
    optimizer = LoFTAdamW(model, lr=1e-3, weight_decay=0.1, max_grad_norm=0.2, params=head_and_rest(model))
    data = examples()
    x, y = (torch.stack([row[key] for row in data[:12]]) for key in ("x", "labels"))
    for _ in range(2):
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        optimizer.step()
    return {name: p.detach() for name, p in trained(model).items()}


def assert_as_by_hand(params):
    for name, expected in by_hand().items():
        torch.testing.assert_close(params[name], expected, rtol=1e-4, atol=1e-6, msg=name)  # another order of sums


def test_groups_of_a_users_own(tmp_path):
    model = Regression()
    args = arguments(tmp_path, max_steps=2)
    groups = head_and_rest(model)
    trainer = InOrder(model=model, args=args, train_dataset=examples(), loft_kwargs={"params": groups})
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 1e-2]
    assert_as_by_hand({name: p.detach() for name, p in trained(model).items()})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_groups_of_a_users_own_under_deepspeed(ranks, tmp_path, stage):
    (rates, params), _ = ranks(2)(under_deepspeed, tmp_path, stage, {}, groups=head_and_rest)
    assert rates[0] == 1e-3
    assert rates[-1] == 1e-2
    assert_as_by_hand(params)


def test_groups_that_leave_something_out_are_refused(tmp_path):
    model = Regression()
    args = arguments(tmp_path, max_steps=1)
    groups = head_and_rest(model)[1:]
    with pytest.raises(ValueError, match="of them are missing"):
        LoFTTrainer(model=model, args=args, train_dataset=examples(), loft_kwargs={"params": groups}).train()


# --- DeepSpeed's own tool


def converted(rank, world, folder, stage):
    """What zero_to_fp32 makes of a Trainer's checkpoint and of the engine's own: an error, or which parameters it holds
    and how far they are from the model's."""
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    settings = {
        "train_micro_batch_size_per_gpu": 12 // world,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "per_device_train_batch_size": 12 // world}
    model = Regression()
    args = arguments(folder, deepspeed=settings, **options)
    trainer = LoFTTrainer(model=model, args=args, train_dataset=examples())
    trainer.train()
    trainer.model_wrapped.save_checkpoint(folder / "engine")
    live = {}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            live[name] = p.detach().clone()
    held = {frozenset(live): "all", frozenset(trained(model)): "trained"}
    found = []
    for checkpoint in (folder / "checkpoint-1", folder / "engine"):
        try:
            whole = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        except (FileNotFoundError, TypeError) as error:
            found.append(type(error).__name__)
            continue
        found.append((held[frozenset(whole)], max(float((p - live[name]).abs().max()) for name, p in whole.items())))
    return found


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, "TypeError"), (1, ("trained", 0.0)), (2, ("all", 0.0)), (3, ("all", 0.0))]
)
def test_zero_to_fp32_reads_the_engines_checkpoints_alone(ranks, tmp_path, stage, expected):
    """As docs/settings.md has it."""
    (of_trainer, of_engine), _ = ranks(2)(converted, tmp_path, stage)
    assert of_trainer == "FileNotFoundError"
    assert of_engine == expected


def clipped_under_deepspeed(rank, world, folder, in_json, argument):
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
        **in_json,
    }
    args = arguments(folder, deepspeed=config, max_grad_norm=argument)
    trainer = InOrder(model=Regression(), args=args, train_dataset=examples())
    trainer.train()
    return trainer._loft.max_grad_norm


@pytest.mark.parametrize(
    ("in_json", "argument", "found"),
    [
        ({}, 0.05, 0.05),
        ({}, 0.0, float("inf")),
        ({"gradient_clipping": "auto"}, 0.05, 0.05),
        ({"gradient_clipping": 0.05}, 0.05, 0.05),
    ],
)
def test_the_trainers_norm_counts_where_the_json_is_silent(ranks, tmp_path, in_json, argument, found):
    """DeepSpeed would clip at 1.0 there."""
    assert ranks(1)(clipped_under_deepspeed, tmp_path, in_json, argument) == [found]
