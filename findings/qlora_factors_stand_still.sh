#!/usr/bin/env bash
# TRL's SFTTrainer on a base that bitsandbytes quantised, with bf16=False and TRL's default learning rate of 2e-5.
# Guess: the adapters are float32, as PEFT makes them, and so is the optimizer's state; every weight moves.
# Seen: the trainer turns both into bfloat16, where most steps of A are below half a unit: most of A stays bit for bit.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, trl 1.16.0, bitsandbytes 0.50.2
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "accelerate==1.15.0" "datasets==5.2.0" "trl==1.16.0" \
    "bitsandbytes==0.50.2"

python - <<'EOF'
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

disable_progress_bar()
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["pad", "end", *map(str, range(62))])}, "pad"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end", unk_token="pad")
data = Dataset.from_list([{"text": " ".join(str(i * j % 61) for j in range(12))} for i in range(64)])
sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1)).save_pretrained("base")

four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
for name, quantised in (("float32 base", None), ("4-bit base", four_bits)):
    model = LlamaForCausalLM.from_pretrained("base", quantization_config=quantised, dtype=torch.float32)
    args = SFTConfig("out", max_steps=20, per_device_train_batch_size=4, lr_scheduler_type="constant", weight_decay=0.0,
                     use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
                     logging_strategy="no", disable_tqdm=True)  # fmt: skip
    assert args.learning_rate == 2e-5
    lora = LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"])
    trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    still = {}
    for factor in ("lora_A", "lora_B"):
        same = torch.cat([(after[n] == before[n]).flatten() for n in before if factor in n])
        still[factor] = same.float().mean().item()
    (dtype,) = {p.dtype for p in before.values()}
    (state,) = {s["exp_avg"].dtype for s in trainer.optimizer.state.values()}
    print(f"{name}: adapters {dtype}, Adam's moments {state}; after 20 steps unmoved:",
          ", ".join(f"{share:.0%} of {factor}" for factor, share in still.items()))  # fmt: skip
    expected = torch.bfloat16 if quantised else torch.float32
    assert dtype == state == expected
    assert still["lora_A"] > 0.8 if quantised else still["lora_A"] < 0.01

# How far this reaches: A starts uniform within 1 / sqrt(inputs), so it and its units are smaller in wider layers.
print("bfloat16 weights of a fresh A that a step of 2e-5 leaves as they are:", end="")
for inputs in (128, 1024, 4096):
    fresh = torch.empty(64, inputs).uniform_(-(inputs**-0.5), inputs**-0.5).bfloat16()
    still = ((fresh - 2e-5) == fresh).float().mean().item()
    print(f" {still:.0%} at {inputs} inputs", end="," if inputs < 4096 else "\n")
EOF
