#!/usr/bin/env bash
# TRL's SFTTrainer with assistant_only_loss=True, which puts its own template in place of a model's that it knows.
# Guess: the loss is on what the model has to write after the generation prompt, and on nothing of the prompt.
# Seen: it is on the prompt's end too: Qwen2.5, Qwen3.5, GPT-OSS, DeepSeek-V3, Nemotron. Some prompts go on otherwise.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, datasets 5.2.0, trl 1.16.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "datasets==5.2.0" "trl==1.16.0"

python - <<'EOF'
import os
import re
from pathlib import Path

import trl
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

disable_progress_bar()
letters = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
letters.decoder = decoders.ByteLevel()
sizes = dict(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
talk = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "REPLY"}]


def learn(name):
    """What the loss is on, what of it the model's own generation prompt gives, and what follows that in the prompt."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    marks = re.findall(r"<[|｜][^|｜<>]+[|｜]>|<(?:start|end)_of_turn>|</?think>", tokenizer.chat_template)
    tokenizer.add_tokens(list(dict.fromkeys(marks)), special_tokens=True)
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    args = SFTConfig("out", assistant_only_loss=True, use_cpu=True, bf16=False, report_to=[])
    trainer = SFTTrainer(LlamaForCausalLM(LlamaConfig(**sizes)), args=args, processing_class=tokenizer,
                         train_dataset=Dataset.from_list([{"messages": talk}]))  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    ids, counts = batch["input_ids"][0], batch["labels"][0] != -100
    whole, learnt = tokenizer.decode(ids), tokenizer.decode(ids[counts])
    assert learnt in whole and "REPLY" in learnt
    shared = os.path.commonprefix([prompt, whole])
    return learnt, shared[whole.index(learnt) :], prompt[len(shared) :]


expected = {
    "llama3": ("", ""),
    "gemma3": ("", ""),
    "qwen3_instruct_2507": ("", ""),
    "qwen2_5": ("\n", ""),
    "gptoss": ("<|start|>assistant", ""),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", ""),
    "qwen3_5_think": ("<think>\n", ""),
    "deepseekv3": ("<｜Assistant｜>", "<think>\n"),
    "nemotron_3_nano": ("<think>", "\n"),
}
print(f"{'template':>19}  the loss is on ...; of it the prompt gives ...; and goes on with ...")
for name, (given, further) in expected.items():
    seen = learn(name)
    print(f"{name:>19}  {seen[0]!r}; {seen[1]!r}; {seen[2]!r}")
    assert seen[1:] == (given, further)
EOF
