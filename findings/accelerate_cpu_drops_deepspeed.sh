#!/usr/bin/env bash
# Accelerator(cpu=True, deepspeed_plugin=...), as when a job is tried on a CPU before it goes to GPUs.
# Guess: DeepSpeed runs on the CPU, as it does where cpu=True is left out, or cpu=True raises beside the plugin.
# Seen: the plugin is dropped without a word, and with it bf16, clipping and accumulation: DDP, or the model as it is.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "deepspeed==0.19.8"

for case in "launched" "launched cpu=True" "alone cpu=True"; do
    python - "$case" <<'EOF'
import logging
import os
import sys
import warnings

import torch
from one_rank import deepspeed  # noqa: F401  # the process group

launched, cpu = "launched" in sys.argv[1], "cpu=True" in sys.argv[1]
if not launched:
    torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
        del os.environ[name]
said = []
listener = logging.Handler()
listener.emit = said.append
logging.getLogger("accelerate").addHandler(listener)
warnings.simplefilter("always")
warnings.showwarning = lambda *args, **kwargs: said.append(args)

from accelerate import Accelerator, DeepSpeedPlugin

json = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5, "bf16": {"enabled": True}}  # fmt: skip
accelerator = Accelerator(cpu=cpu, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=json))
net = torch.nn.Linear(16, 1, bias=False)
torch.nn.init.zeros_(net.weight)
model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))
x = torch.ones(1, 16, dtype=net.weight.dtype)
for _ in range(2):
    with accelerator.accumulate(model):
        accelerator.backward(model(x).mean())
        optimizer.step()
        optimizer.zero_grad()
moved = net.weight.float().norm().item()
print(f"{sys.argv[1]}: {type(model).__name__}, {net.weight.dtype}, two gradients of norm 4 move it by {moved:.2f}")
if cpu:
    assert type(model).__name__ == ("DistributedDataParallel" if launched else "Linear")
    assert net.weight.dtype == torch.float32 and moved == 8 and accelerator.state.deepspeed_plugin is None
    assert not said, "it says something now"
else:
    assert type(model).__name__ == "DeepSpeedEngine"
    assert net.weight.dtype == torch.bfloat16 and abs(moved - 0.5) < 1e-2
EOF
done
