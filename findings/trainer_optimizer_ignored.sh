#!/usr/bin/env bash
# The ways to give transformers' Trainer an optimizer, under DeepSpeed, with and without "optimizer" in the JSON.
# Guess: Trainer(optimizers=...) is used where the JSON has none, and where both say something it raises.
# Seen: optimizers=(...) is dropped in either case. With one in the JSON, four of five ways are dropped without a word.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "deepspeed==0.19.8"

python - <<'EOF'
import torch
from one_rank import deepspeed  # noqa: F401  # the process group
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments


class Mine(torch.optim.SGD):
    pass


class Overriding(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = Mine(self.model.parameters(), lr=1e-3)
        return self.optimizer


class OverridingIfNone(Trainer):
    def create_optimizer(self, model=None):
        return Overriding.create_optimizer(self) if self.optimizer is None else self.optimizer


ids = torch.arange(16)
data = [{"input_ids": ids, "labels": ids}] * 4
sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def train(way, json):
    """The class of the optimizer that the engine steps."""
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    cls, arguments, settings = Trainer, {}, {}
    if way == "optimizers=(mine, None)":
        settings["optimizers"] = Mine(model.parameters(), lr=1e-3), None
    elif way == "optimizer_cls_and_kwargs=":
        settings["optimizer_cls_and_kwargs"] = Mine, {"lr": 1e-3}
    elif way == "--optim sgd":
        arguments["optim"] = "sgd"
    else:
        cls = Overriding if way == "create_optimizer" else OverridingIfNone
    args = TrainingArguments("out", deepspeed=json, max_steps=1, per_device_train_batch_size=2, use_cpu=True,
                             report_to=[], save_strategy="no", disable_tqdm=True, **arguments)  # fmt: skip
    trainer = cls(model, args, train_dataset=data, **settings)
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except ValueError:
        return "ValueError"
    return type(trainer.model_wrapped.basic_optimizer).__name__


ways = ("optimizers=(mine, None)", "optimizer_cls_and_kwargs=", "--optim sgd", "create_optimizer",
        "create_optimizer, if None")  # fmt: skip
without = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
# torch_adam: DeepSpeed's own AdamW would be compiled first
within = {**without, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}
print(f"{'asked for':>26} {'none in JSON':>13} {'AdamW in JSON':>14}")
for way in ways:
    used = train(way, without), train(way, within)
    print(f"{way:>26} {used[0]:>13} {used[1]:>14}")
    asked = "SGD" if way == "--optim sgd" else "Mine"
    assert used[0] == ("AdamW" if way == "optimizers=(mine, None)" else asked)
    assert used[1] == ("ValueError" if way == "create_optimizer" else "AdamW")
EOF
