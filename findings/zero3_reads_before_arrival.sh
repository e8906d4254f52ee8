#!/usr/bin/env bash
# Two weights of very different sizes, gathered at ZeRO stage 3 on two CPU ranks, and read at once.
# Guess: inside of GatheredParameters all weights are there.
# Seen: up to DeepSpeed 0.19.7 only the last one surely is. gloo ends gathers in any order, and the large one is read while it
# still comes: memory that nobody has written. 0.19.8 waits for each of them.
# Versions: torch 2.13.0, deepspeed 0.19.7 and 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "deepspeed==0.19.7"

cat >gather.py <<'EOF'
import os
import sys

import deepspeed
import torch
from deepspeed.utils import logger

logger.setLevel("ERROR")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled for a minute and more
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(size)) for size in (1 << 24, 8)])
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
large, small = engine.module.parameters()
missed = []
for _ in range(20):
    with deepspeed.zero.GatheredParameters([large, small]):
        copy = large.detach().clone()
        assert (small == 1).all()
    missed.append(int((copy != 1).sum()) > 0)
print(f"deepspeed {deepspeed.__version__}, rank {os.environ['RANK']}:",
      f"{sum(missed)} of {len(missed)} reads of a weight of ones have other numbers", flush=True)  # fmt: skip
early = torch.tensor(float(sum(missed)))
torch.distributed.all_reduce(early)
assert (early > 0) == (sys.argv[1] == "early")
torch.distributed.barrier()
os._exit(0)  # not through the ends of gloo's threads
EOF
torchrun --standalone --nproc-per-node 2 gather.py early 2>log || { cat log; exit 1; }
python -m pip install -qq "deepspeed==0.19.8"
echo "deepspeed==0.19.8"
torchrun --standalone --nproc-per-node 2 gather.py waits 2>log || { cat log; exit 1; }
