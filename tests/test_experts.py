"""Mixture of experts: PEFT's ``target_parameters`` adapters are one pair an expert, at every ZeRO stage."""

import functools
import warnings

import pytest
import torch
from models import moments, relative, trained
from peft import LoraConfig, PeftModel, get_peft_model
from sharded_run import Outcome
from test_sharded import assert_equal
from torch import Tensor, nn

import loft_ds
from loft_ds import Blocks, LoFTAdamW, algebra
from loft_ds.adapters import find_trainable
from loft_ds.reference import Reference

BETAS = (0.9, 0.99)


class Experts(nn.Module):
    """E matrices in one parameter (E, m, n), or (E, n, m) where ``is_transposed`` tells PEFT so."""

    def __init__(self, experts: int, m: int, n: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (n, m) if is_transposed else (m, n)
        self.weight = nn.Parameter(torch.randn(experts, *shape))

    def matrices(self, weight: Tensor) -> Tensor:
        return weight.mT if self.is_transposed else weight

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return torch.einsum("bmn,bn->bm", self.matrices(self.weight)[chosen], x)


class Mixture(nn.Module):
    def __init__(self, *args) -> None:
        super().__init__()
        self.experts = Experts(*args)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return self.experts(x, chosen)


def mixture(experts: int, m: int, n: int, rank: int, is_transposed: bool = False) -> tuple[PeftModel, Experts]:
    """An adapted mixture in float64, both factors random."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=3, target_modules=[], target_parameters=["experts.weight"])
    model = get_peft_model(Mixture(experts, m, n, is_transposed), config).double()
    layer = model.base_model.model.experts
    nn.init.normal_(layer.lora_A["default"].weight)
    nn.init.normal_(layer.lora_B["default"].weight)
    return model, layer


def tokens(step: int, m: int, n: int, experts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    chosen = torch.tensor(experts)[torch.randint(len(experts), (24,), generator=generator)]
    x, y = (torch.randn(24, size, generator=generator, dtype=torch.float64) for size in (n, m))
    return x, chosen, y


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
def test_every_expert_moves_as_under_adamw(experts, is_transposed):
    """At full rank W is AdamW's on the 3-D weight. The last expert gets no token in every second step, and AdamW moves
    it on by its momentum: its gradient is zero, not absent.
    """
    size = 4
    model, layer = mixture(experts, size, size, size, is_transposed)
    base = layer.get_base_layer()
    twin = nn.Parameter((base.weight + layer.get_delta_weight("default")).detach().clone())
    loft, adamw = (
        LoFTAdamW(model, lr=1e-3, betas=BETAS),
        torch.optim.AdamW([twin], lr=1e-3, betas=BETAS, weight_decay=0),
    )
    for step in range(20):
        x, chosen, y = tokens(step, size, size, list(range(experts if step % 2 == 0 else max(1, experts - 1))))
        (model(x, chosen) - y).square().mean().backward()
        (torch.einsum("bmn,bn->bm", base.matrices(twin)[chosen], x) - y).square().mean().backward()
        before = twin.detach().clone()
        for optimizer in (loft, adamw):
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(before[-1], twin[-1]), "the idle expert has to move for this to say anything"
    merged = base.weight + layer.get_delta_weight("default")
    # 1e-8: float64 rounding times the condition of the random factors' Gram matrices.
    assert relative(merged, twin) < 1e-8


VARIANTS = {
    "default": Blocks(),
    "alternate": Blocks(turns="alternate"),
    "published": Blocks.published(),
    "elementwise": Blocks(second_moment="elementwise"),
    "factor": Blocks(projected_update=False),
    "unscaled": Blocks(gradient_scaling=False),
    "uncalibrated": Blocks(second_moment_calibration=False),
    "unbalanced": Blocks(balancing=False),
}


@pytest.mark.parametrize("offload", [False, True])
def test_experts_are_taken_some_at_a_time(offload, monkeypatch):
    """More of them than a stack is to hold: each by itself here."""
    monkeypatch.setattr(loft_ds.pairs, "STACK_BYTES", 1)
    monkeypatch.setattr(loft_ds.kernels.stream, "CHUNK_BYTES", 50)
    assert_references(offload_second_moment=offload)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_expert_is_the_references_pair(variant):
    assert_references(blocks=VARIANTS[variant])


def test_experts_are_balanced_each_when_it_needs_it(monkeypatch):
    """One whose factors are of very different lengths, and on every step."""
    assert_references(lengths=[1.0, 1.0, 1e-3])
    monkeypatch.setattr(algebra, "SLACK", 0.0)
    assert_references(lengths=[1.0, 1e-3, 1.0])


def assert_references(lengths=(1.0, 1.0, 1.0), offload_second_moment=False, **kwargs):
    """Of odd shapes; the middle expert never gets a token. ``lengths`` are those of each expert's ``B``."""
    experts, m, n, r = 3, 7, 5, 2
    model, layer = mixture(experts, m, n, r)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        B.view(m, -1, experts).mul_(torch.tensor(lengths))

    def pair(a: Tensor, b: Tensor, e: int) -> tuple[Tensor, Tensor]:
        """PEFT's way to find an expert's factors, from ParamWrapper.get_delta_weight."""
        return a.reshape(experts, -1, n)[e].detach(), b.reshape(m, -1, experts)[..., e].detach()

    settings = {"lr": 1e-2, "betas": BETAS, "weight_decay": 0.1} | kwargs
    references = [Reference(*pair(A, B, e), layer.scaling["default"], **settings) for e in range(experts)]
    optimizer = LoFTAdamW(model, offload_second_moment=offload_second_moment, **settings)
    for step in range(6):
        x, chosen, y = tokens(step, m, n, [0, 2])
        (model(x, chosen) - y).square().mean().backward()
        for e, reference in enumerate(references):
            reference.step(*pair(A.grad, B.grad, e))
        optimizer.step()
        optimizer.zero_grad()
        # Inverse Gram matrices there, orthonormal coordinates here: float64 times their condition.
        assert optimizer.grad_norm == pytest.approx(sum(each.norm**2 for each in references) ** 0.5, rel=1e-12)
        for e, reference in enumerate(references):
            a, b = pair(A, B, e)
            assert relative(a.T, reference.X["A"]) < 1e-10
            assert relative(b, reference.X["B"]) < 1e-10


# --- real models ---


def mixtral(size: int = 12, **config) -> PeftModel:
    """Four experts of which a token takes two; nested wrappers on two parameters, and pairs of ordinary layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    # Sizes that torch's grouped product takes, whose rows are to begin at multiples of 16 bytes.
    base = MixtralForCausalLM(
        MixtralConfig(vocab_size=32, hidden_size=size, intermediate_size=8, num_hidden_layers=1, **settings)
    )
    return adapted(base, **config)


def gpt_oss(**config) -> PeftModel:
    """The same stored the other way round: ``is_transposed``."""
    from transformers import GptOssConfig, GptOssForCausalLM

    settings = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    size = {"hidden_size": 12, "intermediate_size": 8, "head_dim": 4}
    torch.manual_seed(0)
    return adapted(GptOssForCausalLM(GptOssConfig(vocab_size=32, num_hidden_layers=1, **size, **settings)), **config)


def adapted(base: nn.Module, targets=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), **config) -> PeftModel:
    model = get_peft_model(
        base,
        LoraConfig(
            **{"r": 3, "rank_pattern": {"q_proj": 1}, "target_modules": ["q_proj"]} | config,
            target_parameters=list(targets),
        ),
    )
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.3)
    return model


def ids(step: int) -> Tensor:
    return torch.randint(32, (12, 6), generator=torch.Generator().manual_seed(step))


@functools.cache
def plain(steps: int) -> Outcome:
    model = mixtral()
    optimizer = LoFTAdamW(model, lr=1e-3, betas=BETAS, max_grad_norm=0.2)
    norms, losses = [], []
    for step in range(steps):
        loss = model(input_ids=ids(step), labels=ids(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.grad_norm)
        losses.append(loss.item())
    return Outcome({n: p.detach().clone() for n, p in trained(model).items()}, moments(optimizer), norms, losses)


def train(rank, world, stage, until, *, resume=None, save=None, export=None, zero=None, **kwargs) -> Outcome:
    """The same on ``world`` ranks, from a checkpoint and into one."""
    import deepspeed

    model = mixtral()
    optimizer = LoFTAdamW(model, lr=1e-3, betas=BETAS, **kwargs)
    config = {
        "train_micro_batch_size_per_gpu": 12 // world,
        "gradient_clipping": 0.2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(zero or {})},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if resume is not None:
        loft_ds.load_checkpoint(engine, resume)
    part = slice(rank * (12 // world), (rank + 1) * (12 // world))
    for step in range(engine.global_steps, until):
        engine.backward(engine(input_ids=ids(step)[part], labels=ids(step)[part]).loss)
        engine.step()
    if save is not None:
        loft_ds.save_checkpoint(engine, save)
    if export is not None:
        loft_ds.export_adapter(engine, export)
    params = {}
    for name, p in trained(model).items():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            params[name] = p.detach().clone()
    outcome = Outcome(params, moments(optimizer), [float(engine.get_global_grad_norm() or 0)], [])
    for factor, partition in getattr(optimizer.attach(), "_partitions", {}).items():
        if factor.experts > 1 and any(int(b) % factor.width for b in partition.held.edges):
            outcome.cuts.append(factor.name)
    engine.destroy()
    return outcome


# float32 sums in another order, over the ranks; as in test_sharded.py.
TOLERANCE = 1e-5


@pytest.mark.parametrize(("world", "stage"), [(2, 0), (2, 3), (3, 1), (3, 2), (3, 3)])
def test_equals_one_process(ranks, world, stage):
    outcomes = ranks(world)(train, stage, 6)
    assert_equal(outcomes, plain(6), stage, TOLERANCE)
    assert outcomes[0].norms[-1] == pytest.approx(plain(6).norms[-1], rel=1e-4)
    if world == 3:  # whose number divides no row
        assert outcomes[0].cuts, "no boundary falls inside a feature row of experts: the test misses its point"


def test_nothing_is_kept_whole(ranks):
    """Stage 3 that gathers every parameter for each use, also those that PEFT reads beside their module's forward."""
    zero = {"stage3_param_persistence_threshold": 0}
    assert_equal(ranks(2)(train, 3, 6, zero=zero), plain(6), 3, TOLERANCE)


@pytest.mark.parametrize(("first", "offload"), [(3, False), (4, True)])
def test_same_ranks_bitwise(ranks, tmp_path, first, offload):
    whole = ranks(2)(train, 3, 6)[0].params
    ranks(2)(train, 3, first, save=tmp_path, offload_second_moment=offload)
    resumed = ranks(2)(train, 3, 6, resume=tmp_path, offload_second_moment=not offload)[0].params
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("saved", "loaded"), [((2, 2), (3, 3)), ((3, 3), (2, 0)), ((2, 0), (3, 1))])
def test_other_ranks_and_stages(ranks, tmp_path, saved, loaded):
    ranks(saved[0])(train, saved[1], 3, save=tmp_path)
    assert_equal(ranks(loaded[0])(train, loaded[1], 6, resume=tmp_path), plain(6), loaded[1], TOLERANCE)


def test_peft_in_peft_out(ranks, tmp_path):
    """What is exported is what was trained, to PEFT."""
    params = ranks(2)(train, 3, 4, export=tmp_path)[0].params
    base = mixtral().unload()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for name, p in params.items():
        assert torch.equal(dict(loaded.named_parameters())[name], p), name
    own = mixtral()
    for name, p in trained(own).items():
        p.data.copy_(params[name])
    assert torch.equal(loaded(input_ids=ids(0)).logits, own(input_ids=ids(0)).logits)


@pytest.mark.parametrize("model", [mixtral, gpt_oss])
def test_real_models_learn(model):
    """Every adapter parameter is LoFT's, and the loss of one batch falls."""
    model = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = LoFTAdamW(model, lr=1e-2)
    assert [f.experts for f, _ in optimizer.trainable.pairs] == [1, 4, 4]
    assert not optimizer.trainable.untreated
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids(0), labels=ids(0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03


def test_two_dimensional_parameters_are_pairs():
    """PEFT may target the matrix of any layer: that is the same adapter as on the layer."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 6, bias=False)),
        LoraConfig(r=6, lora_alpha=3, target_modules=[], target_parameters=["0.weight"]),
    ).double()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    twin = nn.Parameter((layer.get_param() + layer.get_delta_weight("default")).detach().clone())
    loft, adamw = LoFTAdamW(model, lr=1e-3), torch.optim.AdamW([twin], lr=1e-3, weight_decay=0.0)
    for step in range(20):
        x, _, y = tokens(step, 6, 6, [0])
        (model(x) - y).square().mean().backward()
        (x @ twin.T - y).square().mean().backward()
        for optimizer in (loft, adamw):
            optimizer.step()
            optimizer.zero_grad()
    assert relative(layer.get_param() + layer.get_delta_weight("default"), twin) < 1e-8


def test_more_directions_than_an_expert_has():
    """Rank 9 for experts of 8 inputs is AdamW's, as for any other layer; the other parameter's stay LoFT's."""
    model = mixtral(r=9)
    with pytest.warns(UserWarning, match=r"rank 9 in a layer of 8 inputs and 12 outputs"):
        optimizer = LoFTAdamW(model)
    assert [f.rank for f in optimizer.trainable.factors if f.experts == 4] == [9, 9]


def test_several_adapters():
    """Both trained adapters of a wrapper, of ranks of their own."""
    model = mixtral()
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    trainable = find_trainable(model)
    assert sorted((a.experts, a.rank) for a, _ in trainable.pairs) == [(1, 1), (1, 2), (4, 2), (4, 2), (4, 3), (4, 3)]


def test_other_experts_are_strangers(tmp_path):
    """Four experts of rank 3 and two of rank 6 have parameters of the same shape."""
    model, _ = mixture(4, 7, 6, 3)
    optimizer = LoFTAdamW(model)
    loft_ds.save_checkpoint(optimizer, tmp_path)
    other, _ = mixture(2, 7, 6, 6)
    with pytest.raises(loft_ds.CheckpointError, match="has experts 4, in this model 2"):
        loft_ds.load_checkpoint(LoFTAdamW(other), tmp_path)
