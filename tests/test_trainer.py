"""LoFT in the Trainer: the same training as a loop by hand, LoFT's norm clipped and logged, and no swapping out."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from models import Bomb, batch, odd_model, relative, trained
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from loft_ds import LoFT, LoFTAdamW, LoFTTrainer
from loft_ds.checkpoint import CheckpointError
from loft_ds.hf import SaveOnSIGTERM

STEPS, CLIP = 6, 0.2


class Regression(nn.Module):
    """The odd model with a loss, as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.net = odd_model()

    def forward(self, x, labels):
        return {"loss": (self.net(x) - labels).square().mean()}


def examples(ranks_of_data=1):
    """A data set in which every batch is the same one, so that the order cannot matter."""
    x, y = batch(0)
    return [{"x": x[i % 12], "labels": y[i % 12]} for i in range(12 * STEPS * ranks_of_data)]


def arguments(folder, **kwargs):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 12,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


def by_hand():
    """The same training as a loop: parameters and the norm of every step."""
    model = Regression()
    named = trained(model)
    decayed = [p for name, p in named.items() if "bias" not in name and "model.5" not in name]
    kept = [p for name, p in named.items() if "bias" in name or "model.5" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept}]
    optimizer = LoFTAdamW(model, lr=1e-3, max_grad_norm=CLIP, params=groups)
    norms = []
    for _ in range(STEPS):
        x, y = batch(0)
        model(x, y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.grad_norm)
    assert min(norms) > CLIP, "clipping is not active"
    return {name: p.detach() for name, p in trained(model).items()}, norms


class Unshuffled:
    """The data set is one batch over and over."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class InOrder(Unshuffled, LoFTTrainer):
    """Ours."""


class PlainInOrder(Unshuffled, Trainer):
    """Somebody else's."""


def logged_norms(trainer):
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def test_equals_a_loop_by_hand(tmp_path):
    trainer = InOrder(model=Regression(), args=arguments(tmp_path), train_dataset=examples())
    trainer.train()
    params, norms = by_hand()
    assert logged_norms(trainer) == pytest.approx(norms, rel=1e-6)  # the log prints float32
    for name, p in trained(trainer.model).items():
        # The Trainer's averaging of the loss over items rounds once more than the loop's.
        assert relative(p.detach(), params[name]) < 1e-5, name


def test_off_is_the_trainers_own_optimizer(tmp_path):
    trainer = InOrder(model=Regression(), args=arguments(tmp_path), train_dataset=examples(), use_loft=False)
    trainer.train()
    assert "AdamW" in type(trainer.optimizer.optimizer).__name__
    assert not isinstance(trainer.optimizer.optimizer, LoFTAdamW)


def test_a_second_optimizer_is_refused(tmp_path):
    model = Regression()
    with pytest.raises(ValueError, match="pass loft_kwargs"):
        LoFTTrainer(model=model, args=arguments(tmp_path), optimizers=(LoFTAdamW(model), None))


def under_deepspeed(rank, world, kind, stage, folder):
    """Train with one of three Trainers under DeepSpeed: its parameters and logged norms, or the error."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    model = Regression()
    args = arguments(folder, deepspeed=config)
    if kind == "dropped":
        trainer = PlainInOrder(model=model, args=args, train_dataset=examples(), optimizers=(LoFTAdamW(model), None))
    elif kind == "factory":
        kwargs = {"lr": 1e-3, "weight_decay": 0.1}
        trainer = PlainInOrder(
            model=model, args=args, train_dataset=examples(), optimizer_cls_and_kwargs=(LoFT, kwargs)
        )
    else:
        trainer = InOrder(model=model, args=args, train_dataset=examples())
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    return logged_norms(trainer)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_under_deepspeed_the_norm_is_lofts(ranks, stage, tmp_path):
    (norms,) = ranks(1)(under_deepspeed, "loft", stage, tmp_path)
    _, expected = by_hand()
    assert norms == pytest.approx(expected, rel=1e-5)  # float32, a loss averaged in another order


def test_factory_in_a_plain_trainer(ranks, tmp_path):
    (norms,) = ranks(1)(under_deepspeed, "factory", 2, tmp_path)
    _, expected = by_hand()
    assert norms[0] == pytest.approx(expected[0], rel=1e-5)  # its weight decay has other groups, so only the first


def test_a_trainer_that_drops_loft_is_found_out(ranks, tmp_path):
    (said,) = ranks(1)(under_deepspeed, "dropped", 2, tmp_path)
    assert "LoFTAdamW was swapped out" in said
    assert "optimizers=(LoFTAdamW, ...)) is ignored under DeepSpeed" in said


def interrupted(rank, world, stage, folder, resume, steps=STEPS, best=False, every=2, bf16=False, more=None):
    """A Trainer that saves every so many steps; with ``resume`` it goes on from the last whole checkpoint.

    Under a stage of DeepSpeed, or in plain torch where it is None.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(stage is not None).lower()
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": "auto"},
        **(more or {}),
    }
    kwargs = {"save_strategy": "steps", "save_steps": every, "max_steps": steps, "bf16": bf16}
    if stage is not None:
        kwargs["deepspeed"] = config
    if best:
        kwargs |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    # A schedule that is still moving where the first run stops, and does not depend on where.
    kwargs |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": STEPS}
    args = arguments(folder, **{**kwargs, "per_device_train_batch_size": 12 // world})
    data = examples()
    trainer = InOrder(model=Regression(), args=args, train_dataset=data, eval_dataset=data[:12])
    result = trainer.train(resume_from_checkpoint=resume)
    params = {}
    import deepspeed

    for name, p in trained(trainer.model).items():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            params[name] = p.detach().clone()
    return params, logged_norms(trainer), trainer.state.best_model_checkpoint, result.global_step


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_ordinary_resume_is_bitwise(ranks, stage, bf16, tmp_path):
    """With either factor's turn next."""
    whole, norms, _, _ = ranks(1)(interrupted, stage, tmp_path / "whole", None, every=1, bf16=bf16)[0]
    for first in (3, 4):
        cut, name = tmp_path / f"cut{first}", f"checkpoint-{first}"
        shutil.copytree(tmp_path / "whole" / name, cut / name)
        (cut / "checkpoint-6").mkdir()  # as a crash in the middle of a save would leave it
        resumed, rest, _, _ = ranks(1)(interrupted, stage, cut, True, bf16=bf16)[0]
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        assert rest == norms  # the log before the interruption comes back with the Trainer's state


def started_again(rank, world, stage, folder, steps):
    with pytest.warns(UserWarning, match="nothing is left to train: the checkpoint is of step 4"):
        return interrupted(rank, world, stage, folder, True, steps=steps)


@pytest.mark.parametrize("steps", [4, 3], ids=["the same", "fewer"])
@pytest.mark.parametrize("stage", [None, 2])
def test_a_finished_run_takes_no_further_step(ranks, stage, steps, tmp_path):
    """Where Slurm or a user starts the command once more; the last step is not an epoch's last."""
    ended, norms, _, _ = ranks(1)(interrupted, stage, tmp_path, None, steps=4)[0]
    again, rest, _, step = ranks(1)(started_again, stage, tmp_path, steps)[0]
    assert step == 4
    assert rest == norms
    assert all(torch.equal(again[name], ended[name]) for name in ended)


def fail_at_the_last_file(rank, world, folder):
    """The second rank cannot write its random state, which is the last that a checkpoint has of it."""
    save = Trainer._save_rng_state

    def save_or_fail(self, output_dir):
        if rank == 1 and self.state.global_step == 4:
            raise OSError("no space left")
        save(self, output_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", save_or_fail)
        with pytest.raises((OSError, CheckpointError), match="no space left"):
            interrupted(rank, world, None, folder, None)


def test_a_checkpoint_is_whole_once_all_ranks_have_written_theirs(ranks, tmp_path):
    """Only then does the first rank write the Trainer's state, which marks it, and delete the checkpoint before."""
    ranks(2)(fail_at_the_last_file, tmp_path)
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    assert (tmp_path / "checkpoint-4").exists()
    assert not (tmp_path / "checkpoint-4" / "trainer_state.json").exists()


@pytest.mark.parametrize(("saved", "stage"), [(3, 2), (2, None), (None, 2), (None, None)])
def test_ordinary_resume_on_other_ranks_and_stage(ranks, saved, stage, tmp_path):
    """Also from DeepSpeed to plain torch (None) and back, with moments and schedule, or the norms would differ."""
    whole, norms, _, _ = ranks(1)(interrupted, stage, tmp_path / "whole", None)[0]
    ranks(2)(interrupted, saved, tmp_path / "cut", None, steps=4)
    resumed, rest, _, _ = ranks(1)(interrupted, stage, tmp_path / "cut", True)[0]
    assert rest == pytest.approx(norms, rel=1e-5)  # sums over two ranks, in another order
    for name in whole:
        assert relative(resumed[name], whole[name]) < 1e-5, name  # the same


@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_without_lofts_state_is_refused(ranks, named, tmp_path):
    """The Trainer passes over an optimizer's state that is not there, and would go on with empty moments. Nor may a job
    begin anew because its last checkpoint is of another kind."""
    ranks(1)(interrupted, None, tmp_path, None, steps=4)
    folder = tmp_path / "checkpoint-4"
    (folder / "latest").unlink()
    with pytest.raises(RuntimeError, match="checkpoint-4 holds no whole checkpoint"):
        ranks(1)(interrupted, None, tmp_path, str(folder) if named else True)


def test_another_kind_of_schedule_is_refused(ranks, tmp_path):
    """One in the DeepSpeed JSON would begin anew where the Trainer's was saved."""
    ranks(1)(interrupted, None, tmp_path, None, steps=4)
    warm_up = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}
    with pytest.raises(RuntimeError, match=r"its schedule is one of the Trainer, this run's of the DeepSpeed JSON"):
        ranks(1)(interrupted, 2, tmp_path, True, more=warm_up)


class Terminated(TrainerCallback):
    """SIGTERM comes in the third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_when_the_step_ends_and_stops(tmp_path):
    before, stopper = signal.getsignal(signal.SIGTERM), SaveOnSIGTERM()
    callbacks = [stopper, Terminated()]
    trainer = InOrder(model=Regression(), args=arguments(tmp_path), train_dataset=examples(), callbacks=callbacks)
    trainer.train()
    assert (trainer.state.global_step, stopper.sent_to) == (3, 0)
    assert trainer.last_checkpoint() == str(tmp_path / "checkpoint-3")
    assert signal.getsignal(signal.SIGTERM) is before


def test_folders_of_each_node_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leave save_on_each_node out"):
        LoFTTrainer(model=Regression(), args=arguments(tmp_path, save_on_each_node=True))


@pytest.mark.parametrize("stage", [None, 2])
def test_best_model_at_end(ranks, stage, tmp_path):
    """What is loaded at the end is the best checkpoint's weights, in master weights and model alike."""
    params, _, best, _ = ranks(1)(interrupted, stage, tmp_path, None, best=True)[0]
    from safetensors.torch import load_file

    saved = load_file(next((Path(best) / f"global_step{STEPS}").glob("rank-*")))
    for name, p in params.items():
        assert torch.equal(saved[f"{name}|values"].view(p.shape), p), name


@pytest.mark.parametrize("name", ["scheduler.pt", "global_step4/manifest.json"])
def test_pickles_in_a_trainers_checkpoint_never_run(ranks, tmp_path, name):
    ranks(1)(interrupted, 2, tmp_path / "cut", None, steps=4)
    sentinel = tmp_path / "ran"
    torch.save(Bomb(sentinel), tmp_path / "cut" / "checkpoint-4" / name)
    with pytest.raises(RuntimeError, match=r"weights_only|manifest\.json: is damaged"):
        ranks(1)(interrupted, 2, tmp_path / "cut", True)
    assert not sentinel.exists()


def saved_after_evaluation(rank, world, model, folder):
    """A model that stage 3 shards while it loads, evaluated and saved every second step: the adapter's shapes."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # So small that some factors are fetched ahead and not kept.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 150, "stage3_prefetch_bucket_size": 921}
    settings = {"train_micro_batch_size_per_gpu": "auto", "zero_allow_untested_optimizer": True}
    each_second = {f"{what}_strategy": "steps" for what in ("eval", "save")} | {"eval_steps": 2, "save_steps": 2}
    args = arguments(
        folder,
        deepspeed=settings | {"zero_optimization": zero},
        max_steps=4,
        per_device_train_batch_size=2,
        eval_on_start=True,
        **each_second,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.arange(16)
    data = [{"input_ids": ids + i, "labels": ids + i} for i in range(16)]
    LoFTTrainer(model=model, args=args, train_dataset=data, eval_dataset=data[:4]).train()
    saved = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
    return {name: tuple(t.shape) for name, t in saved.items()}


def test_saving_right_after_an_evaluation_at_stage_3(ranks, tmp_path):
    """DeepSpeed leaves parameters in flight then, and refuses to gather any of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=6, tie_word_embeddings=True, **size)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    shapes, other = ranks(2)(saved_after_evaluation, tmp_path / "model", tmp_path / "run")
    assert shapes == other
    assert len(shapes) == 6 * 7 * 2
    assert all(min(shape) == 4 for shape in shapes.values()), "empty or partial tensors"
