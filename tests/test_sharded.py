"""Sharded equals single: the same global batch on 1 to 4 ranks at stages 0 to 3 ends where one process does."""

import functools

import pytest
import torch
from models import batch, odd_model, relative, train_alone, trained
from sharded_run import (
    Outcome,
    assembled,
    gathered,
    start_engine,
    train_engine,
    train_plain,
    train_sharded,
    watch_sharded,
)

from loft_ds import Blocks, LoFTAdamW

BETAS = (0.9, 0.99)


@functools.cache
def plain(steps, lora_rank=3, **kwargs):
    return train_plain(steps, rank=lora_rank, betas=BETAS, **dict(kwargs))


def whole(outcomes, kind, single):
    """Momentum or second moments of all factors, from every rank's rows, as one vector."""
    return torch.cat(
        [assembled(outcomes, name, kind, state["basis"]).reshape(-1) for name, state in single.state.items()]
    )


def distances(outcomes, single, stage):
    """Relative distances of all parameters, of momentum and of second moments from the single process's."""
    out = {
        "parameters": relative(
            torch.cat([outcomes[0].params[name].reshape(-1) for name in single.params]),
            torch.cat([p.reshape(-1) for p in single.params.values()]),
        )
    }
    owners = outcomes if stage else outcomes[:1]
    for kind in ("momentum", "second_moment") if single.state else ():
        out[kind] = relative(whole(owners, kind, single), whole([single], kind, single))
    return out


def assert_equal(outcomes, single, stage, tolerance):
    for kind, distance in distances(outcomes, single, stage).items():
        assert distance < tolerance, (kind, distance)
    for outcome in outcomes[1:]:
        for name, param in outcome.params.items():
            assert torch.equal(param, outcomes[0].params[name]), f"{name} differs between ranks"


# Only the order of float32 sums may differ: of the batch over ranks, and of the all-reduce. One step leaves some 6e-8
# (eps) times a short sum; 20 steps add up.
TOLERANCE = {1: 1e-6, 20: 1e-5}
# The default of ranks up to JOINT_RANK, and that of all above, which are too large for a test to have many of.
TURNS = ("joint", "alternate")


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_one_process(ranks, world, stage, turns):
    each = ranks(world)(watch_sharded, stage, list(TOLERANCE), betas=BETAS, turns=turns)
    for (steps, tolerance), outcomes in zip(TOLERANCE.items(), zip(*each, strict=True), strict=True):
        assert_equal(outcomes, plain(steps, turns=turns), stage, tolerance)
    if stage and world > 1:
        assert each[0][0].cuts, "no boundary falls inside a feature row: the test misses its point"


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_than_rows(ranks, stage, turns):
    """Rank-1 adapters: at stage 3 four ranks share 3 rows, and the last holds nothing but padding of three factors."""
    outcomes = ranks(4)(train_sharded, stage, 20, lora_rank=1, betas=BETAS, turns=turns)
    assert_equal(outcomes, plain(20, lora_rank=1, turns=turns), stage, TOLERANCE[20])
    assert any(outcome.empty for outcome in outcomes)
    # A view of a gradient keeps all that DeepSpeed has of them, also one of no rows.
    assert not any(outcome.holds_gradients for outcome in outcomes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_is_split(ranks, stage):
    """Per rank 1/N of momentum and second moments, up to the flat layout's other parameters and whole rows."""
    outcomes = ranks(4)(train_sharded, stage, 1, betas=BETAS)
    for kind in ("momentum", "second_moment"):
        held = [outcome.elements[kind] for outcome in outcomes]
        total = sum(s[kind].numel() for s in plain(1).state.values())
        if kind == "momentum":
            assert sum(held) == total
        # The odd model has 1 bias or norm element for 3 of the factors, so a quarter of the flat buffer may hold
        # up to 4/3 of a quarter of the factors; each of the 8 factors may add a row.
        assert max(held) < sum(held) * (0.25 * 4 / 3) + 8 * 6


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("stage", [1, 3])
def test_from_pefts_zero(ranks, stage, turns):
    """B = 0 at the start, where A's gradient is zero and its direction is the first step's doing.

    Factors amplify rounding there (B is as short as the steps taken), W does not: it is what is compared.
    """
    (outcome, *_) = ranks(2)(train_sharded, stage, 20, zero_b=True, betas=BETAS, turns=turns)
    single, start = plain(20, zero_b=True, turns=turns), trained(odd_model(zero_b=True))
    for name in single.params:
        if "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            ours, theirs = (o.params[b] @ o.params[name] for o in (outcome, single))
            assert relative(ours, theirs) < 1e-4, name  # of the change of W alone, which is small itself
            assert not torch.equal(single.params[name], start[name])


def in_small_buckets(rank, world, ahead):
    """A run at stage 3 with a bucket a factor, and what began and ended in it, in order."""
    from unittest import mock

    from loft_ds.sharding import exchange, sharded

    events = []
    start = exchange.Exchange.start

    def started(self, *args):
        events.append("began")
        wait = start(self, *args)

        def finish():
            events.append("ended")
            return wait()

        return finish

    with (
        mock.patch.object(sharded, "rounds_of", lambda factors: {f: place for place, f in enumerate(factors)}),
        mock.patch.object(sharded, "one_ahead", sharded.one_ahead if ahead else lambda waits: (w() for w in waits)),
        mock.patch.object(exchange.Exchange, "start", started),
    ):
        return train_sharded(rank, world, 3, 3, betas=BETAS).params, events


def test_buckets_are_gathered_one_ahead(ranks):
    """The next bucket is under way while one is worked on, never two; and not a bit of the result depends on it."""
    overlapping, plainly = (ranks(3)(in_small_buckets, ahead) for ahead in (True, False))
    for (ours, events), (theirs, in_turn) in zip(overlapping, plainly, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert in_turn == ["began", "ended"] * (len(in_turn) // 2), "the comparison overlaps too"
        under_way = [events[: i + 1].count("began") - events[: i + 1].count("ended") for i in range(len(events))]
        assert max(under_way) == 2
        assert under_way[-1] == 0


def largest_allocation(rank, world):
    """The largest tensor that a rank's third and fourth step allocate, and the whole second moment, in bytes."""
    import deepspeed
    from peft import LoraConfig, get_peft_model
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(1200, 200)), LoraConfig(r=64, target_modules=["0"]))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=LoFTAdamW(model), config=config)
    for step in range(4):
        engine.backward(engine(torch.randn(4, 1200)).square().mean())
        if step < 2:
            engine.step()
        else:
            with Watch():
                engine.step()
    engine.destroy()
    return largest, 1200 * (64 * 65 // 2) * 4


def test_no_rank_has_the_whole_not_even_for_a_moment(ranks):
    """Of A's second moments, 10 MB, a rank holds its 2.5 MB; the largest tensor of a step is a workspace of 4 MB."""
    for largest, whole in ranks(4)(largest_allocation):
        assert whole / 4 <= largest < whole / 2


def under_ddp(rank, world, steps):
    """torch's own data parallelism, without DeepSpeed: every rank holds and does everything."""
    model = odd_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = LoFTAdamW(model, lr=1e-3, max_grad_norm=0.2, betas=BETAS)
    part = slice(rank * (12 // world), (rank + 1) * (12 // world))
    for step in range(steps):
        x, y = batch(step)
        (wrapped(x[part]) - y[part]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return gathered(model, stage=0)


def test_ddp(ranks):
    first, second = ranks(2)(under_ddp, 20)
    single = plain(20, max_grad_norm=0.2).params
    for name, param in single.items():
        assert relative(first[name], param) < TOLERANCE[20], name
        assert torch.equal(first[name], second[name]), name


def dtensors(rank, world):
    """What LoFT says of a model that FSDP2 or a tensor-parallel plan has sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = odd_model()
    layer = model.base_model.model[0].lora_A["default"]
    layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (world,))))
    try:
        LoFTAdamW(model)
    except ValueError as error:
        return str(error)
    return "no error"


def test_other_sharding_is_refused(ranks):
    (said,) = ranks(1)(dtensors)
    assert "lora_A.default.weight is a DTensor" in said


def with_masters_written(rank, world, steps):
    """A training at stage 3 in which something else than LoFT writes into one rank's master weights, before step 2."""
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-3, betas=BETAS)
    engine = start_engine(model, optimizer, world, 3, gradient_clipping=0.0)  # its default is 1.0
    train_engine(engine, rank, world, range(2))
    layout = optimizer.attach()
    if rank == 1:
        for param in trained(model).values():
            layout.held(param)[0].mul_(2)
    layout.refresh()
    train_engine(engine, rank, world, range(2, steps))
    params = gathered(model, stage=3)
    engine.destroy()
    return params


def test_masters_that_another_writes_are_read_anew(ranks):
    """Owners keep the rows that travel; the second half of every parameter is rank 1's to hold."""
    (found, _) = ranks(2)(with_masters_written, 4)
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-3, betas=BETAS)
    train_alone(model, optimizer, range(2))
    for param in trained(model).values():
        param.data.view(-1)[-(-param.numel() // 2) :].mul_(2)
    train_alone(model, optimizer, range(2, 4))
    for name, param in trained(model).items():
        assert relative(found[name], param.detach()) < TOLERANCE[20], name


CASES = {
    "round_robin_1": (2, 1, {"zero": {"round_robin_gradients": True}}),
    "round_robin_2": (3, 2, {"zero": {"round_robin_gradients": True}}),
    "offload_1": (2, 1, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    "offload_2": (3, 2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    "offload_3": (2, 3, {"zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}),
    "overlap_comm": (2, 2, {"zero": {"overlap_comm": True, "reduce_bucket_size": 64, "allgather_bucket_size": 64}}),
    "sub_groups_split_pairs": (2, 3, {"zero": {"sub_group_size": 10}}),
    "persistent": (2, 3, {"zero": {"stage3_param_persistence_threshold": 0}}),
    "joint_2": (3, 2, {"turns": "joint"}),
    "joint_3": (3, 3, {"turns": "joint"}),
    "elementwise": (3, 3, {"blocks": Blocks(second_moment="elementwise")}),
    "published": (3, 2, {"blocks": Blocks.published()}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grouped", [False, True], ids=["one_group", "two_groups"])
def test_settings(ranks, name, grouped):
    """Every way DeepSpeed lays slices out, with all parameters in one group and with each pair in two."""
    world, stage, kwargs = CASES[name]
    own = {key: kwargs[key] for key in ("turns", "blocks") if key in kwargs}
    outcomes = ranks(world)(train_sharded, stage, 20, grouped=grouped, betas=BETAS, **kwargs)
    single = plain(20, grouped=grouped, **own)
    if name == "elementwise":  # its second moment is no matrix: the parameters speak for it
        assert (
            relative(
                outcomes[0].params["base_model.model.0.lora_A.default.weight"],
                single.params["base_model.model.0.lora_A.default.weight"],
            )
            < TOLERANCE[20]
        )
    else:
        assert_equal(outcomes, single, stage, TOLERANCE[20])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True], ids=["one_group", "two_groups"])
def test_clipping_is_lofts(ranks, stage, grouped):
    """ "gradient_clipping" in the JSON is LoFT's norm, from the first step on, and the engine reports that norm."""
    clip = 0.2
    outcomes = ranks(2)(train_sharded, stage, 20, clip=clip, grouped=grouped, betas=BETAS)
    single = plain(20, max_grad_norm=clip, grouped=grouped)
    assert min(single.norms) > clip, "clipping is not active on every step"
    assert_equal(outcomes, single, stage, TOLERANCE[20])
    for ours, theirs in zip(outcomes[0].norms, single.norms, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)  # float32 gradients summed in another order
    raw = plain(20, max_grad_norm=clip, blocks=Blocks(projected_clipping=False))
    assert abs(raw.norms[0] - single.norms[0]) > 1e-3 * single.norms[0], "the two norms cannot be told apart"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation(ranks, stage):
    outcomes = ranks(2)(train_sharded, stage, 8, accumulation=3, clip=0.2, betas=BETAS)
    assert_equal(outcomes, plain(8, accumulation=3, max_grad_norm=0.2), stage, TOLERANCE[20])


def start():
    """The parameters before any step, as an outcome without state."""
    return Outcome({name: p.detach() for name, p in trained(odd_model()).items()}, {}, [], [])


HALF = [
    ("bf16", 0, {}),
    ("bf16", 1, {}),
    ("bf16", 1, {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}),  # BF16_Optimizer
    ("bf16", 2, {}),
    ("bf16", 2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    ("bf16", 3, {}),
    ("bf16", 3, {"zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}),
    ("fp16", 1, {}),
    ("fp16", 2, {}),
    ("fp16", 3, {}),
]


@pytest.mark.parametrize(("precision", "stage", "kwargs"), HALF)
def test_half_precision(ranks, precision, stage, kwargs):
    """16 bits: float32 masters follow the float32 run as far as 16-bit gradients do, and every rank alike."""
    if precision == "fp16":  # the default of 2^16 overflows at first
        kwargs = {"config": {"fp16": {"enabled": True, "initial_scale_power": 8}}}
    outcomes = ranks(2)(train_sharded, stage, 20, precision=precision, grouped=True, clip=0.2, betas=BETAS, **kwargs)
    single = plain(20, grouped=True, max_grad_norm=0.2)
    # Half an ulp of a 16-bit parameter (2^-9, 2^-12), and the path there: 20 steps of lr 1e-3 (2e-3 for A) against
    # parameters of size 0.3, of which gradients rounded to 16 bits turn a few per cent.
    tolerance = {"bf16": 2**-8, "fp16": 2**-10}[precision]
    assert distances(outcomes, single, stage)["parameters"] < tolerance
    assert outcomes[0].norms[-1] == pytest.approx(single.norms[-1], rel=0.05)  # 16-bit forward and backward
    assert distances(outcomes, start(), stage)["parameters"] > 2 * tolerance, "the run went nowhere"


def test_half_precision_that_deepspeed_does_not_scale(ranks):
    with pytest.raises(RuntimeError, match=r"fp16 at ZeRO stage 0(.|\n)*use stage 1"):
        ranks(2)(train_sharded, 0, 1, precision="fp16")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overflow_is_skipped_on_all_ranks_alike(ranks, stage):
    """Rank 0's gradients overflow in one step: no rank counts it, turns its phase or moves."""
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}
    outcomes = ranks(2)(
        train_sharded, stage, 5, precision="fp16", config=fp16, blow_up_at=2, clip=0.2, grouped=True, betas=BETAS
    )
    for outcome in outcomes:
        assert outcome.skipped == 1
        assert set(outcome.steps.values()) == {4}
        for name, param in outcome.params.items():
            assert torch.isfinite(param).all()
            assert torch.equal(param, outcomes[0].params[name])
