#!/usr/bin/env bash
# PEFT's reduce_intruder_dimension: takes directions out of a trained adapter that the base weights do not have.
# Guess: as its docstring says, a higher mitigation_lambda subtracts more of them.
# Seen: the reverse. It is the share that stays: 1 takes nothing out, 0 all, 0.75 (the default) a quarter.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"

python - <<'EOF'
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension

print(f"{'mitigation_lambda':>18} {'adapter left':>13}")
for share in (0.0, 0.25, 0.75, 1.0):
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    # An update far larger than the base weights, in directions of its own.
    for factor in (layer.lora_A.default, layer.lora_B.default):
        torch.nn.init.normal_(factor.weight)
    before = layer.get_delta_weight("default")
    reduce_intruder_dimension(model, mitigation_lambda=share, logging_sink=None)
    left = (layer.get_delta_weight("intruder_reduced").norm() / before.norm()).item()
    print(f"{share:18} {left:13.3f}")
    assert abs(left - share) < 0.05
EOF
