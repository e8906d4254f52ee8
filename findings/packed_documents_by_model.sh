#!/usr/bin/env bash
# DataCollatorWithFlattening's packed sequence, with positions that begin anew; use_cache=False, SDPA or else eager.
# Guess: a model that takes position_ids keeps the documents apart by them, and one that cannot raises.
# Seen: Falcon, OPT, BioGPT, Qwen2-VL and 2.5-VL take them and mix. Bloom, MPT and layers without attention drop them.
# Versions: torch 2.13.0, transformers 5.23.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0"

python - <<'EOF'
import inspect

import torch
import transformers

FIRST, SECOND = 7, 6
collate = transformers.DataCollatorWithFlattening(return_tensors="pt")
tokens = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
few = dict(**tokens, hidden_size=32, num_hidden_layers=2)
small = dict(**few, intermediate_size=48, num_attention_heads=4)
rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
vision = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32)
grouped = dict(num_key_value_heads=2, head_dim=8)
linear = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
mixed = dict(layer_types=["linear_attention", "full_attention"])
# Class, configuration, and whether the documents stay apart.
models = [
    ("LlamaForCausalLM", "LlamaConfig", small, True),
    ("GPT2LMHeadModel", "GPT2Config", dict(**tokens, n_embd=32, n_layer=2, n_head=4), True),
    ("FalconForCausalLM", "FalconConfig", dict(**few, num_attention_heads=4), False),
    ("OPTForCausalLM", "OPTConfig", dict(**few, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32), False),
    ("BioGptForCausalLM", "BioGptConfig", small, False),
    ("BloomForCausalLM", "BloomConfig", dict(**tokens, hidden_size=32, n_layer=2, n_head=4), False),
    ("MptForCausalLM", "MptConfig", dict(**tokens, d_model=32, n_layers=2, n_heads=4), False),
    ("MambaForCausalLM", "MambaConfig", few, False),
    ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", dict(**small, **grouped, **linear, **mixed), False),
    ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
     dict(text_config=dict(**small, num_key_value_heads=2, rope_parameters=rope), vision_config=vision), False),
    ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
     dict(text_config=dict(**small, num_key_value_heads=2, rope_parameters=rope),
          vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)), False),
    ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
     dict(text_config=dict(**small, **grouped, rope_parameters=rope),
          vision_config=dict(**vision, deepstack_visual_indexes=[0])), True),
]  # fmt: skip


@torch.no_grad()
def move(model, planes=None):
    """How far the second document's logits move when the first becomes another, as a part of the largest logit."""
    second = list(range(40, 40 + SECOND))
    logits = []
    for start in (3, 20):
        packed = collate([{"input_ids": list(range(start, start + FIRST))}, {"input_ids": second}])
        if planes:
            packed["position_ids"] = packed["position_ids"].expand(planes, 1, -1)
        logits.append(model(**packed, use_cache=False).logits[0, FIRST:])
    return ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item()


print("how far a document's logits move with the document before it")
for name, config, settings, apart in models:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    moved = move(model)
    named = "position_ids" in inspect.signature(model.forward).parameters
    print(f"{name:>34}: {moved:.4f}, position_ids {'is an argument' if named else 'is no argument'}")
    assert moved < 1e-6 if apart else moved > 1e-3
    if name.startswith(("Qwen2_5_VL", "Qwen2VL")):
        # Text positions in front of those for time, height and width.
        moved = move(model, planes=4)
        print(f"{'with positions in four planes':>34}: {moved:.4f}")
        assert moved < 1e-6
EOF
