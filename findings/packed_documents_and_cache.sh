#!/usr/bin/env bash
# DataCollatorWithFlattening packs documents into one sequence, with positions that begin anew, under SDPA.
# Guess: the positions keep a document from seeing the one before it, whatever the cache and a mask of ones.
# Seen: with the default use_cache=True they do not, in train() too. The Trainer switches off LLaVA's outer cache alone.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0"

python - <<'EOF'
import logging

import torch
from transformers import (
    CLIPVisionConfig,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

FIRST, SECOND = 7, 6
text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
images = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                          image_size=16, patch_size=8)  # fmt: skip
llava = LlavaConfig(text_config=LlamaConfig(**text), vision_config=images)
models = {
    "Llama": (LlamaForCausalLM, LlamaConfig(**text)),
    "LLaVA, on text": (LlavaForConditionalGeneration, llava),
}
collate = DataCollatorWithFlattening(return_tensors="pt")
ones = torch.ones(1, FIRST + SECOND, dtype=torch.long)
said = []
listener = logging.Handler()
listener.emit = said.append


@torch.no_grad()
def move(model, **settings):
    """How far the second document's logits move when the first becomes another, as a part of the largest logit."""
    second = list(range(40, 40 + SECOND))
    logits = []
    for start in (0, 20):
        packed = collate([{"input_ids": list(range(start, start + FIRST))}, {"input_ids": second}])
        assert "attention_mask" not in packed and packed["position_ids"][0, FIRST] == 0
        logits.append(model(**packed, **settings).logits[0, FIRST:])
    return ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item()


print("how far a document's logits move with the document before it, in training mode")
for name, (cls, config) in models.items():
    torch.manual_seed(0)
    model = cls(config).train()
    assert model.get_decoder().config._attn_implementation == "sdpa"
    logger = logging.getLogger("transformers")
    logger.setLevel("WARNING")
    logger.addHandler(listener)
    seen = {"as it is": move(model)}
    assert not said, "it says something now"
    logger.removeHandler(listener)
    logger.setLevel("ERROR")
    seen["use_cache=False"] = move(model, use_cache=False)
    seen["and a mask of ones"] = move(model, use_cache=False, attention_mask=ones)
    model.gradient_checkpointing_enable()
    seen["gradient checkpointing"] = move(model)
    model.gradient_checkpointing_disable()
    Trainer(model, TrainingArguments("out", use_cpu=True, report_to=[]))
    seen["given to the Trainer"] = move(model)
    for way, moved in seen.items():
        print(f"{name:>14}, {way:>22}: {moved:.3f}")
    assert min(seen["as it is"], seen["and a mask of ones"]) > 0.1
    assert max(seen["use_cache=False"], seen["gradient checkpointing"]) < 1e-5
    assert seen["given to the Trainer"] < 1e-5 if name == "Llama" else seen["given to the Trainer"] > 0.1
EOF
