#!/usr/bin/env bash
# DeepSpeed, "bf16" with gradient accumulation over many micro-batches.
# Guess: master weights are float32, so micro-batch gradients are added up in float32.
# Seen: in bfloat16 at every stage, where small summands vanish. "grad_accum_dtype": "fp32" helps; stage 0 refuses it.
# Versions: torch 2.13.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "deepspeed==0.19.8"

python - <<'EOF'
import contextlib
import io

import torch
from one_rank import read_weights, start_engine

MICRO_BATCHES = 512  # equal ones, with gradient 1: their mean is 1


def step(stage, **config):
    model = torch.nn.Linear(8, 1, bias=False).bfloat16()
    torch.nn.init.zeros_(model.weight)
    config |= {"bf16": {"enabled": True}, "gradient_accumulation_steps": MICRO_BATCHES}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            engine = start_engine(model, torch.optim.SGD(model.parameters(), lr=1.0), stage, **config)
    except NotImplementedError as error:
        return f"raises NotImplementedError: {error}"
    for _ in range(MICRO_BATCHES):
        engine.backward(engine(torch.ones(1, 8).bfloat16()).float().sum())
        engine.step()
    return -read_weights(engine)["weight"][0, 0].item()


print(f"the mean of {MICRO_BATCHES} gradients that are all 1: by default / with grad_accum_dtype fp32")
for stage in (0, 1, 2, 3):
    default, fp32 = step(stage), step(stage, data_types={"grad_accum_dtype": "fp32"})
    print(f"stage {stage}: {default} / {fp32}")
    assert default == 0.5
    assert "NotImplementedError" in fp32 if stage == 0 else fp32 == 1.0
EOF
