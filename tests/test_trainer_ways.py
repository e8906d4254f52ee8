"""What else a Trainer does with its optimizer: each way is LoFT's loop by hand, in weights and state, or refused."""

from types import SimpleNamespace

import pytest
import torch
from launch_helpers import make_model
from models import batch, trained
from test_examples import PACKAGES
from test_trainer import CLIP, InOrder, PlainInOrder, Regression, arguments
from transformers import TrainerCallback, get_scheduler
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend
from transformers.trainer_utils import SchedulerType

from loft_ds import LoFT, LoFTAdamW, LoFTMixin

STEPS, SIZE = 6, 12
X, Y = (torch.cat(parts) for parts in zip(*(batch(step) for step in range(2 * STEPS)), strict=True))
DATA = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
# Trainers that are LoFT's by their class, and another's by what is handed to it.
KINDS = {"LoFTTrainer": (InOrder, {}), "factory": (PlainInOrder, {"optimizer_cls_and_kwargs": (LoFT, {})})}
both = pytest.mark.parametrize("kind", KINDS)


def train_with(kind, folder, model=None, more=None, **options):
    """A Trainer that has trained over batches in which the loss and its gradients differ."""
    of_kind, way = KINDS[kind]
    more = way | (more or {})
    if "model_init" not in more:
        more["model"] = model or Regression()
    trainer = of_kind(args=arguments(folder, **options), train_dataset=DATA, eval_dataset=DATA[:SIZE], **more)
    if "model_init" not in more:
        trainer.train()
    return trainer


def by_hand(rates=(1e-3,) * STEPS, clip=CLIP, batches=None, model=None):
    """The same as a loop: the optimizer after its steps. Clipping is active in each of them."""
    model = model or Regression()
    named = trained(model)
    kept = [p for name, p in named.items() if "bias" in name or "model.5" in name]  # biases and norms
    decayed = [p for p in named.values() if all(p is not each for each in kept)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = LoFTAdamW(model, max_grad_norm=clip, params=groups)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = batches[step] if batches else slice(SIZE * step, SIZE * (step + 1))
        optimizer.zero_grad()
        model(X[rows], Y[rows])["loss"].backward()
        optimizer.step()
        assert optimizer.grad_norm > clip
    return optimizer


def assert_same(trainer, expected):
    """Weights, moments and counters: the Trainer averages its loss in another order, so all but the last bits."""
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is LoFTAdamW
    assert optimizer.max_grad_norm == expected.max_grad_norm
    for (name, p), q in zip(trained(trainer.model).items(), trained(expected.model).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    for name, state in expected.state.items():
        assert optimizer.state[name]["step"] == state["step"] if "step" in state else True
        if "second_moment" in state:  # in coordinates that are one of many: what does not depend on them
            for kind in ("momentum", "second_moment"):
                own, other = (each[name][kind].norm() for each in (optimizer.state, expected.state))
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-9, msg=f"{name} {kind}")


# --- optimizer_cls_and_kwargs


@both
@pytest.mark.parametrize("accumulation", [1, 3])
def test_both_ways_are_a_loop_by_hand(kind, accumulation, tmp_path):
    sizes = {"per_device_train_batch_size": SIZE // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = train_with(kind, tmp_path, **sizes)
    assert_same(trainer, by_hand())
    assert trainer.args.max_grad_norm == CLIP  # what the user has said stands


def test_a_step_that_fails_leaves_the_arguments_alone(tmp_path):
    """They may be another Trainer's next, which would not clip."""
    args = arguments(tmp_path)

    class Failing(PlainInOrder):
        def training_step(self, *given, **named):
            if self.state.global_step == 2:
                raise ArithmeticError("a step failed")
            return super().training_step(*given, **named)

    trainer = Failing(model=Regression(), args=args, train_dataset=DATA, optimizer_cls_and_kwargs=(LoFT, {}))
    with pytest.raises(ArithmeticError, match="a step failed"):
        trainer.train()
    assert args.max_grad_norm == CLIP


def test_without_a_norm_nobody_clips(tmp_path):
    trainer = train_with("factory", tmp_path, max_grad_norm=0.0)
    expected = by_hand(clip=1e-9)  # clips always, by nothing that changes a step of AdamW's but eps
    assert trainer.optimizer.optimizer.max_grad_norm is None
    factor = next(name for name in expected.state if "lora_A" in name)
    moments = trainer.optimizer.optimizer.state[factor]["momentum"].norm(), expected.state[factor]["momentum"].norm()
    assert moments[0] > 1e3 * moments[1]


def test_the_dictionary_is_in_place_of_the_arguments(tmp_path):
    chosen = {"optimizer_cls_and_kwargs": (LoFT, {"lr": 2e-3, "max_grad_norm": CLIP / 2})}
    trainer = train_with("factory", tmp_path, more=chosen)
    assert_same(trainer, by_hand([2e-3] * STEPS, CLIP / 2))


def test_without_a_model_and_with_settings_it_is_no_factory():
    """As where a program builds its optimizer from parameters: LoFT(params=...)."""
    with pytest.raises(TypeError, match=r"built from the model, not from params, lr alone: LoFT\(model, lr="):
        LoFT(params=[torch.zeros(1, requires_grad=True)], lr=1e-3)


def test_outside_a_trainer_it_builds_loft_alone(tmp_path):
    optimizer = LoFT()(Regression(), lr=2e-3)
    assert (optimizer.defaults["lr"], optimizer.max_grad_norm, len(optimizer.param_groups)) == (2e-3, None, 1)
    with pytest.raises(ValueError, match=r"no transformers\.Trainer calls"):  # whose clipping could be held
        LoFT()(Regression(), arguments(tmp_path))


# A DeepSpeed JSON that says no norm.
SILENT = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}


def silent_json(rank, world, folder):
    """LoFT's norm in somebody else's Trainer, and the one of the first step."""
    trainer = train_with("factory", folder, deepspeed=dict(SILENT), max_steps=1)
    loft = trainer.optimizer.optimizer.optimizer
    return loft.max_grad_norm, loft.grad_norm


def test_a_json_that_is_silent_leaves_the_norm_to_the_arguments(ranks, tmp_path):
    ((norm, found),) = ranks(1)(silent_json, tmp_path)
    assert norm == CLIP
    assert found == pytest.approx(by_hand([1e-3]).grad_norm, rel=1e-5)


def test_an_optimizer_that_is_passed_warns_of_the_other_clipping(tmp_path):
    """Nothing can be taken over there: the Trainer is not known."""
    model = Regression()
    way = {"optimizers": (LoFTAdamW(model, lr=1e-3), None), "model": model}
    trainer = PlainInOrder(args=arguments(tmp_path), train_dataset=DATA, **way)
    with pytest.warns(UserWarning, match=rf"factors' own gradients was {CLIP} in 6 steps.*max_grad_norm=0\.0"):
        trainer.train()


QUESTIONS = [f"{a} times {b}?" for a in range(3, 9) for b in range(3, 9)]
TRL = {
    "SFT": ({"completion": " It is so."}, {"task_type": "CAUSAL_LM"}),
    "Reward": ({"chosen": " It is so.", "rejected": " No."}, {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}),
}


@pytest.mark.rehearse
@pytest.mark.parametrize("name", TRL)
def test_trls_trainers_take_the_factory(name, tmp_path, monkeypatch):
    """To a bit as those that are LoFT's by their class, with clipping in each step."""
    if not PACKAGES["trl"].is_dir():
        pytest.skip(f"tests/trl.txt is not installed in {PACKAGES['trl']}: run make setup")
    monkeypatch.syspath_prepend(PACKAGES["trl"])
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    columns, adapter = TRL[name]
    theirs, of_args = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    ours = type("Ours", (LoFTMixin, theirs), {})
    data = Dataset.from_list([{"prompt": question, **columns} for question in QUESTIONS])
    model = make_model(tmp_path / "model")
    options = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1e-2, "max_steps": STEPS, "bf16": False}
    options |= {"save_strategy": "no", "use_cpu": True, "report_to": "none", "logging_steps": 1, "disable_tqdm": True}
    optimizers = []
    for kind, way in ((ours, {}), (theirs, {"optimizer_cls_and_kwargs": (LoFT, {})})):
        config = LoraConfig(r=4, target_modules="all-linear", **adapter)
        args = of_args(output_dir=str(tmp_path), **options)
        trainer = kind(model=str(model), args=args, train_dataset=data, peft_config=config, **way)
        trainer.train()
        optimizers.append(trainer.optimizer.optimizer)
        assert optimizers[-1].grad_norm > 1e-2
    first, second = optimizers
    assert all(map(torch.equal, trained(first.model).values(), trained(second.model).values()))
    for key, state in first.state.items():
        assert {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}.items() <= second.state[key].items()
        assert all(torch.equal(v, second.state[key][k]) for k, v in state.items() if isinstance(v, torch.Tensor))


# --- more than one training


@both
def test_training_again_goes_on(kind, tmp_path):
    trainer = train_with(kind, tmp_path)
    trainer.train()  # over the same data, as the Trainer begins anew with that
    each = [slice(SIZE * step, SIZE * (step + 1)) for step in range(STEPS)]
    assert_same(trainer, by_hand([1e-3] * 2 * STEPS, batches=each + each))


class Crowded(Regression):
    """Lacks memory for more than ten rows, in the second step and from then on."""

    def forward(self, x, labels):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 1 and len(x) > 10:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(x, labels)


@both
def test_a_smaller_batch_goes_on_where_the_memory_ended(kind, tmp_path):
    """The Trainer counts from 0 again and keeps weights and optimizer, so one step more has been made."""
    trainer = train_with(kind, tmp_path, Crowded(), auto_find_batch_size=True)
    assert trainer._train_batch_size == 10  # 0.9 of 12
    rows = [slice(0, SIZE), *(slice(10 * step, 10 * (step + 1)) for step in range(STEPS))]
    assert_same(trainer, by_hand([1e-3] * (STEPS + 1), batches=rows))


def crowded_under_deepspeed(rank, world, kind, folder):
    trainer = train_with(kind, folder, Crowded(), deepspeed=dict(SILENT), auto_find_batch_size=True)
    return {name: p.detach().clone() for name, p in trained(trainer.model).items()}


@both
def test_under_deepspeed_a_smaller_batch_begins_with_new_moments(kind, ranks, tmp_path):
    """The Trainer builds the engine anew, and with it the optimizer of the weights as they are by then."""
    (found,) = ranks(1)(crowded_under_deepspeed, kind, tmp_path)
    before = by_hand([1e-3])
    rows = [slice(10 * step, 10 * (step + 1)) for step in range(STEPS)]
    after = by_hand(batches=rows, model=before.model)
    for name, p in trained(after.model).items():
        torch.testing.assert_close(found[name], p, rtol=1e-4, atol=1e-6, msg=name)  # sums in another order


class InTurn:
    """A search that tries given values one after the other, in Optuna's place."""

    trials = ({"learning_rate": 2e-3, "max_grad_norm": 0.1}, {"learning_rate": 5e-4, "max_grad_norm": 0.3})

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, check):
        for number, values in enumerate(self.trials[:n_trials]):
            trainer.train(trial=SimpleNamespace(number=number, params=values))
            check(values)


@pytest.fixture
def search(monkeypatch):
    """Called with a Trainer, and what to check after each trial."""
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, InTurn)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    return lambda trainer, check: trainer.hyperparameter_search(
        lambda trial: trial.params, n_trials=len(InTurn.trials), backend="optuna", check=check
    )


@both
def test_a_search_tries_what_it_says(kind, tmp_path, search):
    trainer = train_with(kind, tmp_path, more={"model_init": Regression})
    checked = []

    def check(values):
        checked.append(values)
        assert_same(trainer, by_hand([values["learning_rate"]] * STEPS, values["max_grad_norm"]))

    search(trainer, check)
    assert checked == list(InTurn.trials)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("LoFTTrainer", {"loft_kwargs": {"lr": 1e-3}}), ("factory", {"optimizer_cls_and_kwargs": (LoFT, {"lr": 1e-3})})],
)
def test_a_search_over_what_is_fixed_is_refused(kind, more, tmp_path, search):
    trainer = train_with(kind, tmp_path, more=more | {"model_init": Regression})
    with pytest.raises(ValueError, match="the search tries values of learning_rate, and LoFT's own argument 'lr'"):
        search(trainer, print)


# --- schedules


WHAT_IT_NEEDS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
BY_METRIC = {
    "reduce_lr_on_plateau": {"patience": 0, "threshold": 0.5},
    "greedy": {"patience": 0, "factor": 0.5, "min_lr": 1e-5},
}


@pytest.mark.parametrize("schedule", [s.value for s in SchedulerType if s.value not in BY_METRIC])
def test_every_schedule_is_lofts(schedule, tmp_path):
    needs = WHAT_IT_NEEDS.get(schedule, {})
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = get_scheduler(schedule, stand_in, 2, STEPS, scheduler_specific_kwargs=needs)
    rates = []
    for _ in range(STEPS):
        rates.append(stand_in.param_groups[0]["lr"])
        stand_in.step()
        scheduler.step()
    assert len(set(rates)) > 1 or schedule == "constant"
    options = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": needs, "warmup_steps": 2}
    trainer = train_with("LoFTTrainer", tmp_path, **options)
    assert_same(trainer, by_hand(rates))


@pytest.mark.parametrize("schedule", [s.value for s in SchedulerType if s.value in BY_METRIC])
def test_schedules_that_wait_for_a_metric_are_lofts(schedule, tmp_path):
    options = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": BY_METRIC[schedule]}
    trainer = train_with("LoFTTrainer", tmp_path, eval_strategy="steps", eval_steps=1, **options)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(set(rates)) > 1
    assert_same(trainer, by_hand(rates))


# --- what changes the model


@both
def test_a_compiled_model_is_lofts(kind, tmp_path):
    """Traced, and run without generated code: compiling that takes longer than all other tests here."""
    trainer = train_with(kind, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert_same(trainer, by_hand())


class SeedEachStep(TrainerCallback):
    """So that noise is the same in any loop."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


@both
def test_noise_on_embeddings_is_lofts(kind, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations.neftune import activate_neftune

    def build():
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **size))
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))

    ids = torch.randint(32, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0))
    of_kind, way = KINDS[kind]
    args = arguments(tmp_path, neftune_noise_alpha=5.0, per_device_train_batch_size=4, weight_decay=0.0)
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = of_kind(model=build(), args=args, train_dataset=data, callbacks=[SeedEachStep()], **way)
    trainer.train()

    def loop(noisy):
        model = build()
        if noisy:
            activate_neftune(model, 5.0)
        optimizer = LoFTAdamW(model, lr=1e-3, max_grad_norm=CLIP)
        for step, rows in enumerate(ids.split(4)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
        return optimizer

    assert_same(trainer, loop(noisy=True))
    with pytest.raises(AssertionError):
        assert_same(trainer, loop(noisy=False))
