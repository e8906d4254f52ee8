#!/usr/bin/env bash
# DeepSpeed's gradient of a parameter that a step's loss does not use, as adapters of an idle expert or modality.
# Guess: zeros at every stage, so that the optimizer's momentum decays.
# Seen: zeros at stages 1 and 2; at stage 3 the parameter's last gradient, once more in every such step.
# Versions: torch 2.13.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "deepspeed==0.19.8"

python - <<'EOF'
import torch
from one_rank import read_weights, start_engine


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x, use):
        return sum(getattr(self, name)(x) for name in use)


def run(stage):
    """How far SGD at rate 1 moves `b` in a step that uses both, and in the next one, which uses `a` alone."""
    torch.manual_seed(0)
    model = Branches()
    engine = start_engine(model, torch.optim.SGD(model.parameters(), lr=1.0), stage)
    moves, before = [], read_weights(engine)
    for use in ("ab", "a"):
        engine.backward(engine(torch.ones(1, 4), use).square().sum() / 100)
        engine.step()
        after = read_weights(engine)
        moves.append((after["b.weight"] - before["b.weight"]).norm().item())
        before = after
    return moves


for stage in (1, 2, 3):
    used, unused = run(stage)
    print(f"stage {stage}: b moves by {used:.4f} where it is used, and by {unused:.4f} where it is not")
    assert used > 0.01
    assert unused == 0 if stage < 3 else abs(unused - used) < 1e-5
EOF
