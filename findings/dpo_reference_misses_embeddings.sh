#!/usr/bin/env bash
# TRL's DPOTrainer on a PeftModel whose adapter is trained already, as SFT leaves it: the reference is a copy of it.
# Guess: policy and reference are the same at the first step, so the loss there is ln 2, whatever the adapter holds.
# Seen: it copies names that hold ".default." alone: no adapter on an embedding, no trained tokens, no IA3.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, datasets 5.2.0, trl 1.16.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "accelerate==1.15.0" "datasets==5.2.0" "trl==1.16.0"

python - <<'EOF'
import math

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import IA3Config, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer

disable_progress_bar()
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["pad", "end", *map(str, range(62))])}, "pad"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end", unk_token="pad")
data = Dataset.from_list([dict(prompt=f"{i} 2", chosen=f" {i + 7} 9", rejected=f" {i + 20} 30") for i in range(8)])
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def start(config):
    """The first loss, and the parameters in which policy and reference differ then."""
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1)), config)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)  # a stage of training before this one
    args = DPOConfig("out", max_steps=1, logging_steps=1, per_device_train_batch_size=8, learning_rate=0.0,
                     use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
                     disable_tqdm=True)  # fmt: skip
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    differ = set()
    for name, p in trainer.model.named_parameters():
        twin = name.replace(".default", ".ref")
        if ".default" in name and not torch.equal(p, trainer.model.get_parameter(twin)):
            differ.add(name.split(".")[-2] if name.endswith(".default") else name)
    return trainer.state.log_history[0]["loss"], differ


adapters = {
    "LoRA on attention": LoraConfig(target_modules=["q_proj"]),
    "and on the embedding": LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "and trained tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4, 11, 32]}),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
for name, config in adapters.items():
    config.task_type = "CAUSAL_LM"
    loss, differ = start(config)
    print(f"{name:>21}: first loss - ln 2 = {loss - math.log(2):+.5f}, not copied: {sorted(differ) or 'nothing'}")
    if name == "LoRA on attention":
        assert abs(loss - math.log(2)) < 1e-6 and not differ
    else:
        assert abs(loss - math.log(2)) > 1e-5 and differ
EOF
