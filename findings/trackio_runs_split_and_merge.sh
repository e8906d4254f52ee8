#!/usr/bin/env bash
# Trainer with report_to="trackio", read back from Trackio's own file: train(), evaluate() and train() of one Trainer,
# and two Trainers of the same run_name, as two jobs of one script are.
# Guess: what one Trainer logs is one run, what two log are two, and train_loss and train_runtime are in it.
# Seen: evaluate() begins a second run, which the next train() goes on with. Two named alike are one. Neither is in it.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, trackio 0.43.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "trackio==0.43.0"
export TRACKIO_DIR="$folder/trackio"

python - <<'EOF'
import contextlib
import io
import json
import os
import sqlite3
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, labels):
        return {"loss": (self.weight - labels).square().mean()}


def make_trainer(project, **named):
    args = TrainingArguments("out", max_steps=3, logging_steps=1, use_cpu=True, report_to="trackio", project=project,
                             save_strategy="no", disable_tqdm=True, **named)  # fmt: skip
    data = [{"labels": torch.ones(1)}] * 8
    trainer = Trainer(Net(), args, train_dataset=data, eval_dataset=data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def read_runs(project):
    """What each run holds: how many training losses and evaluations, and the names of all that was logged."""
    with contextlib.closing(sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{project}.db")) as file:
        rows = file.execute("select run_name, metrics from metrics order by id").fetchall()
    runs = {}
    for run, metrics in rows:
        counts = runs.setdefault(run, [0, 0])
        names = json.loads(metrics).keys()
        counts[0] += "train/loss" in names
        counts[1] += "eval/loss" in names
        assert not any("train_loss" in name or "train_runtime" in name for name in names)
    return list(runs.values())


with contextlib.redirect_stdout(io.StringIO()):
    trainer = make_trainer("unnamed")
    trainer.train()
    trainer.evaluate()
    trainer.train()
    summary = trainer.state.log_history[-1]
    for _ in range(2):
        make_trainer("named", run_name="mine").train()
assert {"train_loss", "train_runtime"} <= summary.keys(), "the Trainer itself has logged them"
for project, expected in (("unnamed", [[3, 0], [3, 1]]), ("named", [[6, 0]])):
    runs = read_runs(project)
    print(f"{project}:", "; ".join(f"a run of {train} training losses and {eval} evaluations" for train, eval in runs))
    assert runs == expected
EOF
