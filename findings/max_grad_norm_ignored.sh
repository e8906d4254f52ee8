#!/usr/bin/env bash
# Clipping under DeepSpeed by what is outside the JSON: TrainingArguments.max_grad_norm, accelerator.clip_grad_norm_.
# Guess: a JSON without "gradient_clipping" leaves clipping to the arguments, and 0 switches it off.
# Seen: DeepSpeed clips at 1.0 whatever they say, "auto" excepted. Accelerate has stepped before it clips.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "deepspeed==0.19.8"

python - <<'EOF'
import torch
from one_rank import deepspeed  # noqa: F401  # the process group
from transformers import PrinterCallback, Trainer, TrainingArguments


class Net(torch.nn.Module):
    """Its gradient has norm 4."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 1, bias=False)
        torch.nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        return {"loss": self.linear(x).mean()}


def train(limit, **json):
    """How far one step of SGD with lr 1 goes."""
    json = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", **json}
    args = TrainingArguments("out", deepspeed=json, max_grad_norm=limit, max_steps=1, per_device_train_batch_size=1,
                             optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", use_cpu=True, report_to=[],
                             save_strategy="no", disable_tqdm=True, remove_unused_columns=False)  # fmt: skip
    net = Net()
    trainer = Trainer(net, args, train_dataset=[{"x": torch.ones(16)}] * 2)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return net.linear.weight.norm().item()


print("the gradient has norm 4; length of a step with lr 1")
for limit in (0.0, 0.1, 2.0):
    silent, auto = train(limit), train(limit, gradient_clipping="auto")
    print(f"max_grad_norm {limit}: {silent:.2f} with a silent JSON, {auto:.2f} with \"auto\"")
    assert abs(silent - 1) < 1e-3 and abs(auto - (limit or 4)) < 1e-3
EOF

python - <<'EOF'
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from one_rank import deepspeed  # noqa: F401

json = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=json))
net = torch.nn.Linear(16, 1, bias=False)
torch.nn.init.zeros_(net.weight)
model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))
accelerator.backward(model(torch.ones(1, 16)).mean())
stepped = net.weight.norm().item()
norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
optimizer.step()
after = net.weight.norm().item()
print(f"accelerator.backward moves the weights by {stepped:.2f} and leaves the gradient {net.weight.grad};")
print(f"then clip_grad_norm_(0.1) returns {norm:.2f}, and after optimizer.step() they have moved by {after:.2f}")
assert abs(stepped - 1) < 1e-3 and net.weight.grad is None and after == stepped
EOF
