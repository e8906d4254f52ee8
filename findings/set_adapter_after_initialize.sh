#!/usr/bin/env bash
# PEFT's set_adapter on a model that is under DeepSpeed already, with the parameters of both adapters in the optimizer.
# Guess: the adapter that is switched off rests, the one that is switched on trains, as in plain torch.
# Seen: under ZeRO the one switched off goes on moving; one switched on late raises (1, 2) or never trains (3).
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "deepspeed==0.19.8"

python - <<'EOF'
import torch
from one_rank import read_weights, start_engine
from peft import LoraConfig, get_peft_model


def run(stage, at_start, later):
    """How far each adapter moves in three steps after set_adapter(later)."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config, adapter_name="a")
    model.add_adapter("b", config)
    model.base_model.set_adapter(at_start)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    for p in factors:
        torch.nn.init.normal_(p)
    engine = start_engine(model, torch.optim.AdamW(factors, lr=0.01, weight_decay=0.1), stage)

    def train(steps):
        for _ in range(steps):
            engine.backward(engine(torch.ones(1, 8)).square().sum())
            engine.step()

    train(1)
    model.set_adapter(later)
    before = read_weights(engine)
    try:
        train(3)
    except IndexError as error:
        return f"IndexError: {error}"
    after = read_weights(engine)
    return {x: max((after[n] - before[n]).abs().max().item() for n in after if f".{x}." in n) for x in "ab"}


print("moved in 3 steps after set_adapter('a'), both on before / after set_adapter('b'), 'a' on before")
for stage in (0, 1, 2, 3):
    off, on = run(stage, ["a", "b"], "a"), run(stage, ["a"], "b")
    print(f"stage {stage}: {off} / {on}")
    assert off["a"] > 0.01
    if stage == 0:
        assert off["b"] == 0 and on["a"] == 0 and on["b"] > 0.01
    else:
        assert off["b"] > 0.01, "momentum and weight decay of an adapter that is off"
        assert on["b"] == 0 and on["a"] > 0.01 if stage == 3 else "IndexError" in on
EOF
