#!/usr/bin/env bash
# DeepSpeed takes loss.backward() in place of engine.backward(loss). With gradient accumulation and a loss that has a
# term of the weights alone, such as a penalty:
# Guess: both divide the loss by the number of micro-batches.
# Seen: loss.backward() divides what flows back through the engine's output; a penalty counts once a micro-batch.
# Versions: torch 2.13.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "deepspeed==0.19.8"

python - <<'EOF'
import torch
from one_rank import read_weights, start_engine

print("gradient of data + penalty, each of gradient 1, so 2 is right: engine.backward(loss) / loss.backward()")
for stage in (1, 2):
    for micro_batches in (1, 4, 16):
        seen = []
        for direct in (False, True):
            model = torch.nn.Linear(8, 1, bias=False)
            torch.nn.init.zeros_(model.weight)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            engine = start_engine(model, optimizer, stage, gradient_accumulation_steps=micro_batches)
            for _ in range(micro_batches):
                loss = engine(torch.ones(1, 8)).sum() + model.weight.sum()
                if direct:
                    loss.backward()
                else:
                    engine.backward(loss)
                engine.step()
            seen.append(-read_weights(engine)["weight"][0, 0].item())
        print(f"stage {stage}, {micro_batches:2} micro-batches: {seen[0]} / {seen[1]}")
        assert seen == [2.0, 1.0 + micro_batches]
EOF
