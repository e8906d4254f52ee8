#!/usr/bin/env bash
# A Trainer under torchrun with two ranks where no GPU is, as when a job is tried on a CPU before it goes to GPUs.
# Guess: the ranks train as one, as they do with use_cpu=True, or the Trainer raises.
# Seen: each trains alone on all of the data as rank 0 of 1, and saves over the other. A warning speaks of the launcher.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0"

cat >train.py <<'EOF'
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, Trainer, TrainingArguments


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 1)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


rank, out = int(os.environ["RANK"]), sys.argv[1]
args = TrainingArguments(out, use_cpu=out == "use_cpu", num_train_epochs=1, per_device_train_batch_size=2,
                         save_strategy="epoch", report_to=[], disable_tqdm=True, remove_unused_columns=False,
                         ddp_find_unused_parameters=False)  # fmt: skip
torch.manual_seed(rank)  # where the ranks are one, the weights of rank 0 count
trainer = Trainer(Net(), args, train_dataset=[{"x": torch.ones(8)}] * 32)
trainer.remove_callback(PrinterCallback)
while rank and args.world_size == 1 and not Path(f"{out}-0.json").exists():  # so that no two write at once
    time.sleep(0.1)
trainer.train()
step, saved = trainer.state.global_step, None
if trainer.is_world_process_zero():
    saved = load_file(f"{out}/checkpoint-{step}/model.safetensors")["linear.weight"][0, 0].item()
seen = {"index": args.process_index, "world": args.world_size, "step": step, "saved": saved,
        "weight": trainer.model.linear.weight[0, 0].item()}  # fmt: skip
with open(f"{out}-{rank}.json", "w") as file:
    json.dump(seen, file)
EOF

for out in use_cpu plain; do
    TRANSFORMERS_VERBOSITY=warning torchrun --standalone --nproc_per_node=2 train.py "$out" 2>"$out.log" ||
        { cat "$out.log" && exit 1; }
done

python - <<'EOF'
import json
from pathlib import Path

for out, world, steps in (("use_cpu", 2, 8), ("plain", 1, 16)):
    ranks = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(2)]
    assert len(list(Path(out).glob("checkpoint-*"))) == 1
    warnings = Path(f"{out}.log").read_text().count("torch.distributed.launch")
    print(f"{out}: {warnings} warnings that name torch.distributed.launch")
    assert warnings == (2 if world == 1 else 0)
    for rank in ranks:
        print(f"{out}: rank {rank['index']} of {rank['world']}, {rank['step']} steps for 32 examples,",
              f"weight {rank['weight']:.4f}, saved {rank['saved']}")  # fmt: skip
        assert rank["world"] == world and rank["step"] == steps
    first, second = ranks
    assert first["index"] == 0 and second["index"] == world - 1
    assert (first["weight"] == second["weight"]) == (world == 2)
    assert first["saved"] == first["weight"] and second["saved"] == (second["weight"] if world == 1 else None)
EOF
