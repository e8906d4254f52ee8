#!/usr/bin/env bash
# Trainer.train(resume_from_checkpoint=True) on a run that has ended, as a requeued job does, plain and at ZeRO stage 2.
# Guess: nothing is left to do, so no step is taken and the weights stay.
# Seen: unless the run ended with an epoch, it takes one step beyond max_steps, and saves a checkpoint each time.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "deepspeed==0.19.8"

python - <<'EOF'
from pathlib import Path

import torch
from one_rank import deepspeed  # noqa: F401  # the process group
from transformers import PrinterCallback, Trainer, TrainingArguments

EPOCH = 8  # steps
json = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 1)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


def train(out, config, steps, schedule, resume):
    """The step that a run ends at, and a weight."""
    args = TrainingArguments(out, deepspeed=config, max_steps=steps, learning_rate=0.1, lr_scheduler_type=schedule,
                             per_device_train_batch_size=1, ddp_find_unused_parameters=False, use_cpu=True,
                             save_steps=1, report_to=[], disable_tqdm=True, remove_unused_columns=False)  # fmt: skip
    trainer = Trainer(Net(), args, train_dataset=[{"x": torch.ones(8)}] * EPOCH)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.global_step, trainer.model.linear.weight.detach().flatten()[0].item()


for name, config in (("plain", None), ("ZeRO 2", json)):
    for schedule, steps, again, moves in (
        ("constant", EPOCH, EPOCH, False),
        ("constant", EPOCH - 2, EPOCH - 2, True),
        ("constant", EPOCH - 2, EPOCH - 4, True),
        ("linear", EPOCH - 2, EPOCH - 2, False),  # the rate has fallen to zero
    ):
        out = f"{name}-{schedule}-{steps}-{again}"
        ended, before = train(out, config, steps, schedule, None)
        last, after = train(out, config, again, schedule, True)
        third, _ = train(out, config, again, schedule, True)
        saved = max(int(folder.name.partition("-")[2]) for folder in Path(out).glob("checkpoint-*"))
        print(f"{name}, {schedule}, an epoch of {EPOCH}: ended at step {ended} of {steps}, started again with {again}:",
              f"at step {last}, then {third}; checkpoint-{saved}; weight {before:.4f} -> {after:.4f}")  # fmt: skip
        further = steps % EPOCH > 0
        assert (ended, last, third, saved) == (steps, steps + further, steps + 2 * further, steps + 2 * further)
        assert (before != after) == moves
EOF
