"""The shapes of a model: of what LoFT trains and of what is frozen, read from a configuration without any weights."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..factors import Factor

QWEN3_MOE = {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
_MODELS: list[tuple[str, str, int, int, int, int, int, int, dict[str, Any]]] = [
    ("SmolLM2-135M", "llama", 49152, 576, 1536, 30, 9, 3, {"tie_word_embeddings": True}),
    ("Llama-3-8B", "llama", 128256, 4096, 14336, 32, 32, 8, {}),
    ("Llama-3-70B", "llama", 128256, 8192, 28672, 80, 64, 8, {}),
    ("Llama-3-405B", "llama", 128256, 16384, 53248, 126, 128, 8, {}),
    ("Mistral-7B", "mistral", 32768, 4096, 14336, 32, 32, 8, {}),
    ("Mixtral-8x7B", "mixtral", 32000, 4096, 14336, 32, 32, 8, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("Qwen2.5-7B", "qwen2", 152064, 3584, 18944, 28, 28, 4, {}),
    ("Qwen2.5-72B", "qwen2", 152064, 8192, 29568, 80, 64, 8, {}),
    ("Qwen3-32B", "qwen3", 151936, 5120, 25600, 64, 64, 8, {"head_dim": 128}),
    ("Qwen3-30B-A3B", "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, QWEN3_MOE),
]

# The published config.json of each, as far as it decides shapes.
BUILTIN: dict[str, dict[str, Any]] = {
    name: {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        **more,
    }
    for name, kind, vocabulary, hidden, intermediate, layers, heads, kv_heads, more in _MODELS
}


class Layer(NamedTuple):
    """An adapted matrix (m, n), or E of them in one parameter: a layer's experts."""

    path: str
    outputs: int
    inputs: int
    experts: int = 1

    @property
    def numel(self) -> int:
        return self.outputs * self.inputs * self.experts

    @property
    def largest_rank(self) -> int:
        """Above it the adapter is wider than the matrix, and LoFT leaves it to AdamW."""
        return min(self.outputs, self.inputs)


@dataclass(frozen=True)
class Shapes:
    """What a plan needs to know of a model.

    Attributes:
        name: the model's.
        layers: the adapted ones, in the order in which LoFT finds them.
        weights: numbers of elements of the frozen parameters, and how many there are of each.
        hidden: features between layers.
        depth: decoder layers.
        vocabulary: entries.
        chosen: experts that take part in a token.
    """

    name: str
    layers: tuple[Layer, ...]
    weights: Counter[int]
    hidden: int
    depth: int
    vocabulary: int
    chosen: int

    @property
    def parameters(self) -> int:
        """Frozen weights, all of them."""
        return sum(numel * count for numel, count in self.weights.items())

    @property
    def adapted(self) -> int:
        """Elements of the adapted matrices."""
        return sum(layer.numel for layer in self.layers)

    @property
    def active(self) -> int:
        """The part of them that takes part in a token."""
        return sum(layer.numel * min(self.chosen, layer.experts) // layer.experts for layer in self.layers)

    @property
    def largest_rank(self) -> int:
        """Above it LoFT leaves more than a hundredth of the adapted elements to AdamW."""
        left = 0
        for layer in sorted(self.layers, key=lambda layer: layer.largest_rank):
            left += layer.numel
            if 100 * left > self.adapted:
                break
        return layer.largest_rank

    def factors(self, rank: int) -> list[Factor]:
        """The factors that :func:`loft_ds.adapters.find_trainable` finds with adapters on all these layers.

        Raises:
            ValueError: a rank that all layers are too small for.
        """
        found = []
        for path, m, n, experts in (layer for layer in self.layers if 1 <= rank <= layer.largest_rank):
            none = cast(Any, None)  # there are no tensors and no layers
            a = Factor(f"{path}.lora_A.weight", none, "A", n, rank, none, "", experts)
            b = Factor(f"{path}.lora_B.weight", none, "B", m, rank, none, "", experts)
            a.partner, b.partner = b, a
            found += [a, b]
        if not found:
            raise ValueError(f"rank {rank}: every layer of {self.name} has fewer inputs or outputs")
        return found

    def untreated(self, rank: int) -> list[int]:
        """Elements of each parameter of the adapters that LoFT leaves to AdamW, A and B of each layer."""
        return [rank * layer.experts * k for layer in self.small(rank) for k in (layer.inputs, layer.outputs)]

    def small(self, rank: int) -> list[Layer]:
        """The layers that LoFT leaves to AdamW."""
        return [layer for layer in self.layers if rank > layer.largest_rank]


def shapes_of(model: str | dict[str, Any]) -> Shapes:
    """The shapes of a model with adapters of one rank on every linear layer but the head, and on every expert.

    For the experts that is PEFT's ``target_parameters``, all of them. (Its "all-linear" gives those of some models,
    Mixtral and Qwen3-MoE among them, ``gate_up_proj`` of twice the rank, and the router one too.)

    Args:
        model: a built-in name, a config.json or its folder, a hub name, or what a config.json says.

    Raises:
        OSError: none of these.
    """
    builtin = {name.lower(): settings for name, settings in BUILTIN.items()}
    if isinstance(model, dict):
        return build(model["model_type"], model)
    if model.lower() in builtin:
        return derive(model, builtin[model.lower()])
    return build(model, json.loads(Path(model).read_text()) if Path(model).is_file() else None)


def derive(name: str, settings: dict[str, Any]) -> Shapes:
    """The shapes of a built-in model by arithmetic: :func:`build` would import transformers."""
    kind, depth, vocabulary = (settings[key] for key in ("model_type", "num_hidden_layers", "vocab_size"))
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    head = settings.get("head_dim", hidden // heads)
    q, kv = heads * head, settings["num_key_value_heads"] * head
    inner = settings.get("moe_intermediate_size", settings["intermediate_size"])
    experts = settings.get("num_experts", settings.get("num_local_experts", 1))
    block = [
        Layer("self_attn.q_proj", q, hidden),
        Layer("self_attn.k_proj", kv, hidden),
        Layer("self_attn.v_proj", kv, hidden),
        Layer("self_attn.o_proj", hidden, q),
    ]
    rest = [hidden, hidden]  # norms
    if experts == 1:
        block += [Layer("mlp.gate_proj", inner, hidden), Layer("mlp.up_proj", inner, hidden)]
        block += [Layer("mlp.down_proj", hidden, inner)]
    else:
        block += [Layer("mlp.experts.down_proj", hidden, inner, experts)]
        block += [Layer("mlp.experts.gate_up_proj", 2 * inner, hidden, experts)]
        rest += [experts * hidden]  # the router's
    rest += [q, kv, kv] if kind == "qwen2" else [head, head] if kind.startswith("qwen3") else []  # biases, norms
    ends = [hidden] + [vocabulary * hidden] * (1 if settings["tie_word_embeddings"] else 2)
    return Shapes(
        name=name,
        layers=tuple(layer._replace(path=f"model.layers.{i}.{layer.path}") for i in range(depth) for layer in block),
        weights=Counter([*[layer.numel for layer in block], *rest] * depth + ends),
        hidden=hidden,
        depth=depth,
        vocabulary=vocabulary,
        chosen=settings.get("num_experts_per_tok", 1),
    )


def build(name: str, settings: dict[str, Any] | None = None) -> Shapes:
    """The shapes of any model that transformers knows, built without weights.

    Args:
        name: the model's; where there are no ``settings`` a folder or a hub name.
        settings: what a config.json says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(name) if settings is None else AutoConfig.for_model(**settings)
    text = config.get_text_config()  # of a model with images, the part that is one of language
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    head = built.get_output_embeddings()
    layers = []
    for path, module in built.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            layers.append(Layer(path, module.out_features, module.in_features))
        elif isinstance(module, Conv1D):
            layers.append(Layer(path, *reversed(module.weight.shape)))
        elif hasattr(module, "num_experts"):
            own = [(p_name, p) for p_name, p in module.named_parameters(recurse=False) if p.ndim == 3]
            for p_name, p in reversed(own):  # PEFT wraps one after the other, and the last one is met first
                m, n = reversed(p.shape[1:]) if getattr(module, "is_transposed", False) else p.shape[1:]
                layers.append(Layer(f"{path}.{p_name}", m, n, len(p)))
    return Shapes(
        name=name,
        layers=tuple(layers),
        weights=Counter(p.numel() for p in built.parameters()),
        hidden=text.hidden_size,
        depth=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        chosen=getattr(text, "num_experts_per_tok", None) or max(layer.experts for layer in layers),
    )
