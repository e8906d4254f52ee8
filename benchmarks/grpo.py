"""Reinforcement learning at rank 1: LoFT and LoRA under TRL's GRPO, each with AdamW's own eps and with 1e-4.

    PYTHONPATH=.venv/trl python benchmarks/grpo.py

A run is a line of ``results/grpo.jsonl``, and only those that are missing are done. A case is an optimizer and an eps.
Each has a sweep of learning rates with seed 0, and other seeds at the rate that earns most. So that eps alone differs,
larger ones have these at the best rate of AdamW's own too, and some have them at the rates of ``PAIRED``.

But for clipping, eps of 1e-2 is what 1e-4 would be if all gradients were a hundredth of what they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from loft_ds import LoFTMixin
from loft_ds.training.assets import default_model
from provenance import RESULTS, provenance

Run = dict[str, Any]
EPS, LARGE_EPS = 1e-8, 1e-4
# The learning rates of seed 0.
SWEEPS = {
    ("LoFT", EPS): (3e-4, 1e-3),
    ("LoRA", EPS): (3e-3, 1e-2),
    ("LoFT", LARGE_EPS): (1e-2, 1e-1),
    ("LoFT", 1e-2): (1e-2,),
    ("LoRA", LARGE_EPS): (3e-3, 1e-2),
    ("LoFT", 1e-3): (),
}
PAIRED = {("LoFT", EPS): (3e-4,), ("LoFT", LARGE_EPS): (3e-4,)}
SEEDS = (0, 1, 2)
STEPS = 12
PROMPTS, GROUP, TOKENS = 2, 6, 16  # of a step, answers to each of them, and tokens of an answer
RANK, ALPHA = 1, 2
QUANTILES = (0.1, 0.5, 0.9)
EVERY = 997  # of a matrix's denominators one in so many is looked at: a prime, so that all columns have their share


class LoFTGRPOTrainer(LoFTMixin, GRPOTrainer):
    """TRL's trainer with LoFT, or with AdamW where ``use_loft`` is False."""


class Watch(TrainerCallback):
    """Keeps the norm of the factors' gradients as the optimizer gets them: AdamW clipped ones, LoFT all of them."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
        self.norms.append(float(torch.stack(norms).norm()))


def reward_digits(completions: Sequence[str], **_: Any) -> list[float]:
    """The share of an answer's characters that are digits."""
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in completions]


def adamw_denominators(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """``sqrt(v)`` of every number of the factors, corrected for its bias, before eps is added."""
    beta2 = optimizer.param_groups[0]["betas"][1]
    return torch.cat(
        [(state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt().flatten() for state in optimizer.state.values()]
    )


def loft_denominators(optimizer: Any) -> torch.Tensor:
    """The same of the full matrices, of one number in ``EVERY``: both factors' moves have their own.

    At rank 1 it is ``sqrt(P_i / S) |q_j|``, of a row's second moment and the partner's unit vector.
    """
    state, parts = optimizer.state, []
    for pair in optimizer.trainable.pairs:
        for factor, partner in (pair, pair[::-1]):
            own = state[factor.name]
            lengths = (own["second_moment"].flatten().double() / own["weights"].item()).sqrt()
            rows = state[partner.name].get("before", partner.param.detach()).flatten()  # as they were divided by
            parts.append(torch.outer(lengths, (rows / rows.norm()).abs().double()).flatten()[::EVERY])
    return torch.cat(parts).float()


def train(method: str, eps: float, lr: float, seed: int, steps: int, model: str) -> Run:
    """One run, and what is kept of it."""
    watch = Watch()
    data = [{"prompt": f"{a} times {b} is"} for a in range(2, 13) for b in range(2, 13)]
    trainer = LoFTGRPOTrainer(
        model=model,
        reward_funcs=reward_digits,
        train_dataset=Dataset.from_list(data),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
        use_loft=method == "LoFT",
        args=GRPOConfig(
            output_dir="runs/grpo",
            learning_rate=lr,
            adam_epsilon=eps,
            seed=seed,
            max_steps=steps,
            lr_scheduler_type="constant",
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            bf16=False,  # rounding is no question here
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    wrapper: Any = trainer.optimizer  # Accelerate's
    divisors = (loft_denominators if method == "LoFT" else adamw_denominators)(wrapper.optimizer)
    found = provenance()
    return {
        **{"method": method, "eps": eps, "lr": lr, "seed": seed, "steps": steps},
        "reward": [entry["reward"] for entry in logged],
        "grad_norm": [float(entry["grad_norm"]) for entry in logged],
        "factors_norm": watch.norms,
        "denominators": {str(q): float(torch.quantile(divisors, q)) for q in QUANTILES},
        "seconds": seconds,
        **found,
        "versions": {**found["versions"], "trl": importlib.metadata.version("trl")},
    }


def earned(run: Run) -> float:
    """The mean reward of all steps: at the end several runs have all there is."""
    return sum(run["reward"]) / len(run["reward"])


def missing(runs: list[Run]) -> Iterator[tuple[str, float, float, int]]:
    """Method, eps, learning rate and seed of what is still to do; ``runs`` grows on the way."""

    def best(method: str, eps: float) -> float:
        swept = [run for run in runs if (run["method"], run["eps"], run["seed"]) == (method, eps, SEEDS[0])]
        rate: float = max(swept, key=earned)["lr"]
        return rate

    def left(method: str, eps: float, lr: float, seed: int) -> bool:
        return (method, eps, lr, seed) not in {(run["method"], run["eps"], run["lr"], run["seed"]) for run in runs}

    for (method, eps), rates in SWEEPS.items():
        paired = PAIRED.get((method, eps), ())
        swept = dict.fromkeys(rates if eps == EPS else (*paired, best(method, EPS), *rates))
        yield from ((method, eps, lr, SEEDS[0]) for lr in swept if left(method, eps, lr, SEEDS[0]))
        chosen = dict.fromkeys((*paired, best(method, EPS), best(method, eps)))
        yield from ((method, eps, lr, seed) for lr in chosen for seed in SEEDS if left(method, eps, lr, seed))


def main() -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--results", type=Path, default=RESULTS / "grpo.jsonl", help="the JSON lines")
    parser.add_argument("--model", default=str(default_model()), help="a folder or a hub name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    for method, eps, lr, seed in missing(runs):
        runs.append(train(method, eps, lr, seed, args.steps, args.model))
        with args.results.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
        print(f"{method}, eps {eps:g}, {lr:g}, seed {seed}: {earned(runs[-1]):.3f}", flush=True)


if __name__ == "__main__":
    main()
