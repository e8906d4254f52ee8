#!/usr/bin/env bash
# DeepSpeed's zero_to_fp32 on checkpoints of a model with LoRA adapters, whose base weights are frozen.
# Guess: engine.save_checkpoint stores the whole model, and zero_to_fp32 gives it back, at every stage.
# Seen: stored it is at every stage. Given back it is at stages 2 and 3; 1 gives the adapters alone, 0 a TypeError.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "deepspeed==0.19.8"

python - <<'EOF'
import contextlib
import glob
import io

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from one_rank import start_engine
from peft import LoraConfig, get_peft_model

print("tensors: in the model / in the model's file of the checkpoint / out of zero_to_fp32")
for stage in (0, 1, 2, 3):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = start_engine(model, torch.optim.AdamW(trained), stage)
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
    engine.save_checkpoint(f"stage{stage}")
    (path,) = glob.glob(f"stage{stage}/*/*model_states.pt")
    stored = torch.load(path, weights_only=False)
    # At stage 3 the frozen weights have a place of their own, the trained ones are with the optimizer.
    held = len(stored["module"]) if stage < 3 else len(stored["frozen_param_fragments"]) + len(trained)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            given = len(get_fp32_state_dict_from_zero_checkpoint(f"stage{stage}"))
    except TypeError as error:
        given = f"TypeError: {error}"
    everything = len(list(model.parameters()))
    print(f"stage {stage}: {everything} / {held} / {given}")
    assert held == everything
    assert "TypeError" in given if stage == 0 else given == (len(trained) if stage == 1 else everything)
EOF
