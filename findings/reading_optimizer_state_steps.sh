#!/usr/bin/env bash
# torch.distributed.checkpoint.state_dict.get_optimizer_state_dict on an optimizer that has not stepped yet, as when a
# job writes a checkpoint before its first step, or looks at the state's shape.
# Guess: reading an optimizer's state changes nothing.
# Seen: it calls step() with zero gradients and lr 0. AdamW's next step is a quarter shorter, RAdam's half as long.
# Versions: torch 2.13.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "numpy==2.4.6" "torch==2.13.0"

python - <<'EOF'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def take_first_step(cls, read):
    model = torch.nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = cls(model.parameters(), lr=0.1)
    hooks = []
    optimizer.register_step_post_hook(lambda *_: hooks.append("ran"))
    if read:
        get_optimizer_state_dict(model, optimizer)
        assert hooks == ["ran"], "reading ran the hooks of step()"
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return (model.weight - before).abs().max().item()


print(f"{'first step of':>14} {'state not read':>15} {'state read':>11}")
steps = {}
for name in ("AdamW", "RAdam", "Rprop", "ASGD", "SGD"):
    cls = getattr(torch.optim, name)
    steps[name] = take_first_step(cls, False), take_first_step(cls, True)
    print(f"{name:>14} {steps[name][0]:15.6f} {steps[name][1]:11.6f}")

# Adam's moments are still zero, but its step counter is 1: the bias correction of the first real step is the second's.
assert abs(steps["AdamW"][1] / steps["AdamW"][0] - 0.745) < 0.01
assert steps["RAdam"][1] < 0.6 * steps["RAdam"][0]
# Both keep the lr of their first step in their state, and that was 0.
assert steps["Rprop"][1] < 1e-4 * steps["Rprop"][0] and steps["ASGD"][1] == 0
assert steps["SGD"][1] == steps["SGD"][0], "no state, no harm"


# What an optimizer's state_dict holds beside "state" and "param_groups" is dropped on the way.
class WithMore(torch.optim.SGD):
    def state_dict(self):
        return {**super().state_dict(), "average": torch.ones(3)}


model = torch.nn.Linear(4, 1)
optimizer = WithMore(model.parameters(), lr=0.1)
kept = get_optimizer_state_dict(model, optimizer)
print("the optimizer's own state_dict:", sorted(optimizer.state_dict()), "- through the function:", sorted(kept))
assert "average" in optimizer.state_dict() and sorted(kept) == ["param_groups", "state"]
EOF
