#!/usr/bin/env bash
# "bf16" at ZeRO stage 0: what deepspeed.initialize does to an optimizer that it is given.
# Guess: nothing happens before the first batch; all stages take the same steps.
# Seen: at stage 0 it takes a step with zero gradients and the full lr: weights decay, Adam's first step is too short.
# Versions: torch 2.13.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "deepspeed==0.19.8"

python - <<'EOF'
import torch
from one_rank import start_engine


def run(stage, bf16):
    """Steps that the optimizer has counted, and the master weight, before the first batch; what one step moves."""
    model = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    calls = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    engine = start_engine(model, optimizer, stage, bf16={"enabled": bf16})
    master = optimizer.param_groups[0]["params"][0]
    counted, start = len(calls), master.detach().flatten()[0].item()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    engine.backward(engine(torch.ones(1, 8, dtype=model.weight.dtype)).float().sum())
    engine.step()
    return counted, start, start - master.detach().flatten()[0].item()


print(f"{'':>16} {'steps before':>13} {'master weight':>14} {'first step':>11}")
for bf16 in (False, True):
    for stage in (0, 1, 2):  # between steps, stage 3 leaves the optimizer's groups empty
        counted, start, moved = run(stage, bf16)
        print(f"bf16={bf16!s:>5} stage {stage} {counted:13} {start:14.3f} {moved:11.4f}")
        if bf16 and stage == 0:
            # 1 - lr * weight_decay; and a first step with the bias correction of the second
            assert counted == 1 and abs(start - 0.95) < 1e-6 and abs(moved - 0.0744) < 1e-3
        else:
            assert counted == 0 and start == 1.0 and abs(moved - 0.1) < 1e-6
EOF
