#!/usr/bin/env bash
# PEFT's own LoRA optimizers (create_riemannian_optimizer, create_lorafa_optimizer) as the optimizer of a ZeRO engine.
# Guess: they work on pairs of factors, so ZeRO, which flattens and splits, makes them raise.
# Seen: nothing raises. From stage 1 on the first is plain AdamW to the last bit, the second plain AdamW on B alone.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "deepspeed==0.19.8"

python - <<'EOF'
import torch
from one_rank import read_weights, start_engine
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer

LR = 0.01


def make_adamw(model, only="lora_", eps=1e-8):
    factors = [p for name, p in model.named_parameters() if only in name]
    return torch.optim.AdamW(factors, lr=LR, weight_decay=0, eps=eps)


def make_riemannian(model):
    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=LR, weight_decay=0)


def make_lorafa(model):
    return create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=LR)


def take_step(make, stage):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p)
    engine = start_engine(model, make(model), stage)
    before = read_weights(engine)
    engine.backward(engine(torch.ones(1, 8)).square().sum())
    engine.step()
    after = read_weights(engine)
    return {name: after[name] - before[name] for name in after if "lora_" in name}


def differ(one, other, only="lora_"):
    return max((one[name] - other[name]).abs().max().item() for name in one if only in name)


adamw = take_step(make_adamw, 0)
# LoRA-FA adds eps before the bias correction, torch after it: this eps makes the first step of both the same.
late_eps = take_step(lambda model: make_adamw(model, eps=1e-6 / 0.001**0.5), 0)
print("one step, largest difference        to itself at stage 0     to plain AdamW")
for stage in (0, 1, 2, 3):
    riemannian, lorafa = take_step(make_riemannian, stage), take_step(make_lorafa, stage)
    itself = differ(riemannian, take_step(make_riemannian, 0)), differ(lorafa, take_step(make_lorafa, 0))
    plain = differ(riemannian, adamw), differ(lorafa, late_eps, "lora_B")
    for name, a, b in zip(("Riemannian", "LoRA-FA (B)"), itself, plain):
        print(f"stage {stage}  {name:>11} {a:36.1e} {b:18.1e}")
    assert all(p.abs().max() == 0 for name, p in lorafa.items() if "lora_A" in name)
    if stage == 0:
        assert max(itself) == 0 and min(plain) > LR / 10
    else:
        assert min(itself) > LR / 10 and max(plain) < 1e-6
        assert stage == 3 or plain[0] == 0
EOF
