#!/usr/bin/env bash
# axolotl: two LoRA runs of one YAML with a seed, on one machine and without dropout.
# Guess: one seed gives one adapter, bit for bit.
# Seen: A differs, as it is drawn before any seed is set. With a plugin that sets one there the two are alike.
# Versions: torch 2.13.0, transformers 5.16.1, peft 0.20.0, accelerate 1.13.0, trl 1.9.0, axolotl 0.19.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.16.1" "peft==0.20.0" "accelerate==1.13.0" "datasets==4.8.4" "trl==1.9.0" \
    "bitsandbytes==0.50.2" "triton==3.9.0" "pillow==13.0.0" "numba==0.68.1" "evaluate==0.4.6" "wandb==0.31.0" \
    "fastcore==2.2.41" "fire==0.7.1" "addict==2.4.0" "colorama==0.4.6" "posthog==6.7.11" \
    "axolotl-contribs-lgpl==0.0.7" "axolotl-contribs-mit==0.0.6"
# Without its dependencies, as what else it names is not used here.
python -m pip install -qq --no-deps "axolotl==0.19.0"
echo "axolotl==0.19.0"
export AXOLOTL_DO_NOT_TRACK=1

cat >seeding.py <<'EOF'
import torch
from axolotl.integrations.base import BasePlugin


class Plugin(BasePlugin):
    def pre_lora_load(self, cfg, model):
        torch.manual_seed(cfg.seed)
EOF

python - <<'EOF'
import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["pad", "end", *map(str, range(62))])}, "pad"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end", unk_token="pad")
tokenizer.save_pretrained("base")
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1)).save_pretrained("base")
texts = (" ".join(str(i * j % 61) for j in range(12)) for i in range(16))
Path("data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
recipe = {"base_model": "base", "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True,
          "datasets": [{"path": "data.jsonl", "ds_type": "json", "type": "completion"}], "sequence_len": 64,
          "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 4, "learning_rate": 0.01,
          "optimizer": "adamw_torch", "bf16": False, "fp16": False, "seed": 42,
          "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}  # fmt: skip


def train(out, **more):
    """The adapter that a run saves, and the losses of its steps."""
    # JSON is YAML.
    Path("recipe.yaml").write_text(json.dumps({**recipe, "output_dir": out, "logging_steps": 1, **more}))
    command = [sys.executable, "-m", "axolotl.cli.train", "recipe.yaml"]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
    history = json.loads(Path(out, "checkpoint-4/trainer_state.json").read_text())["log_history"]
    return load_file(f"{out}/adapter_model.safetensors"), [entry["loss"] for entry in history if "loss" in entry]


for name, more in (("seed 42", {}), ("seed 42, and a plugin that sets it", {"plugins": ["seeding.Plugin"]})):
    (first, losses), (second, others) = (train(out, **more) for out in ("first", "second"))
    alike = {}
    for factor in ("lora_A", "lora_B"):
        same = [(first[key] == second[key]).flatten() for key in first if factor in key]
        alike[factor] = sum(s.sum().item() for s in same) / sum(s.numel() for s in same)
    print(f"{name}: alike in two runs", *(f"{share:.0%} of {factor}," for factor, share in alike.items()),
          f"last losses {losses[-1]:.6f} and {others[-1]:.6f}")  # fmt: skip
    assert losses[0] == others[0], "they began from different data or base weights"
    assert set(alike.values()) == {1.0} and losses == others if more else alike["lora_A"] < 0.01 and losses != others
EOF
