#!/usr/bin/env bash
# PEFT on a model whose head is its embedding: ensure_weight_tying, and trainable_token_indices for the head.
# Guess: ensure_weight_tying makes merging right, and tokens trained in the head alone stay in the head.
# Seen: the tied update is merged once for each end, so twice; the head's tokens are merged into the embedding as well.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"

python - <<'EOF'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(64).reshape(4, 16)


def build(tied, **settings):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()
    weight = base.lm_head.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings})).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.1)
    return model, weight


def merge(model):
    """How far the output moves by merging, and the merged model."""
    with torch.no_grad():
        before = model(ids).logits
        merged = model.merge_and_unload()
        return (merged(ids).logits - before).abs().max().item() / before.abs().max().item(), merged


model, weight = build(True, target_modules=["lm_head"], ensure_weight_tying=True)
update = model.base_model.model.lm_head.get_delta_weight("default").detach()
error, merged = merge(model)
times = ((merged.lm_head.weight - weight).norm() / update.norm()).item()
print(f"ensure_weight_tying: output off by {error:.0%} after merging; the update was added {times:.2f} times")
assert error > 0.1 and torch.allclose(merged.lm_head.weight, weight + 2 * update, atol=1e-5)

for tied in (False, True):
    model, weight = build(tied, trainable_token_indices={"lm_head": [1, 2, 3]})
    rows = model.base_model.model.model.embed_tokens(torch.tensor([1, 2, 3])).detach()
    error, merged = merge(model)
    moved = (merged.model.embed_tokens.weight[1:4] - rows).abs().max().item()
    print(f"tokens of the head, tied={tied}: output off by {error:.1%}, embedding rows moved by {moved:.2f}")
    assert (error > 0.1 and moved > 0.1) if tied else (error < 1e-4 and moved == 0)
EOF
