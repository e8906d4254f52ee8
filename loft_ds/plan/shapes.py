"""The shapes of a model: of what LoFT trains and of what is frozen, read from a configuration without any weights."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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


@dataclass(frozen=True)
class Shapes:
    """What a plan needs to know of a model.

    Attributes:
        name: the model's.
        layers: each adapted matrix with the layer's path: (path, outputs m, inputs n). An expert is a layer.
        weights: numbers of elements of the frozen parameters, and how many there are of each.
        hidden: features between layers.
        depth: decoder layers.
        vocabulary: entries.
        active: the part of the adapted matrices' elements that takes part in a token (experts).
    """

    name: str
    layers: tuple[tuple[str, int, int], ...]
    weights: Counter[int]
    hidden: int
    depth: int
    vocabulary: int
    active: int

    @property
    def parameters(self) -> int:
        """Frozen weights, all of them."""
        return sum(numel * count for numel, count in self.weights.items())

    @property
    def largest_rank(self) -> int:
        """Above it a layer has fewer inputs or outputs than the adapter's rank, and LoFT leaves it to AdamW."""
        return min(min(m, n) for _, m, n in self.layers)

    def factors(self, rank: int) -> list[Factor]:
        """The factors that :func:`loft_ds.adapters.find_trainable` finds with adapters on all these layers.

        Raises:
            ValueError: a rank that one of the layers is too small for.
        """
        if not 1 <= rank <= self.largest_rank:
            raise ValueError(f"rank {rank}: {self.name} has a layer with {self.largest_rank} inputs or outputs")
        found = []
        for path, m, n in self.layers:
            none = cast(Any, None)  # there are no tensors and no layers
            a = Factor(f"{path}.lora_A.weight", none, "A", n, rank, none, "")
            b = Factor(f"{path}.lora_B.weight", none, "B", m, rank, none, "")
            a.partner, b.partner = b, a
            found += [a, b]
        return found


def shapes_of(model: str | dict[str, Any]) -> Shapes:
    """The shapes of a model with adapters on every linear layer but the head, and on every expert.

    Args:
        model: a built-in name, a config.json or its folder, a hub name, or what a config.json says.

    Raises:
        OSError: none of these.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    builtin = {name.lower(): settings for name, settings in BUILTIN.items()}
    settings = builtin.get(model.lower()) if isinstance(model, str) else model
    if settings is None and Path(str(model)).is_file():
        settings = json.loads(Path(str(model)).read_text())
    config = AutoConfig.from_pretrained(model) if settings is None else AutoConfig.for_model(**settings)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    head = built.get_output_embeddings()
    top_k = getattr(config, "num_experts_per_tok", None)
    layers: list[tuple[str, int, int]] = []
    active = 0
    for path, module in built.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            layers.append((path, module.out_features, module.in_features))
            active += module.weight.numel()
        for name, p in module.named_parameters(recurse=False):
            if p.ndim == 3:  # (experts, out, in)
                layers += [(f"{path}.{name}[{expert}]", p.shape[1], p.shape[2]) for expert in range(len(p))]
                active += p[0].numel() * (top_k or len(p))
    return Shapes(
        name=model if isinstance(model, str) else config.model_type,
        layers=tuple(layers),
        weights=Counter(p.numel() for p in built.parameters()),
        hidden=config.hidden_size,
        depth=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        active=active,
    )
