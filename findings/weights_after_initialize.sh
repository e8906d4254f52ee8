#!/usr/bin/env bash
# Weights written into a model after deepspeed.initialize, such as an adapter that is loaded late. All in float32.
# Guess: master copies belong to 16-bit training; in float32 the optimizer works on the parameters themselves.
# Seen: from stage 1 on there is a second float32 copy. What was written is seen until the first step, then undone.
# Versions: torch 2.13.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "deepspeed==0.19.8"

python - <<'EOF'
import deepspeed
import torch
from deepspeed.utils import safe_set_full_fp32_param
from one_rank import read_weights, start_engine

print("stage: written -> before the step -> after a step with lr 0 (after safe_set_full_fp32_param)")
for stage in (0, 1, 2, 3):
    seen = []
    for safely in (False, True):
        model = torch.nn.Linear(8, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        engine = start_engine(model, torch.optim.SGD(model.parameters(), lr=0.0), stage)
        # The way that DeepSpeed's documentation shows for writing into parameters that may be partitioned.
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.weight.data.fill_(0.5)
        if safely and stage > 0:
            safe_set_full_fp32_param(model.weight, torch.full((1, 8), 0.5))
        before = read_weights(engine)["weight"].mean().item()
        engine.backward(engine(torch.ones(1, 8)).sum())
        engine.step()
        seen.append(read_weights(engine)["weight"].mean().item())
    print(f"{stage}: 0.5 -> {before} -> {seen[0]} ({seen[1]})")
    assert before == 0.5 and seen[0] == (0.5 if stage == 0 else 0.0) and seen[1] == 0.5
EOF
