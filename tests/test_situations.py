"""Situations that DeepSpeed knows, with LoFT and with AdamW side by side.

Each is run with both on two ranks, and each must end where the same steps in plain torch end. That AdamW does shows
that the expectation is DeepSpeed's. Where LoFT raises by design, the test has what it says next to what AdamW does.
"""

from __future__ import annotations

import gc
import re
from contextlib import nullcontext

import pytest
import torch
from models import batch, odd_model, relative, trained
from peft import LoraConfig, get_peft_model
from torch import nn

from loft_ds import LoFTAdamW

LR = 1e-2
# Far above the default of 1e-8, of the size of small gradients: a step tells then how gradients were scaled.
EPS = 0.03
# Of the change of all parameters. Only the order of float32 sums may differ. LoFT's second moment of an entry is a
# quadratic form, which keeps less of a small one: 6e-5 at worst, in three steps from each of 40 batches.
TOLERANCE = {"adamw": 1e-5, "loft": 5e-4}
# Of 11 bits each, parameters and gradients leave 0.8% of a change of some per cent.
TOLERANCE_FP16 = 0.03


def at(*stages):
    """Both optimizers at some stages."""
    return pytest.mark.parametrize(("kind", "stage"), [(kind, stage) for stage in stages for kind in TOLERANCE])


def ways(**stages):
    """Both optimizers, in each way of a situation at the stages that have it."""
    listed = [(way, kind, stage) for way in stages for stage in stages[way] for kind in TOLERANCE]
    return pytest.mark.parametrize(("way", "kind", "stage"), listed)


def build(kind, model, params=None, **settings):
    settings = {"lr": LR, "eps": EPS, "weight_decay": 0.0, **settings}
    if kind == "loft":
        return LoFTAdamW(model, params=params, **settings)
    return torch.optim.AdamW(list(trained(model).values()) if params is None else params, **settings)


# --- what is run on ranks


class Rank:
    """One rank in a situation: its engines, and its part of every batch."""

    def __init__(self, rank, world, kind, stage):
        self.rank, self.world, self.kind, self.stage = rank, world, kind, stage
        self.engines = []

    def engine(self, model=None, client=None, *, kind=None, zero=None, initialize=None, **config):
        """An engine on a new model, of the situation's optimizer, where nothing else is said."""
        import deepspeed

        model = odd_model() if model is None else model
        settings = {
            "train_micro_batch_size_per_gpu": 12 // self.world,
            "gradient_clipping": 0.0,  # its default is 1.0
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": self.stage, **(zero or {})},
            **config,
        }
        client = build(kind or self.kind, model) if client is None else client
        engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=settings, **(initialize or {}))
        self.engines.append(engine)
        return engine

    def part(self, number):
        """This rank's part of a batch."""
        size = 12 // self.world
        return (t[self.rank * size : (self.rank + 1) * size] for t in batch(number))

    def loss(self, engine, number, *args):
        """Of this rank's part of a batch. ``args`` are the model's."""
        x, y = self.part(number)
        return (engine(x.to(engine.get_data_types()[0]), *args).float() - y).square().mean()

    def train(self, engine, *numbers):
        """A step on each of these batches."""
        for number in numbers:
            engine.backward(self.loss(engine, number))
            engine.step()

    def params(self, engine):
        """All parameters, whole, the frozen ones too."""
        import deepspeed

        params = dict(engine.module.named_parameters())
        sharded = engine.zero_optimization_stage() == 3
        with deepspeed.zero.GatheredParameters(list(params.values()), enabled=sharded):
            return {name: p.detach().float().clone() for name, p in params.items()}

    def destroy(self, engine):
        self.engines.remove(engine)
        engine.destroy()


def act(rank, world, situation, kind, stage, *args):
    """What a situation returns on one rank."""
    gc.freeze()  # LoFT looks for its engine among all that may be garbage: spare it the objects of the imports
    here = Rank(rank, world, kind, stage)
    try:
        return situation(here, *args)
    finally:
        for engine in here.engines:
            engine.destroy()
        gc.unfreeze()


def message(function, *args, **kwargs):
    """The error that a call ends with, on all ranks alike."""
    try:
        function(*args, **kwargs)
    except Exception as error:  # whatever it is, the test reads it
        return f"{type(error).__name__}: {error}"
    return "no error"


# --- the same in plain torch


class ByHand:
    """A loop in one process without DeepSpeed."""

    def __init__(self, kind, model=None, scale=1.0):
        self.model = odd_model() if model is None else model
        self.optimizer = build(kind, self.model)
        self.scale = scale

    def step(self, *numbers, args=(), unused=None, **changed):
        """One step on the mean loss of some batches, with changed settings of the optimizer.

        ``args`` are the model's. ``unused`` is what fills in the gradient of a parameter that has none.
        """
        for group in self.optimizer.param_groups:
            group.update(changed)
        for number in numbers:
            x, y = batch(number)
            (self.scale * (self.model(x, *args) - y).square().mean() / len(numbers)).backward()
        for p in trained(self.model).values():
            if p.grad is None and unused is not None:
                p.grad = unused(p)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def params(self):
        return params_of(self.model)


def params_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(kind, *steps, rates=None, **kwargs):
    """The parameters after steps, each on a list of batches and at a learning rate."""
    run = ByHand(kind, **kwargs)
    for numbers, rate in zip(steps, rates or [LR] * len(steps), strict=True):
        run.step(*numbers, lr=rate)
    return run.params


def assert_moved(found, expected, tolerance, start=None):
    """All ranks have the same parameters, and from the start on these have moved as expected."""
    start = params_of(odd_model()) if start is None else start
    for params in found[1:]:
        for name in expected:
            assert torch.equal(params[name], found[0][name]), f"{name} differs between ranks"
    ours, theirs = (torch.cat([(p[name] - start[name]).reshape(-1) for name in start]) for p in (found[0], expected))
    assert theirs.norm() > 0, "nothing is expected to move"
    assert relative(ours, theirs) < tolerance


# --- whose optimizer, and how it comes


def handed_over(r, way):
    model = odd_model()
    given = list(trained(model).values())
    if way == "callable":
        engine = r.engine(model, lambda _: build(r.kind, model))
    elif way == "callable_of_params":
        initialize = {"model_parameters": iter(given)}
        engine = r.engine(model, lambda params: build(r.kind, model, params), initialize=initialize)
    else:  # both of these give way to the optimizer that is handed over
        adam = {"type": "Adam", "params": {"lr": 1.0, "torch_adam": True}}
        engine = r.engine(model, initialize={"model_parameters": given[:3]}, optimizer=adam)
    r.train(engine, 0, 1)
    return r.params(engine)


@ways(callable=(0, 2), callable_of_params=(1, 3), first_of_all=(0, 3))
def test_an_optimizer_that_is_handed_over(ranks, way, kind, stage):
    """An object or a callable; the JSON's section and ``model_parameters`` do not count beside an object."""
    assert_moved(ranks(2)(act, handed_over, kind, stage, way), by_hand(kind, [0], [1]), TOLERANCE[kind])


def all_parameters(r):
    model = odd_model()
    return message(r.engine, model, lambda params: build(r.kind, model, params))


@at(2)
def test_a_callable_is_handed_the_frozen_parameters_too(ranks, kind, stage):
    """Unless ``model_parameters`` says which. AdamW holds them and never moves them."""
    said = {
        "adamw": "no error",
        "loft": "ValueError: params must be the model's trainable parameters: 0 of them are missing and 6 others are",
    }[kind]
    assert all(each.startswith(said) for each in ranks(2)(act, all_parameters, kind, stage))


def untested(r):
    return message(r.engine, zero_allow_untested_optimizer=False)


@at(1, 3)
def test_untested_optimizers(ranks, kind, stage):
    said = {"adamw": "no error", "loft": 'AssertionError.*"zero_allow_untested_optimizer": true'}[kind]
    for each in ranks(2)(act, untested, kind, stage):
        assert re.match(said, each), each


# --- learning rates


def falling(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def on_plateaus(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


WARMUP = {"warmup_min_lr": 0.0, "warmup_max_lr": LR, "warmup_num_steps": 4, "warmup_type": "linear"}
ONE_CYCLE = {"cycle_min_lr": LR / 4, "cycle_max_lr": LR, "cycle_first_step_size": 2, "decay_mom_rate": 0.0}
# By way: where the schedule stands, and in units of LR the rates of the first steps.
SCHEDULES = {
    "object": (lambda optimizer: {"initialize": {"lr_scheduler": falling(optimizer)}}, [1, 1 / 2, 1 / 3, 1 / 4]),
    "callable": (lambda _: {"initialize": {"lr_scheduler": falling}}, [1, 1 / 2, 1 / 3, 1 / 4]),
    "metrics": (lambda optimizer: {"initialize": {"lr_scheduler": on_plateaus(optimizer)}}, [1, 1, 1 / 2, 1 / 4]),
    "WarmupLR": (lambda _: {"scheduler": {"type": "WarmupLR", "params": WARMUP}}, [0, 0, 1 / 4, 1 / 2]),
    "OneCycle": (lambda _: {"scheduler": {"type": "OneCycle", "params": ONE_CYCLE}}, [1 / 4, 5 / 8, 1, 5 / 8]),
}
# OneCycle moves the first beta the other way.
BETAS = {"OneCycle": [(0.8, 0.99), (0.85, 0.99), (0.8, 0.99), (0.85, 0.99)]}


def scheduled(r, way):
    model = odd_model()
    optimizer = build(r.kind, model)
    place, _ = SCHEDULES[way]
    engine = r.engine(model, optimizer, **place(optimizer))
    seen = []
    for number in range(4):
        (group,) = optimizer.param_groups
        seen.append((group["lr"], group["betas"]))
        assert engine.get_lr() == [group["lr"]]
        engine.backward(r.loss(engine, number))
        engine.step(lr_kwargs={"metrics": 1.0} if way == "metrics" else None)
    return r.params(engine), seen


@ways(object=(1,), callable=(0, 2), metrics=(2,), WarmupLR=(0, 3), OneCycle=(1,))
def test_schedules(ranks, way, kind, stage):
    """A client's schedule, a callable's or the JSON's reaches the groups, and the steps are taken with it."""
    outcomes = ranks(2)(act, scheduled, kind, stage, way)
    run = ByHand(kind)
    expected = list(zip(SCHEDULES[way][1], BETAS.get(way, [(0.9, 0.999)] * 4), strict=True))
    for number, (rate, betas) in enumerate(expected):
        run.step(number, lr=rate * LR, betas=betas)
    for _, seen in outcomes:
        assert [lr for lr, _ in seen] == pytest.approx([rate * LR for rate, _ in expected])
        assert [betas for _, betas in seen] == [pytest.approx(betas) for _, betas in expected]
    assert_moved([params for params, _ in outcomes], run.params, TOLERANCE[kind])


def rated(r):
    engine = r.engine()
    r.train(engine, 0)
    before = r.params(engine)
    for number, rate in enumerate((0.0, 0.5 * LR), start=1):
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        r.train(engine, number)
        if rate == 0:
            rested = r.params(engine)
    return r.params(engine), before, rested


def weights(params):
    """What the model computes with: each pair's product, and the rest as it is."""
    a = "lora_A"
    products = {n: params[n.replace(a, "lora_B")] @ p for n, p in params.items() if a in n}
    return {**products, **{n: p for n, p in params.items() if "lora_" not in n}}


@at(0, 2)
def test_a_rate_changed_by_hand(ranks, kind, stage):
    """Also to zero, which moves no weight but is a step: its gradient is in the moments afterwards."""
    outcomes = ranks(2)(act, rated, kind, stage)
    expected = by_hand(kind, [0], [1], [2], rates=[LR, 0.0, 0.5 * LR])
    assert_moved([params for params, *_ in outcomes], expected, TOLERANCE[kind])
    for _, *both in outcomes:
        before, after = (weights(params) for params in both)
        # LoFT gives a product its shortest factors, which leaves float32's rounding.
        assert max(relative(after[name], before[name]) for name in before) < 1e-6


# --- what else a loop does


def evaluated(r):
    engine = r.engine()
    losses = []
    for number in range(3):
        engine.backward(r.loss(engine, number))
        engine.eval()
        with torch.no_grad():
            losses.append(float(r.loss(engine, 10 + number)))
        engine.train()
        engine.step()
    return r.params(engine), losses


@at(0, 3)
def test_an_evaluation_in_between(ranks, kind, stage):
    """Even between backward and step; it sees the weights as they are."""
    outcomes = ranks(2)(act, evaluated, kind, stage)
    run = ByHand(kind)
    for number in range(3):
        x, y = batch(10 + number)
        expected = float((run.model(x) - y).square().mean().detach())
        assert sum(losses[number] for _, losses in outcomes) / 2 == pytest.approx(expected, rel=1e-4)
        run.step(number)
    assert_moved([params for params, _ in outcomes], run.params, TOLERANCE[kind])


def cleared_before(r):
    engine = r.engine()
    for number in range(2):
        engine.zero_grad()
        engine.optimizer.zero_grad()
        engine.basic_optimizer.zero_grad()
        r.train(engine, number)
    return r.params(engine)


@at(0, 2)
def test_gradients_cleared_before_a_backward_pass(ranks, kind, stage):
    assert_moved(ranks(2)(act, cleared_before, kind, stage), by_hand(kind, [0], [1]), TOLERANCE[kind])


def cleared_after(r):
    engine = r.engine()
    r.train(engine, 0)
    engine.backward(r.loss(engine, 1))
    engine.zero_grad()
    said = message(engine.step)
    r.train(engine, 2)
    return r.params(engine), said


@at(0, 1, 3)
def test_gradients_cleared_after_a_backward_pass(ranks, kind, stage):
    """At stage 0 there is nothing to step on then: AdamW rests, LoFT says so. The others have taken them by then."""
    outcomes = ranks(2)(act, cleared_after, kind, stage)
    expected = by_hand(kind, [0], *([] if stage == 0 else [[1]]), [2])
    assert_moved([params for params, _ in outcomes], expected, TOLERANCE[kind])
    for _, said in outcomes:
        if kind == "loft" and stage == 0:
            assert said.startswith("RuntimeError: no LoRA pair has a gradient")
            assert "Call backward() first" in said
        else:
            assert said == "no error"


class Branches(nn.Module):
    """Two layers, of which a forward pass may use one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x, which):
        return self.out(sum(torch.tanh(getattr(self, name)(x)) for name in which))


def branches():
    torch.manual_seed(0)
    model = get_peft_model(Branches(), LoraConfig(r=2, target_modules=["a", "b", "out"]))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.3)
    return model


# By stage. Stage 3 keeps an unused parameter's last gradient, where the others put zeros: there it may not have one.
USED = {0: ("a", "ab", "b", "ab"), 2: ("a", "ab", "b", "ab"), 3: ("a", "a", "ab")}


def partly_used(r):
    engine = r.engine(branches())
    for number, which in enumerate(USED[r.stage]):
        engine.backward(r.loss(engine, number, which))
        engine.step()
    return r.params(engine)


@at(*USED)
def test_parameters_that_a_forward_pass_leaves_out(ranks, kind, stage):
    """DeepSpeed fills zeros in, and with those they take the step."""
    run = ByHand(kind, branches())
    for number, which in enumerate(USED[stage]):
        run.step(number, args=(which,), unused=torch.zeros_like)
    assert_moved(ranks(2)(act, partly_used, kind, stage), run.params, TOLERANCE[kind], params_of(branches()))


def partly_frozen():
    """One pair and the module beside the pairs do not train."""
    model = odd_model()
    freeze(model, ".2.lora", ".5.")
    return model


def freeze(model, *parts):
    for name, param in model.named_parameters():
        if any(part in name for part in parts):
            param.requires_grad_(False)


def frozen(r, folder):
    engine = r.engine(partly_frozen())
    r.train(engine, 0, 1)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    engine = r.engine(partly_frozen())
    engine.load_checkpoint(folder, load_module_strict=False)
    r.train(engine, 2)
    return r.params(engine)


@at(0, 3)
def test_frozen_modules(ranks, tmp_path, kind, stage):
    """They stay, also where a checkpoint leaves them out."""
    found = ranks(2)(act, frozen, kind, stage, tmp_path)
    expected = by_hand(kind, [0], [1], [2], model=partly_frozen())
    assert_moved(found, expected, TOLERANCE[kind])
    for name, param in partly_frozen().named_parameters():
        assert param.requires_grad or torch.equal(found[0][name], param), name


def frozen_later(r, *parts):
    engine = r.engine()
    r.train(engine, 0)
    freeze(engine.module, *parts)
    said = message(r.train, engine, 1)
    return r.params(engine), said


@ways(pair=(0,), half=(0,))
def test_frozen_between_steps(ranks, way, kind, stage):
    """At stage 0 a pair rests, half a pair cannot. (The others' AdamW goes on to move what is frozen.)"""
    parts = {"pair": (".2.lora",), "half": (".2.lora_A",)}[way]
    outcomes = ranks(2)(act, frozen_later, kind, stage, *parts)
    if (way, kind) == ("half", "loft"):
        for _, said in outcomes:
            assert said.startswith("RuntimeError: of base_model.model.2.lora_A.default.weight and ")
            assert "only one has a gradient: LoFT moves a pair as one matrix. Freeze both or neither" in said
        return
    run = ByHand(kind)
    run.step(0)
    freeze(run.model, *parts)
    run.step(1)
    assert_moved([params for params, _ in outcomes], run.params, TOLERANCE[kind])


# --- accumulation and reduction

# Batches by step: not always as many.
STEPS = [[0, 1], [2], [3, 4, 5]]


def accumulated(r, way):
    unmanaged = {"managed_gradient_accumulation": False}
    config = {
        "unmanaged": unmanaged,
        "offloaded": {**unmanaged, "zero": {"offload_optimizer": {"device": "cpu"}}},
    }.get(way, {})
    engine = r.engine(**config)
    for numbers in STEPS:
        if way == "coalesced":
            with engine.coalesce_grad_reduction():
                for number in numbers:
                    engine.backward(r.loss(engine, number) / len(numbers))
        elif way == "one_backward":
            engine.backward(sum(r.loss(engine, number) for number in numbers) / len(numbers))
        else:
            *first, last = numbers
            for number in first:
                if way == "by_hand":
                    engine.set_gradient_accumulation_boundary(False)
                with engine.no_sync() if way == "no_sync" else nullcontext():
                    engine.backward(r.loss(engine, number) / len(numbers))
            if way == "by_hand":
                engine.set_gradient_accumulation_boundary(True)
            engine.backward(r.loss(engine, last) / len(numbers))
        engine.step()
    assert engine.global_steps == len(STEPS)
    return r.params(engine)


@ways(
    by_hand=(0, 2),
    unmanaged=(0, 1, 3),
    offloaded=(2,),
    no_sync=(0, 1),
    coalesced=(1, 3),
    one_backward=(2,),
)
def test_accumulation_that_the_user_drives(ranks, way, kind, stage):
    assert_moved(ranks(2)(act, accumulated, kind, stage, way), by_hand(kind, *STEPS), TOLERANCE[kind])


def synchronised(r):
    engine = r.engine()
    return message(engine.no_sync().__enter__)


@at(2, 3)
def test_no_sync_is_not_for_partitioned_gradients(ranks, kind, stage):
    for said in ranks(2)(act, synchronised, kind, stage):
        assert said.startswith("AssertionError: no_sync context manager is incompatible with gradient partitioning")


def resized(r):
    engine = r.engine()
    r.train(engine, 0, 1)
    engine.set_train_batch_size(24)
    r.train(engine, 2, 3, 4, 5)
    assert engine.global_steps == 4
    return r.params(engine)


@at(1, 3)
def test_a_batch_size_changed_between_steps(ranks, kind, stage):
    """To two micro-batches a step."""
    assert_moved(ranks(2)(act, resized, kind, stage), by_hand(kind, [0], [1], [2, 3], [4, 5]), TOLERANCE[kind])


REDUCTIONS = {
    "sum": {"gradient_allreduce_op": "sum"},
    "prescaled": {"prescale_gradients": True},
    "predivided": {"gradient_predivide_factor": 4.0},
}


def reduced(r, way):
    engine = r.engine(**REDUCTIONS[way])
    r.train(engine, 0, 1)
    return r.params(engine)


@ways(sum=(0, 1, 2), prescaled=(0, 1), predivided=(1,))
def test_reductions(ranks, way, kind, stage):
    """The sum over ranks is twice the mean; the other two are ways to the mean."""
    scale = 2.0 if way == "sum" else 1.0
    assert_moved(ranks(2)(act, reduced, kind, stage, way), by_hand(kind, [0], [1], scale=scale), TOLERANCE[kind])


# --- backward passes that the user begins


def begun_by_hand(r):
    engine = r.engine(gradient_accumulation_steps=2)
    said = None
    for number in range(4):
        if number == 1:  # of the outputs, for a loss that the engine does not see
            x, y = r.part(number)
            out = engine(x)
            out.backward(2 * (out.detach() - y) / y.numel())
        elif number == 3:
            engine.backward(r.loss(engine, number))
        else:
            said = message(r.loss(engine, number).backward)
            if said != "no error":
                return None, said
        engine.step()
    return r.params(engine), said


@at(0, 1, 2, 3)
def test_a_backward_pass_of_the_users(ranks, kind, stage):
    """``loss.backward()`` and that of outputs accumulate as ``engine.backward(loss)`` does; stage 0 refuses them."""
    outcomes = ranks(2)(act, begun_by_hand, kind, stage)
    if stage == 0:
        for _, said in outcomes:
            assert said.startswith("RuntimeError: Direct calls to tensor.backward() are not supported")
    else:
        assert_moved([params for params, _ in outcomes], by_hand(kind, [0, 1], [2, 3]), TOLERANCE[kind])


# --- overflow

FP16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}


def in_fp16(r, *args, **kwargs):
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed's CPU accelerator says no, torch's kernels can
    return r.engine(*args, fp16=FP16, **kwargs)


def scaled_by_hand(r):
    engine = in_fp16(r)
    for number in range(2):
        engine.scale(r.loss(engine, number)).backward()
        engine.step()
    return r.params(engine), message(r.loss(engine, 2).backward)


@at(1, 3)
def test_a_loss_scaled_by_the_user(ranks, kind, stage):
    outcomes = ranks(2)(act, scaled_by_hand, kind, stage)
    assert_moved([params for params, _ in outcomes], by_hand(kind, [0], [1]), TOLERANCE_FP16)
    for _, said in outcomes:
        assert said.startswith("RuntimeError: Loss scaling is required")


def taken(optimizer):
    """The steps that an optimizer's state has counted."""
    return {int(state["step"]) for state in optimizer.state.values() if state}


def copied(optimizer):
    return {k: {n: t.clone() for n, t in s.items() if torch.is_tensor(t)} for k, s in optimizer.state.items()}


def overflowing(r):
    model = odd_model()
    optimizer = build(r.kind, model)
    engine = in_fp16(r, model, optimizer, initialize={"lr_scheduler": falling(optimizer)})
    counts = []
    for number in (None, 0, 1, None, 2):
        before, state, rate = r.params(engine), copied(optimizer), engine.get_lr()
        engine.backward(r.loss(engine, 9) * (1e9 if r.rank == 0 else 1.0) if number is None else r.loss(engine, number))
        engine.step()
        assert engine.was_step_applied() == (number is not None)
        if number is None:
            after = r.params(engine)
            assert all(torch.equal(after[name], before[name]) for name in before)
            now = copied(optimizer)
            assert all(torch.equal(now[k][kind], state[k][kind]) for k in state for kind in state[k])
            assert engine.get_lr() == rate
        counts.append((taken(optimizer), engine.skipped_steps, engine.optimizer.loss_scaler.cur_scale))
    return r.params(engine), counts


@at(1, 2, 3)
def test_an_overflow_is_no_step(ranks, kind, stage):
    """Nor is it one of the schedule's, and rank 0's alone keeps both ranks; the first step may be one."""
    outcomes = ranks(2)(act, overflowing, kind, stage)
    expected = by_hand(kind, [0], [1], [2], rates=[LR, LR / 2, LR / 3])
    assert_moved([params for params, _ in outcomes], expected, TOLERANCE_FP16)
    for _, counts in outcomes:
        assert counts == [(set(), 1, 128), ({1}, 1, 128), ({2}, 1, 128), ({2}, 2, 64), ({3}, 2, 64)]


def infinite(r):
    engine = r.engine()
    r.train(engine, 0)
    engine.backward(r.loss(engine, 9) * (float("inf") if r.rank == 0 else 1.0))
    said = message(engine.step)
    r.train(engine, *([] if r.stage == 0 else [1]))
    return r.params(engine), said, engine.skipped_steps


@at(0, 1, 3)
def test_an_infinite_gradient_in_float32(ranks, kind, stage):
    """Stages 1 to 3 skip the step. Stage 0 takes it: AdamW's weights are NaN from then on, LoFT raises."""
    outcomes = ranks(2)(act, infinite, kind, stage)
    if stage > 0:
        assert [rest for _, *rest in outcomes] == [["no error", 1]] * 2
        assert_moved([params for params, *_ in outcomes], by_hand(kind, [0], [1]), TOLERANCE[kind])
    elif kind == "adamw":
        for params, *rest in outcomes:
            assert rest == ["no error", 0]
            assert any(bool(p.isnan().any()) for p in params.values())
    else:
        for _, said, _ in outcomes:
            assert re.match(r"RuntimeError: base_model\S+ became infinite or NaN: the run has diverged", said), said


# --- DeepSpeed's own checkpoints


def tagged_apart(r, folder):
    engine = r.engine(checkpoint={"tag_validation": "FAIL"})
    r.train(engine, 0)
    said = message(engine.save_checkpoint, folder, tag=f"rank{r.rank}")
    torch.distributed.barrier()
    left = sorted(each.name for each in folder.iterdir())
    engine.save_checkpoint(folder, tag="both")
    r.train(engine, 1)
    return r.params(engine), said, left


@at(0, 2)
def test_tags_of_each_rank(ranks, tmp_path, kind, stage):
    """The check stops all ranks before anything is written, and a tag in common is taken afterwards."""
    outcomes = ranks(2)(act, tagged_apart, kind, stage, tmp_path)
    for rank, (_, said, left) in enumerate(outcomes):
        assert f"The checkpoint tag name 'rank{rank}' is not consistent across all ranks" in said
        assert left == []
    assert (tmp_path / "latest").read_text() == "both"
    assert_moved([params for params, *_ in outcomes], by_hand(kind, [0], [1]), TOLERANCE[kind])


def resumed(r, folder):
    engine = r.engine()
    r.train(engine, 0, 1)
    engine.save_checkpoint(folder, tag="mine", client_state={"epoch": 7}, save_latest=False)
    engine = r.engine()
    nothing = engine.load_checkpoint(folder)  # which looks for the file latest
    path, client_state = engine.load_checkpoint(folder, tag="mine")
    r.train(engine, 2)
    return r.params(engine), nothing, "mine" in path, client_state["epoch"], engine.global_steps


@at(0, 1, 3)
def test_a_checkpoint_with_a_tag_and_a_clients_state(ranks, tmp_path, kind, stage):
    outcomes = ranks(2)(act, resumed, kind, stage, tmp_path)
    assert [rest for _, *rest in outcomes] == [[(None, None), True, 7, 3]] * 2
    assert_moved([params for params, *_ in outcomes], by_hand(kind, [0], [1], [2]), TOLERANCE[kind])


def rewound(r, folder):
    engine = r.engine()
    engine.save_checkpoint(folder, tag="start")
    r.train(engine, 0, 1)
    engine.save_checkpoint(folder, tag="later")
    r.train(engine, 5)
    engine.load_checkpoint(folder, tag="later")
    r.train(engine, 2)
    later = r.params(engine)
    engine.load_checkpoint(folder, tag="start")
    r.train(engine, 3)
    return later, r.params(engine), engine.global_steps


@at(0, 2, 3)
def test_an_engine_goes_back(ranks, tmp_path, kind, stage):
    """To a step before, and to the start, where there was no state."""
    outcomes = ranks(2)(act, rewound, kind, stage, tmp_path)
    assert_moved([later for later, *_ in outcomes], by_hand(kind, [0], [1], [2]), TOLERANCE[kind])
    assert_moved([params for _, params, _ in outcomes], by_hand(kind, [3]), TOLERANCE[kind])
    assert [steps for *_, steps in outcomes] == [1, 1]


# What is loaded of a checkpoint, and how many steps the engine has counted then.
PARTS = {
    "no_optimizer_states": ({"load_optimizer_states": False}, 2),
    # At stage 3 DeepSpeed loads no weights where only the second is said.
    "module_only": ({"load_optimizer_states": False, "load_module_only": True}, 0),
}


def partly_loaded(r, folder, way, trained_on):
    engine = r.engine()
    r.train(engine, 0, 1)
    engine.save_checkpoint(folder)
    engine = r.engine()
    r.train(engine, *trained_on)
    kwargs, _ = PARTS[way]
    engine.load_checkpoint(folder, **kwargs)
    loaded, steps = r.params(engine), engine.global_steps
    r.train(engine, 2)
    return r.params(engine), loaded, steps


def assert_loaded(outcomes, way, kind, trained_on):
    """The weights are those of the checkpoint, the optimizer is as it was."""
    saved = by_hand(kind, [0], [1])
    assert [steps for *_, steps in outcomes] == [PARTS[way][1] + (len(trained_on) if way == "module_only" else 0)] * 2
    assert_moved([loaded for _, loaded, _ in outcomes], saved, TOLERANCE[kind])
    run = ByHand(kind)
    for number in trained_on:
        run.step(number)
    run.model.load_state_dict(saved, strict=False)
    run.step(2)
    assert_moved([params for params, *_ in outcomes], run.params, TOLERANCE[kind])


@ways(no_optimizer_states=(0, 1, 3), module_only=(0, 2))
def test_weights_loaded_alone(ranks, tmp_path, way, kind, stage):
    assert_loaded(ranks(2)(act, partly_loaded, kind, stage, tmp_path, way, []), way, kind, [])


@ways(module_only=(0, 1, 3))
def test_weights_loaded_into_a_run(ranks, tmp_path, way, kind, stage):
    """Its moments stay, which for LoFT are in the coordinates of other weights."""
    assert_loaded(ranks(2)(act, partly_loaded, kind, stage, tmp_path, way, [5]), way, kind, [5])


def scheduled_anew(r, folder):
    def start():
        model = odd_model()
        optimizer = build(r.kind, model)
        return r.engine(model, optimizer, initialize={"lr_scheduler": falling(optimizer)})

    engine = start()
    r.train(engine, 0, 1)
    engine.save_checkpoint(folder)
    epochs = []
    for load in (True, False):
        engine = start()
        engine.load_checkpoint(folder, load_lr_scheduler_states=load)
        epochs.append(engine.lr_scheduler.last_epoch)
        r.train(engine, 2)
    return r.params(engine), epochs, engine.get_lr()


@at(0, 2)
def test_a_schedule_that_is_not_loaded(ranks, tmp_path, kind, stage):
    """It begins anew, at the rate that the optimizer's state brings along."""
    outcomes = ranks(2)(act, scheduled_anew, kind, stage, tmp_path)
    expected = by_hand(kind, [0], [1], [2], rates=[LR, LR / 2, LR / 3])
    assert_moved([params for params, *_ in outcomes], expected, TOLERANCE[kind])
    assert [rest for _, *rest in outcomes] == [[[2, 0], [LR / 2]]] * 2


def of_adamw(r, folder):
    engine = r.engine(kind="adamw")
    r.train(engine, 0, 1)
    engine.save_checkpoint(folder)
    engine = r.engine()
    said = message(engine.load_checkpoint, folder)
    engine.load_checkpoint(folder, load_optimizer_states=False)
    r.train(engine, 2)
    return r.params(engine), said


@at(0, 1, 3)
def test_a_checkpoint_of_adamw(ranks, tmp_path, kind, stage):
    """AdamW goes on from it. LoFT refuses its state and starts from its weights."""
    outcomes = ranks(2)(act, of_adamw, kind, stage, tmp_path)
    wanted = {"adamw": "no error", "loft": "ValueError: this is no state of this optimizer"}[kind]
    assert all(said.startswith(wanted) for _, said in outcomes)
    run = ByHand("adamw")
    run.step(0)
    run.step(1)
    if kind == "loft":
        run = ByHand("loft", run.model)
    run.step(2)
    assert_moved([params for params, _ in outcomes], run.params, TOLERANCE[kind])


# --- weights from elsewhere


def halve(model):
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.mul_(0.5)


def written(r):
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    engine = r.engine(zero={"stage3_param_persistence_threshold": 0})  # else what is kept whole is not written back
    r.train(engine, 0, 1)
    if r.stage == 0:
        halve(engine.module)
    elif r.stage == 3:
        with deepspeed.zero.GatheredParameters(list(trained(engine.module).values()), modifier_rank=0):
            halve(engine.module)
        engine.optimizer.refresh_fp32_params()
    else:
        for name, param in trained(engine.module).items():
            if "lora_B" in name:
                safe_set_full_fp32_param(param, 0.5 * safe_get_full_fp32_param(param))
        engine.optimizer.update_lp_params()
    r.train(engine, 2)
    return r.params(engine)


@at(0, 1, 2, 3)
def test_weights_that_the_user_writes(ranks, kind, stage):
    """In the ways that DeepSpeed has for it."""
    run = ByHand(kind)
    run.step(0)
    run.step(1)
    halve(run.model)
    run.step(2)
    assert_moved(ranks(2)(act, written, kind, stage), run.params, TOLERANCE[kind])


def given_a_state_dict(r, state):
    engine = r.engine(zero={"stage3_param_persistence_threshold": 0})
    r.train(engine, 0)
    engine.load_module_state_dict({"module": state}, fetch_z3_params=r.stage == 3)
    if r.stage:
        engine.optimizer.refresh_fp32_params()
    names = engine.module_state_dict().keys()
    r.train(engine, 1)
    return r.params(engine), names == state.keys()


@at(0, 2, 3)
def test_a_modules_state_dict(ranks, kind, stage):
    other = ByHand(kind)
    other.step(7)
    outcomes = ranks(2)(act, given_a_state_dict, kind, stage, other.model.state_dict())
    run = ByHand(kind)
    run.step(0)
    run.model.load_state_dict(other.model.state_dict())
    run.step(1)
    assert_moved([params for params, _ in outcomes], run.params, TOLERANCE[kind])
    assert all(alike for _, alike in outcomes)


# --- several engines


def alternating(r):
    other = {"adamw": "loft", "loft": "adamw"}[r.kind]
    engines = [r.engine(), r.engine(), r.engine(kind=other)]
    for step in range(2):
        for place, engine in enumerate(engines):
            engine.backward(r.loss(engine, 10 * place + step))
        for engine in reversed(engines):
            engine.step()
    return [r.params(engine) for engine in engines]


@at(0, 2, 3)
def test_engines_in_turns(ranks, kind, stage):
    """Two with the same optimizer and one with the other, all between backward and step at once."""
    found = ranks(2)(act, alternating, kind, stage)
    other = {"adamw": "loft", "loft": "adamw"}[kind]
    for place, each in enumerate((kind, kind, other)):
        expected = by_hand(each, [10 * place], [10 * place + 1])
        assert_moved([params[place] for params in found], expected, TOLERANCE[each])


def beside_a_reference(r):
    import deepspeed

    reference, *_ = deepspeed.initialize(
        model=odd_model(), config={"train_micro_batch_size_per_gpu": 6, "zero_optimization": {"stage": 3}}
    )
    r.engines.append(reference)
    engine = r.engine()
    for number in range(2):
        with torch.no_grad():
            seen = float(r.loss(reference, number))
        r.train(engine, number)
    return r.params(engine), seen


@at(3)
def test_an_engine_that_only_evaluates(ranks, kind, stage):
    outcomes = ranks(2)(act, beside_a_reference, kind, stage)
    assert_moved([params for params, _ in outcomes], by_hand(kind, [0], [1]), TOLERANCE[kind])
    x, y = batch(1)
    expected = float((odd_model()(x) - y).square().mean().detach())
    assert sum(seen for _, seen in outcomes) / 2 == pytest.approx(expected, rel=1e-5)


def one_after_the_other(r):
    other = {"adamw": "loft", "loft": "adamw"}[r.kind]
    model = odd_model()
    for number, kind in enumerate((r.kind, other, r.kind)):
        engine = r.engine(model, kind=kind)
        r.train(engine, number)
        params = r.params(engine)
        r.destroy(engine)
    return params


@at(0, 1, 3)
def test_engines_on_one_model(ranks, kind, stage):
    """Each begins with the weights of the one before and nothing else."""
    other = {"adamw": "loft", "loft": "adamw"}[kind]
    model = odd_model()
    for number, each in enumerate((kind, other, kind)):
        ByHand(each, model).step(number)
    assert_moved(ranks(2)(act, one_after_the_other, kind, stage), params_of(model), TOLERANCE["loft"])


# --- settings of DeepSpeed 0.19

SETTINGS = {
    "parameter_alignment": {"zero": {"parameter_alignment": True}},
    "compute_grad_norm": {"zero": {"compute_grad_norm": False}},
    "reduce_scatter": {"zero": {"reduce_scatter": False, "contiguous_gradients": False}},
    "hpz": {"zero": {"zero_hpz_partition_size": 2}},
    "disable_python_gc": {"disable_python_gc": True},
}


def set_so(r, way):
    engine = r.engine(**SETTINGS[way])
    r.train(engine, 0, 1)
    return r.params(engine)


@ways(parameter_alignment=(2,), compute_grad_norm=(1,), reduce_scatter=(2,), hpz=(3,), disable_python_gc=(2,))
def test_settings_that_move_no_number(ranks, way, kind, stage):
    assert_moved(ranks(2)(act, set_so, kind, stage, way), by_hand(kind, [0], [1]), TOLERANCE[kind])


def built_in_parts(r):
    """The base under ``zero.Init``, the adapters after it, as a stage 3 that loads a large model does."""
    import deepspeed

    whole = odd_model()
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 12, "zero_optimization": {"stage": 3}}):
        base = nn.Sequential(
            nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 11), nn.LayerNorm(11), nn.Linear(11, 3)
        )
    with deepspeed.zero.GatheredParameters(list(base.parameters())):
        model = get_peft_model(base, whole.peft_config["default"])
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.load_state_dict(whole.state_dict())
    engine = r.engine(model)
    r.train(engine, 0, 1)
    return r.params(engine)


@at(3)
def test_a_model_that_was_never_whole(ranks, kind, stage):
    assert_moved(ranks(2)(act, built_in_parts, kind, stage), by_hand(kind, [0], [1]), TOLERANCE[kind])
