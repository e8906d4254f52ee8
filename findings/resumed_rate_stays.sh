#!/usr/bin/env bash
# Trainer.train(resume_from_checkpoint=...) with other arguments, as a tenth of the rate, plain and at ZeRO stage 2.
# Guess: what is given now counts, or the Trainer warns that it differs from the checkpoint, as it does for save_steps.
# Seen: the checkpoint's rate, weight decay and betas count, without a word. A new schedule counts, at the old rate.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "deepspeed==0.19.8"

python - <<'EOF'
import logging

import torch
from one_rank import deepspeed  # noqa: F401  # the process group
from transformers import PrinterCallback, Trainer, TrainingArguments

BEFORE, AFTER = 4, 8
json = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
first = dict(learning_rate=1e-3, weight_decay=0.0, adam_beta2=0.999, lr_scheduler_type="constant", save_steps=BEFORE)
said = []
listener = logging.Handler()
listener.emit = said.append
logger = logging.getLogger("transformers")
logger.handlers = [listener]
logger.setLevel("WARNING")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 1)

    def forward(self, x):
        return {"loss": self.linear(x).mean()}


def train(out, json, steps, **arguments):
    """The rate of the last step, the optimizer's weight decay and second beta, and the warnings about a checkpoint."""
    args = TrainingArguments(out, **{**first, **arguments}, deepspeed=json, max_steps=steps, logging_steps=1,
                             per_device_train_batch_size=1, ddp_find_unused_parameters=False, use_cpu=True,
                             report_to=[], disable_tqdm=True, remove_unused_columns=False)  # fmt: skip
    trainer = Trainer(Net(), args, train_dataset=[{"x": torch.ones(8)}] * AFTER)
    trainer.remove_callback(PrinterCallback)
    said.clear()
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-{BEFORE}" if steps > BEFORE else None)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    group = trainer.optimizer.param_groups[0]
    return rates[-1], group["weight_decay"], group["betas"][1], sum("checkpoint" in w.getMessage() for w in said)


for name, config in (("plain", None), ("ZeRO 2", json)):
    train(name, config, BEFORE)
    # The Trainer gives the same warning once.
    later = AFTER + (config is not None)
    for change, expected in (
        ({}, (1e-3, 0.0, 0.999, 0)),
        ({"learning_rate": 1e-4}, (1e-3, 0.0, 0.999, 0)),
        ({"weight_decay": 0.1}, (1e-3, 0.0, 0.999, 0)),
        ({"adam_beta2": 0.9}, (1e-3, 0.0, 0.999, 0)),
        # An eighth of its beginning is left in the last of eight steps.
        ({"learning_rate": 1e-4, "lr_scheduler_type": "linear"}, (1e-3 / 8, 0.0, 0.999, 0)),
        ({"save_steps": later}, (1e-3, 0.0, 0.999, 1)),
    ):
        seen = train(name, config, AFTER, **change)
        print(f"{name}, {change or 'as before'}: last rate {seen[0]:.2e}, weight decay {seen[1]}, beta2 {seen[2]},",
              f"{seen[3]} warnings")  # fmt: skip
        assert abs(seen[0] - expected[0]) < 1e-9 and seen[1:] == expected[1:]
EOF
