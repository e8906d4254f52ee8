#!/usr/bin/env bash
# ms-swift, a float32 checkpoint with and without --torch_dtype float32, plain and with --deepspeed zero2, on a CPU.
# Guess: it trains in float32, the type that is asked for and that the log names.
# Seen: it asks for fp16. A CPU drops that without a word, DeepSpeed raises there; --fp16 false is what float32 needs.
# Versions: torch 2.13.0, transformers 5.19.0, accelerate 1.15.0, peft 0.20.0, deepspeed 0.19.8, ms-swift 4.6.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.19.0" "accelerate==1.15.0" "peft==0.20.0" "deepspeed==0.19.8" \
    "datasets==4.8.4" "modelscope==1.40.2" "addict==2.4.0" "json_repair==0.64.6" "einops==0.8.2" "matplotlib==3.11.2" \
    "tensorboard==2.21.0"
# Without its dependencies, as what else it names is not used here.
python -m pip install -qq --no-deps "ms_swift==4.6.0"
echo "ms_swift==4.6.0"

cat >train.py <<'EOF'
import json
import sys
from pathlib import Path

import torch
from one_rank import deepspeed  # noqa: F401  # the process group
from swift import SftArguments, sft_main
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["pad", "end", *map(str, range(62))])}, "pad"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end", unk_token="pad")
tokenizer.save_pretrained("base")
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1)).save_pretrained("base")
chat = [{"role": "user", "content": "1 2 3"}, {"role": "assistant", "content": "4 5 6"}]
Path("data.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 8)

dtypes = set()
torch.nn.modules.module.register_module_forward_hook(
    lambda module, _, out: dtypes.add(str(out.dtype)) if isinstance(module, torch.nn.Linear) else None
)
case, options = sys.argv[1], json.loads(sys.argv[2])
args = SftArguments(model="base", model_type="llama", template="default", dataset=["data.jsonl"], max_steps=1,
                    use_hf=True, check_model=False, report_to=[], output_dir="out", **options)  # fmt: skip
asked, error, loss = args.training_args.mixed_precision, None, None
try:
    loss = sft_main(args)["log_history"][0]["loss"]
except ValueError as raised:
    error = str(raised)
seen = {"weights": str(args.torch_dtype), "asked": asked, "ran": sorted(dtypes), "loss": loss, "error": error}
Path(f"{case}.json").write_text(json.dumps(seen))
EOF

python - <<'EOF'
import json
import subprocess
import sys
from pathlib import Path

for case, options, asked, error in (
    ("as it is", {}, "fp16", False),
    ("torch_dtype float32", {"torch_dtype": "float32"}, "fp16", False),
    ("fp16 false", {"fp16": False}, "no", False),
    ("zero2, torch_dtype float32", {"torch_dtype": "float32", "deepspeed": "zero2"}, "fp16", True),
    ("zero2, fp16 false", {"fp16": False, "deepspeed": "zero2"}, "no", False),
):
    command = [sys.executable, "train.py", case, json.dumps(options)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
    seen = json.loads(Path(f"{case}.json").read_text())
    print(f"{case}: weights {seen['weights']}, mixed precision asked for {seen['asked']},",
          f"computed in {seen['ran']}, loss {seen['loss']}, error {seen['error']!r}")  # fmt: skip
    assert seen["weights"] == "torch.float32" and seen["asked"] == asked
    assert "fp16 is not supported" in seen["error"] if error else seen["ran"] == ["torch.float32"] and seen["loss"]
EOF
