#!/usr/bin/env bash
# axolotl: plugins in the YAML that bring an optimizer, with the package that they import, and without it.
# Guess: what create_optimizer gives back is used, and a plugin that cannot be imported stops the run.
# Seen: create_optimizer is never called. A plugin that cannot be imported is one ERROR line, and the run goes on.
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

cat >plugin.py <<'EOF'
import settings
import torch
from axolotl.integrations.base import BasePlugin


class ByHook(BasePlugin):
    def create_optimizer(self, cfg, trainer):
        return torch.optim.SGD(trainer.model.parameters(), lr=settings.rate, momentum=0.9)


class ByHand(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=settings.rate, momentum=0.9)
EOF

python - <<'EOF'
import json
import subprocess
import sys
from pathlib import Path

import torch
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


def train(out, plugin):
    """A run's exit status, the log's lines of level ERROR, and the keys of its optimizer's state."""
    # JSON is YAML.
    Path("recipe.yaml").write_text(json.dumps({**recipe, "output_dir": out, "plugins": [plugin]}))
    command = [sys.executable, "-m", "axolotl.cli.train", "recipe.yaml"]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    errors = [line.rpartition("] ")[2] for line in run.stdout.splitlines() if "[ERROR]" in line]
    saved = Path(out, "checkpoint-4/optimizer.pt")
    state = torch.load(saved)["state"] if saved.exists() else {}
    return run.returncode, errors, sorted({key for entry in state.values() for key in entry})


sgd, adam = ["momentum_buffer"], ["exp_avg", "exp_avg_sq", "step"]
for name, installed, plugin, expected in (
    ("by create_optimizer", True, "plugin.ByHook", (0, 0, adam)),
    ("by post_trainer_create", True, "plugin.ByHand", (0, 0, sgd)),
    ("the same, without its package", False, "plugin.ByHand", (0, 1, adam)),
    ("a module that is not there", True, "plugins.ByHand", (0, 1, adam)),
    ("a class that is not there", True, "plugin.ByWish", (1, 0, [])),
):
    Path("settings.py").unlink(missing_ok=True)
    if installed:
        Path("settings.py").write_text("rate = 0.01\n")
    status, errors, state = train(name, plugin)
    print(f"{name}: exit {status}, optimizer's state {state}, errors {errors}")
    assert (status, len(errors), state) == expected
EOF
