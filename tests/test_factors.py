"""What is a factor pair, what goes to AdamW with a warning, what is refused."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from loft_ds import LoFTAdamW
from loft_ds.adapters import find_trainable


class Zoo(nn.Module):
    """One layer of every kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 6)
        self.gpt2 = Conv1D(5, 6)  # weight (6, 5): in, out
        self.convolution = nn.Conv1d(1, 4, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        return self.head(self.gpt2(torch.relu(self.linear(self.embedding(ids)))))


def lora(*targets, **kwargs):
    return get_peft_model(Zoo(), LoraConfig(r=2, target_modules=list(targets), **kwargs))


def names(trainable):
    return [a.name.removeprefix("base_model.model.").split(".")[0] for a, _ in trainable.pairs]


def test_pairs_have_their_layers_shapes():
    trainable = find_trainable(lora("linear", "gpt2", lora_alpha=6, bias="all", modules_to_save=["head"]))
    assert names(trainable) == ["linear", "gpt2"]
    assert [(a.count, b.count, a.rank, a.scaling) for a, b in trainable.pairs] == [(8, 6, 2, 3.0), (6, 5, 2, 3.0)]
    assert any("modules_to_save" in name for name in trainable.others)
    assert any(name.endswith("bias") for name in trainable.others)
    assert not trainable.untreated


def test_conv1d_of_gpt2_moves_as_under_adamw():
    """fan_in_fan_out stores W transposed; at full rank its merged weight is AdamW's all the same."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(Conv1D(6, 6)), LoraConfig(r=6, lora_alpha=3, target_modules=["0"], fan_in_fan_out=True)
    ).double()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    twin = nn.Parameter((layer.base_layer.weight + layer.get_delta_weight("default")).detach())
    loft, adamw = LoFTAdamW(model, lr=1e-3), torch.optim.AdamW([twin], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        x = torch.randn(9, 6, dtype=torch.float64)
        model(x).square().mean().backward()
        (x @ twin + layer.base_layer.bias).square().mean().backward()
        for optimizer in (loft, adamw):
            optimizer.step()
            optimizer.zero_grad()
    merged = model.merge_and_unload()[0].weight
    # 1e-8: float64 rounding times the condition of the random factors' Gram matrices.
    assert float((merged - twin).norm() / twin.norm()) < 1e-8


def test_several_adapters():
    model = lora("linear")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["linear", "gpt2"], use_rslora=True, lora_alpha=3))
    assert names(find_trainable(model)) == ["linear"], "a frozen adapter is not trained"
    model.base_model.set_adapter(["default", "second"])
    trainable = find_trainable(model)
    assert names(trainable) == ["linear", "linear", "gpt2"]
    assert [a.rank for a, _ in trainable.pairs] == [2, 3, 3]
    assert trainable.pairs[1][0].scaling == pytest.approx(3**0.5)


@pytest.mark.parametrize(
    ("targets", "config", "named"),
    [
        (["linear", "embedding"], {}, "embedding.lora_embedding_A.default (lora.Embedding)"),
        (["linear", "convolution"], {}, "convolution.lora_A.default.weight (lora.Conv1d)"),
        (
            ["linear", "head"],
            {"rank_pattern": {"head": 4}},
            "head.lora_A.default.weight (rank 4 in a layer of 5 inputs",
        ),
    ],
)
def test_untreated_adapters_are_named_once(targets, config, named):
    model = lora(*targets, **config)
    with pytest.warns(UserWarning, match="AdamW moves them") as caught:
        LoFTAdamW(model)
    assert len([w for w in caught if "AdamW moves them" in str(w.message)]) == 1
    assert named in str(caught[0].message)


def test_dora_is_left_to_adamw_or_refused_where_nothing_is_left():
    model = lora("linear")
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["gpt2"], use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    with pytest.warns(UserWarning, match=r"gpt2\.lora_magnitude_vector\.dora\.weight \(DoraLinear\)"):
        LoFTAdamW(model)
    with pytest.raises(ValueError, match="kinds LoFT does not treat: \\['DoraLinear'\\]"):
        LoFTAdamW(lora("linear", use_dora=True))


def test_other_methods_are_refused():
    model = get_peft_model(Zoo(), IA3Config(target_modules=["linear"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"no trainable LoRA pair.*\n?.*LoraConfig"):
        LoFTAdamW(model)
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        LoFTAdamW(Zoo())


def test_shared_factors_are_refused():
    model = lora("linear", "head")
    layers = model.base_model.model
    layers.head.lora_B["default"] = nn.Linear(2, 6, bias=False)
    layers.head.lora_B["default"].weight = layers.linear.lora_B["default"].weight
    with pytest.raises(ValueError, match=r"linear\.lora_B\.default\.weight is shared by .*linear and .*head"):
        LoFTAdamW(model)


def test_half_frozen_pairs_are_refused():
    model = lora("linear")
    model.base_model.model.linear.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"lora_A of .*linear\.lora_B\.default\.weight is frozen"):
        LoFTAdamW(model)
