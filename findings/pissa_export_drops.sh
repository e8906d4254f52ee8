#!/usr/bin/env bash
# PEFT: an adapter that started from PiSSA (or OLoRA, orthogonal), exported as one for the original base weights by
# save_pretrained(path_initial_model_for_weight_conversion=...).
# Guess: the export holds what the adapter was trained to, only in another form.
# Seen: it holds factors of linear layers alone. Embedding adapters, a trained head and trained tokens are left out.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"

python - <<'EOF'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(64).reshape(4, 16)


def build():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def export(**settings):
    """Files with and without the conversion, and what comes of loading the converted one."""
    config = LoraConfig(**{"r": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj"], **settings})
    model = get_peft_model(build(), config).eval()
    model.save_pretrained("start")
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.05)
    model.save_pretrained("plain")
    model.save_pretrained("converted", path_initial_model_for_weight_conversion="start")
    lost = set(load_file("plain/adapter_model.safetensors")) - set(load_file("converted/adapter_model.safetensors"))
    with torch.no_grad():
        truth = model(ids).logits
        try:
            loaded = PeftModel.from_pretrained(build(), "converted").eval()
        except KeyError as error:
            return lost, f"raises KeyError {error}"
        return lost, (loaded(ids).logits - truth).abs().max().item() / truth.abs().max().item()


lost, off = export()
print(f"linear layers alone: lost {len(lost)}, output off by {off:.1e}")
assert not lost and off < 1e-5

lost, off = export(target_modules=["q_proj", "embed_tokens"])
print(f"with an adapter on the embedding: lost {sorted(lost)}, loads, and the output is off by {off:.0%}")
assert any("lora_embedding_A" in key for key in lost) and off > 0.1

for settings in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [1, 2, 3]}}):
    lost, result = export(**settings)
    print(f"with {settings}: lost {sorted(lost)}; loading {result}")
    assert len(lost) == 1 and "KeyError" in result
EOF
