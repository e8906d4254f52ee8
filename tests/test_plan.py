"""The plan against what ranks really allocate and send, against published sizes, and for as many ranks as one likes."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import peft
import pytest
import safetensors.torch
import torch
import transformers
from scaling import TINY, Setup, measure
from scaling import main as scaling_main

from loft_ds import LoFTAdamW
from loft_ds.adapters import find_trainable
from loft_ds.checkpoint import save_checkpoint
from loft_ds.kernels.stream import CHUNK_BYTES
from loft_ds.plan import BUILTIN, GPUS, Division, Job, arithmetic, memory, peak, plan, received, shapes_of, traffic
from loft_ds.plan.__main__ import largest_rank, main, smallest_stage
from loft_ds.plan.division import division_of
from loft_ds.plan.hardware import TRAINING_EFFICIENCY
from loft_ds.plan.memory import checkpoint_bytes
from loft_ds.plan.shapes import build
from loft_ds.plan.traffic import deepspeed_traffic, products
from loft_ds.sharding.exchange import plan_rows


@functools.cache
def builtin(name):
    return shapes_of(name)


# Four experts and one that all share, whose gate has one output: LoFT leaves its adapter to AdamW.
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
MIXED = {**TINY, "model_type": "qwen2_moe", "num_hidden_layers": 2, **EXPERTS}
# By default both factors of a pair move on every step up to rank 16, and one above.
RUNS = [(2, 0, "fp32", False, 17), (2, 0, "bf16", False, 17), (2, 1, "bf16", False, 17), (3, 2, "fp32", False, 17)]
RUNS += [(3, 3, "fp32", False, 17), (4, 3, "bf16", False, 17), (3, 2, "bf16", True, 17), (2, 3, "fp32", True, 17)]
RUNS += [(3, 2, "bf16", False, 4), (4, 3, "fp32", False, 3), (2, 1, "bf16", False, 16)]


def setup_of(stage, precision, mixed, rank):
    return Setup(stage, batch=1, rank=rank, precision=precision, steps=1, model=MIXED if mixed else TINY)


@pytest.fixture(scope="module")
def measured(ranks):
    """What each rank measured of one of ``RUNS``."""
    return functools.cache(lambda world, *run: ranks(world)(measure, setup_of(*run)))


@pytest.mark.parametrize(("world", "stage", "precision", "mixed", "adapter_rank"), RUNS)
def test_memory_and_traffic_are_what_ranks_measure(measured, world, stage, precision, mixed, adapter_rank):
    """Every kind of memory on every rank within 2%, matrix products, and what LoFT and DeepSpeed receive."""
    run = stage, precision, mixed, adapter_rank
    setup, found_of = setup_of(*run), measured(world, *run)
    shapes = shapes_of(setup.model)
    bytes_each = 2 if precision == "bf16" else 4
    job = Job(setup.rank, world, stage, bytes_each, reduce_bucket=setup.reduce_bucket, persistent=setup.persistent)
    planned = memory(shapes, job)
    assert planned.keys() == found_of[0].memory.keys()
    for rank, found in enumerate(found_of):
        for kind, size in found.memory.items():
            assert float(planned[kind][rank]) == pytest.approx(size, rel=0.02), (rank, kind)
    division = division_of(shapes, job)
    operations, _ = arithmetic(division)
    for rank, found in enumerate(found_of):
        assert float(operations[rank if stage else 0]) == pytest.approx(found.arithmetic["optimizer"], rel=0.02)
        exchanged = found.received.get("alltoall_base_", 0.0)
        expected = traffic(division, rank)
        assert expected.total == pytest.approx(exchanged, rel=0.02)
        if stage:  # alone it asks nobody; two all-reduces of a few numbers are among the others
            assert found.calls.get("alltoall_base_", 0) == expected.collectives - (2 if division.moving else 1)
        # Besides LoFT's norm and DeepSpeed's overflow flags, of some bytes, the rest is DeepSpeed's.
        rest = sum(found.received.values()) - exchanged
        assert sum(deepspeed_traffic(shapes, job).values()) == pytest.approx(rest, rel=0.02, abs=64)


def test_arithmetic_falls_with_the_ranks(measured):
    """Two ranks do half each of what each of them does at stage 0: every layer of the model is one rank's."""
    for whole, half in zip(measured(2, 0, "bf16", False, 17), measured(2, 1, "bf16", False, 17), strict=True):
        assert half.arithmetic["optimizer"] == whole.arithmetic["optimizer"] / 2


@pytest.mark.parametrize(
    ("name", "billions"),  # as their makers publish
    [
        ("Llama-3-8B", 8.03),
        ("Llama-3-70B", 70.6),
        ("Llama-3-405B", 405.9),
        ("Mistral-7B", 7.25),
        ("Qwen2.5-7B", 7.62),
        ("Mixtral-8x7B", 46.7),
        ("Qwen3-32B", 32.8),
        ("Qwen3-30B-A3B", 30.5),
        ("Qwen2.5-72B", 72.7),
    ],
)
def test_builtin_models_are_of_published_size(name, billions):
    assert builtin(name).parameters / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_shapes_are_those_that_transformers_builds(name):
    assert shapes_of(name) == build(name, BUILTIN[name])


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("settings", "targets", "parameters"),
    [
        ({**TINY, "head_dim": 16}, "all-linear", None),
        ({**TINY, "model_type": "qwen3", "head_dim": 16}, "all-linear", None),
        ({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 256}, "all-linear", None),
        (
            {"model_type": "gemma3", "text_config": {**TINY, "model_type": "gemma3_text"}, "vision_config": VISION},
            "all-linear",
            None,
        ),
        ({**TINY, "model_type": "mixtral", "num_local_experts": 3}, ATTENTION, BOTH),
        ({**TINY, "model_type": "qwen3_moe", "head_dim": 32, **EXPERTS}, ATTENTION, BOTH),
        ({**TINY, "model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 3}, ATTENTION, BOTH),
        (MIXED, "all-linear", BOTH),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_shapes_are_those_that_loft_finds(settings, targets, parameters):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    config = peft.LoraConfig(r=4, target_modules=targets, target_parameters=parameters, task_type="CAUSAL_LM")
    adapted, shapes = peft.get_peft_model(model, config), shapes_of(settings)
    trainable = find_trainable(adapted)
    found = [(f.side, f.count, f.rank, f.experts) for f in trainable.factors]
    assert [(f.side, f.count, f.rank, f.experts) for f in shapes.factors(4)] == found
    assert shapes.untreated(4) == [p.numel() for p in trainable.others.values()]
    assert shapes.parameters == sum(p.numel() for p in adapted.parameters() if not p.requires_grad)


@pytest.mark.parametrize("adapter_rank", [4, 17])
def test_checkpoint_is_as_large_as_planned(adapter_rank, tmp_path):
    """The larger of one after a step of ``B`` and one after a step of ``A``, without what the files say of tensors."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**TINY))
    model = peft.get_peft_model(model, peft.LoraConfig(r=adapter_rank, target_modules="all-linear"))
    optimizer, sizes = LoFTAdamW(model), []
    for tag in ("first", "second"):
        for param in optimizer.trainable.parameters.values():
            param.grad = torch.randn_like(param)
        optimizer.step()
        files = save_checkpoint(optimizer, tmp_path, tag).glob("*.safetensors")
        sizes.append(sum(t.nbytes for file in files for t in safetensors.torch.load_file(file).values()))
    job = Job(adapter_rank, stage=0, precision=4)
    assert max(sizes) == checkpoint_bytes(division_of(shapes_of(TINY), job), job)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world", [8, 64, 512, 4096])
def test_state_is_balanced(world, stage):
    """Llama-3-405B: the optimizer's bytes of a rank are 1/N of the total, the largest share at most 1% above."""
    shapes, job = builtin("Llama-3-405B"), Job(64, world, stage)
    division = Division(shapes.factors(64), stage, world)
    assert sum(f.numel for f in division.factors) == int(division.elements.sum())
    planned = memory(shapes, job, division)
    own = sum(planned[kind] for kind in ("masters", "momentum", "second moments", "pending or before")).double()
    assert float(own.max()) < 1.01 * float(own.mean())
    # The (r, r) matrices are what ranks have in common: of their own layers, and of one that is cut.
    layers = 126 / world
    assert float(planned["bases"].max()) <= (math.ceil(layers) + 1) * 7 * 5 * 8 * 64**2


@pytest.mark.parametrize("name", ["Llama-3-8B", "Llama-3-405B"])
@pytest.mark.parametrize("world", [8, 64, 512, 4096])
def test_every_rank_works_on_every_step(name, world):
    """Rows of A and rows of B, and so the work of either's turn, are spread evenly: below 1.05 times the mean where a
    rank has hundreds of rows."""
    shapes = builtin(name)
    for stage in (2, 3):
        division = Division(shapes.factors(64), stage, world)
        for side in "AB":
            work = torch.zeros(world)
            for f in division.factors:
                owned = division.partitions[f].owned
                if f.side == side:
                    work[owned.ranks.start : owned.ranks.stop] += owned.edges.diff() * f.partner.count
            rows = sum(f.count for f in division.factors if f.side == side) / world
            # Each of the 7 matrices of one layer of the model or two may add a row.
            assert float(work.max() / work.mean()) < (1.05 if rows > 300 else 1.2), (stage, side)


@pytest.mark.parametrize("world", [8, 64, 512, 4096])
def test_collectives_do_not_grow(world):
    """As many collectives at 4096 ranks as at 8: not one a layer, and not one a bucket of all partners."""
    for adapter_rank, most in ((16, 14), (64, 11)):
        division = Division(builtin("Llama-3-405B").factors(adapter_rank), 3, world)
        assert traffic(division, world // 2).collectives <= most


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("name", "adapter_rank", "world"),
    [("SmolLM2-135M", 16, 37), ("SmolLM2-135M", 2, 37), ("Llama-3-8B", 64, 20), ("Qwen3-30B-A3B", 8, 6)],
)
def test_traffic_of_all_ranks_is_that_of_their_plans(name, adapter_rank, world, stage):
    """Kind by kind on every rank; all that is sent is received; and a plan is for the rank that receives most."""
    division = Division(builtin(name).factors(adapter_rank), stage, world)
    found, each = received(division), [traffic(division, rank) for rank in range(world)]
    for kind, of_ranks in found.items():
        assert of_ranks.tolist() == [getattr(t, kind) for t in each], kind
    assert sum(t.sent for t in each) == pytest.approx(sum(t.total for t in each), rel=1e-12)  # sums of floats
    planned = plan(builtin(name), Job(adapter_rank, world, stage), GPUS["H100"], 50e9)
    assert planned.traffic.total == max(t.total for t in each)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("name", "adapter_rank"), [("SmolLM2-135M", 16), ("Llama-3-8B", 64), ("Llama-3-405B", 64)])
@pytest.mark.parametrize("world", [8, 64, 512, 4096])
def test_traffic_is_near_the_least(name, adapter_rank, world, stage):
    """Every rank receives at most 1.2 times what the division of the rows demands, with every sum once, and a little
    more where it has as few as 75 rows, beside which the sums of a joint step are large; and less than gathering every
    partner on every rank would be."""
    division = Division(builtin(name).factors(adapter_rank), stage, world)
    found = received(division)
    total, sums = sum(found.values()), products(division, needed=True)
    few = division.elements.sum() / world < 100 * adapter_rank
    assert (total <= (1.25 if few else 1.2) * (total - found["products"] + sums)).all()
    everything = 4 * sum(f.numel for f in division.factors) / 2
    assert float(total.max()) < 0.6 * everything


def test_planning_does_not_grow_with_the_ranks():
    """What a rank keeps of the exchange is of the size of its share: runs, and the edges of what is near it."""
    division = Division(builtin("Llama-3-405B").factors(64), 3, 4096)
    edges = {id(cut.edges): cut.edges.numel() for p in division.partitions.values() for cut in (p.held, p.owned)}
    assert 8 * sum(edges.values()) < 2e6
    plan = plan_rows(list(division.partitions.values()), 2048, 4096)
    assert len(plan.send.starts) + len(plan.receive.starts) < sum(plan.send_counts) / 10


def test_command(capsys):
    """405 billion weights on 4096 GPUs, as a user asks for it."""
    main(["Llama-3-405B", "--rank", "64", "--nodes", "512", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["job"]["world"] == 4096
    assert found["memory"]["base weights"] == pytest.approx(2 * 405.85e9 / 4096, rel=0.05)  # norms are kept whole
    main(["Llama-3-8B", "--rank", "64", "--nodes", "8", "--offload", "second_moment"])
    text = capsys.readouterr().out
    assert "In CPU memory" in text
    assert "fits" in text


def test_command_imports_little():
    """Neither is needed for a built-in model, and each takes longer to import than the plan."""
    command = "import sys; from loft_ds.plan.__main__ import main; main(['Llama-3-405B', '--nodes', '512']); "
    command += "print(sorted({'deepspeed', 'peft', 'transformers', 'triton'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_fits():
    """A smaller GPU needs a higher stage or a smaller rank, and what is said to fit does, just."""
    shapes, job, gpu = builtin("Llama-3-70B"), Job(64, 64, 3), GPUS["A100-80GB"]
    assert smallest_stage(shapes, job, gpu) == 3  # 141 GB of weights
    assert smallest_stage(builtin("Llama-3-8B"), Job(16, 64), gpu) == 0
    small = dataclasses.replace(gpu, memory=0.98 * peak(shapes, dataclasses.replace(job, rank=512)) / 0.92)
    best = largest_rank(shapes, job, small)
    assert 256 < best < 512
    assert peak(shapes, dataclasses.replace(job, rank=best)) <= 0.92 * small.memory
    assert peak(shapes, dataclasses.replace(job, rank=best + 1)) > 0.92 * small.memory


def test_seconds_of_the_training_are_those_of_its_products():
    """Two operations a weight and token: forward, again for checkpointing, and for the gradient of the inputs; of
    adapters for that of the weights too. One rank alone sends nothing."""
    shapes, gpu = builtin("Llama-3-8B"), GPUS["H100"]
    seconds = plan(shapes, Job(16, 1, 0, tokens=1000), gpu, 50e9).seconds
    weights = shapes.adapted + shapes.vocabulary * shapes.hidden
    operations = 1000 * (6 * weights + 8 * sum(f.numel for f in shapes.factors(16)))
    assert seconds["training"] == pytest.approx(operations / (TRAINING_EFFICIENCY * gpu.bf16))
    assert seconds["LoFT's traffic"] == 0


def test_offload_moves_what_it_names():
    shapes, job = builtin("Llama-3-8B"), Job(64, 8, 3)
    here = plan(shapes, job, GPUS["H100"], 50e9)
    away = plan(shapes, dataclasses.replace(job, offload=frozenset({"second_moment"})), GPUS["H100"], 50e9)
    assert away.on_cpu == {"second moments": here.memory["second moments"]}
    assert away.peak == pytest.approx(here.peak - here.memory["second moments"] + 2 * CHUNK_BYTES)


def test_a_quantised_base_is_smaller(capsys):
    """4 bits and a float32 scale for 64 of them; what is no linear layer, and experts, stay as they are."""
    shapes, job = builtin("Llama-3-8B"), Job(16, 1, 0)
    linear = shapes.adapted
    whole, four, twice, eight = (
        float(memory(shapes, dataclasses.replace(job, quantised=kind))["base weights"])
        for kind in ("", "4bit", "4bit-double", "8bit")
    )
    assert whole - four == pytest.approx(linear * (2 - 0.5 - 4 / 64), rel=1e-5)
    assert four - twice == pytest.approx(linear * (3 / 64 - 4 / 64 / 256), rel=1e-3)
    assert whole - eight == pytest.approx(linear, rel=1e-3)
    experts = builtin("Mixtral-8x7B")
    mixed = memory(experts, dataclasses.replace(job, quantised="4bit"))["base weights"]
    assert float(mixed) > 0.9 * float(memory(experts, job)["base weights"])
    main(["Llama-3-8B", "--stage", "0", "--gpus-per-node", "1", "--load-in-4bit"])
    text = capsys.readouterr().out
    assert "frozen linear layers in 4bit" in text
    assert f"{four / 1e9:.3f} GB" in text


def test_a_quantised_base_travels_as_bytes():
    shapes, job = builtin("Llama-3-8B"), Job(16, 8, 3)
    before, after = (
        deepspeed_traffic(shapes, dataclasses.replace(job, quantised=kind))["parameters"] for kind in ("", "8bit")
    )
    assert 1.5 < before / after < 2


def test_experts_are_pairs():
    """Mixtral: 4 matrices of attention a layer, and two of each of 8 experts; a token meets two of the experts."""
    shapes = builtin("Mixtral-8x7B")
    assert sum(layer.experts for layer in shapes.layers) == 32 * (4 + 2 * 8)
    assert sum(f.experts for f in shapes.factors(16)) == 2 * 32 * (4 + 2 * 8)
    assert shapes.active / 1e9 == pytest.approx(12.6, abs=0.1)


def test_narrow_layers_are_left_to_adamw(capsys):
    """k_proj and v_proj of Llama-3-8B have 1024 outputs: at rank 1025 AdamW moves their adapters, of both moments."""
    shapes = builtin("Llama-3-8B")
    assert shapes.largest_rank == 1024
    assert len(shapes.factors(1024)) - len(shapes.factors(1025)) == 2 * 2 * 32
    main(["Llama-3-8B", "--rank", "1025", "--nodes", "8"])
    assert "64 matrices have fewer inputs or outputs" in capsys.readouterr().out
    planned = memory(shapes, Job(1025, 1, 3))
    treated = sum(f.numel for f in shapes.factors(1025))
    for kind in ("masters", "momentum"):
        assert int(planned[kind][0]) - 4 * treated == 4 * 64 * 1025 * (1024 + 4096)


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-model"],
        ["Llama-3-8B", "--rank", "5000"],
        ["Llama-3-8B", "--stage", "2", "--offload", "param"],
        ["Llama-3-8B", "--double-quant"],
    ],
)
def test_mistakes_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code not in (0, None)


def test_sweep(tmp_path, capsys):
    main(["SmolLM2-135M", "--offload", "optimizer", "--sweep", str(tmp_path / "sweep.png"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert {row["stage"] for row in rows} == {1, 2, 3}  # those at which DeepSpeed offloads it
    stage3 = [row for row in rows if row["stage"] == 3]
    assert [row["ranks"] for row in stage3] == [2**power for power in range(13)]
    assert stage3[-1]["GB"] < stage3[0]["GB"]


@pytest.mark.study
def test_scaling_quick(monkeypatch, capsys):
    """The benchmark itself, on ranks that it spawns: what should halve with two ranks does."""
    rows = scaling_main(["--quick"])
    one, two = (next(r for r in rows if r["stage"] == 3 and r["ranks"] == n) for n in (1, 2))
    for kind in ("gradients", "masters", "momentum", "second moments"):
        assert two[f"{kind} kB"] == pytest.approx(one[f"{kind} kB"] / 2)
    for row in rows:
        assert row["state x N / total"] == pytest.approx(1 if row["stage"] else row["ranks"], rel=0.01)
        for column, size in row["law"].items():
            assert row[column] == pytest.approx(size, rel=0.02), column
