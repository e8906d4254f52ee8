#!/usr/bin/env bash
# Accelerator(gradient_accumulation_steps=4) and accumulate() under DeepSpeed, with and without a JSON that says 4 too.
# Guess: where the JSON is silent, the 4 of the Accelerator or of the DeepSpeedPlugin counts, or the batch sizes do.
# Seen: it counts as 1: a step each micro-batch. prepare() warns that the JSON says so. Batch sizes alone raise.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "deepspeed==0.19.8"

python - <<'EOF'
import logging

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from one_rank import deepspeed, start_engine  # noqa: F401

silent = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
said = []
listener = logging.Handler()
listener.emit = said.append
accelerate = logging.getLogger("accelerate")
accelerate.addHandler(listener)
accelerate.propagate = False


def train(**plugin):
    """Accelerator's count before and after prepare, and the steps that 8 micro-batches of gradient 1 make."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    said.clear()
    accelerator = Accelerator(gradient_accumulation_steps=4, deepspeed_plugin=DeepSpeedPlugin(**plugin))
    before = accelerator.gradient_accumulation_steps
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    data = torch.utils.data.DataLoader(torch.ones(8, 1))
    model, optimizer, data = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0), data)
    for x in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            optimizer.step()
            optimizer.zero_grad()
    return before, accelerator.gradient_accumulation_steps, -net.weight.item(), len(said)


cases = {
    "no JSON": ({}, 4),
    "a JSON with 4": (dict(hf_ds_config={**silent, "gradient_accumulation_steps": 4}), 4),
    'a JSON with "auto"': (dict(hf_ds_config={**silent, "gradient_accumulation_steps": "auto"}), 4),
    "a silent JSON": (dict(hf_ds_config={**silent}), 1),
    "and DeepSpeedPlugin(4)": (dict(hf_ds_config={**silent}, gradient_accumulation_steps=4), 1),
}
print("8 micro-batches, gradient_accumulation_steps=4")
for name, (plugin, count) in cases.items():
    before, after, steps, warned = train(**plugin)
    print(f"{name:>22}: {before} before prepare, {after} after, {steps:.2f} steps, {warned} warnings")
    # Without a JSON it clips at 1, which takes a millionth off.
    assert before == 4 and after == count and abs(steps - 8 / count) < 1e-4 and warned == (count == 1)

# A batch of 4 in micro-batches of 1: DeepSpeed by itself takes that for 4 micro-batches a step.
sizes = {**silent, "train_batch_size": 4}
net = torch.nn.Linear(1, 1)
engine = start_engine(net, torch.optim.SGD(net.parameters(), lr=1.0), 2, **sizes)
try:
    train(hf_ds_config=sizes)
    raised = "nothing"
except AssertionError as error:
    raised = str(error)
print(f"train_batch_size 4: {engine.gradient_accumulation_steps()} for DeepSpeed; from Accelerate: {raised}")
assert engine.gradient_accumulation_steps() == 4 and "train_batch_size" in raised
EOF
