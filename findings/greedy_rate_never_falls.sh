#!/usr/bin/env bash
# transformers' scheduler "greedy" (GreedyLR) through the Trainer, at the Trainer's default rate of 5e-5.
# Guess: the rate falls while the evaluation gets worse, as GreedyLR is there for, or is lifted to min_lr, 1e-3.
# Seen: below min_lr it is not lifted and never falls, but rises while things improve, and what it has risen by stays.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0"

python - <<'EOF'
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

STEPS = 200


class Net(torch.nn.Module):
    """Its loss in the nth evaluation falls by 0.01 each time until the turn, and rises by 0.01 from there on."""

    def __init__(self, turn):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.turn = turn
        self.evaluations = 0

    def forward(self, labels):
        self.evaluations += not self.training
        return {"loss": self.weight.sum() + 5 + 0.01 * abs(self.evaluations - self.turn)}


def train(turn, **settings):
    """The learning rates of all steps, with an evaluation after each."""
    args = TrainingArguments("out", max_steps=STEPS, eval_strategy="steps", eval_steps=1, logging_steps=1, optim="sgd",
                             lr_scheduler_type="greedy", lr_scheduler_kwargs=settings, per_device_train_batch_size=1,
                             use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)  # fmt: skip
    data = [{"labels": torch.ones(1)}] * STEPS
    trainer = Trainer(Net(turn), args, train_dataset=data, eval_dataset=data[:1])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert args.learning_rate == 5e-5 and set(trainer.lr_scheduler.min_lrs) == {settings.get("min_lr", 1e-3)}
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


print(f"learning rate at the first, the middle and the last of {STEPS} steps")
seen = {}
for name, turn in (("worse from the start", 0), ("better, then worse", STEPS // 2)):
    for settings in ({}, {"min_lr": 0.0}):
        rates = seen[name, bool(settings)] = train(turn, **settings)
        kind = "min_lr=0.0" if settings else "as it is"
        print(f"{name}, {kind}: {rates[0]:.2e}, {rates[STEPS // 2]:.2e}, {rates[-1]:.2e}")

assert set(seen["worse from the start", False]) == {5e-5}
assert seen["worse from the start", True][-1] < 3e-5
rates = seen["better, then worse", False]
assert rates[-1] == max(rates) > 7e-5 and rates == sorted(rates)
assert seen["better, then worse", True][-1] < 0.8 * max(rates)
EOF
