"""PEFT's own comparison on MetaMathQA, with LoFT beside its published rows. It needs a GPU and a model hub.

    git clone https://github.com/huggingface/peft
    pip install -r peft/method_comparison/MetaMathQA/requirements.txt
    python benchmarks/metamath.py peft --ranks 1 8 32 --rates 3e-5 1e-4 3e-4     # trains
    python benchmarks/metamath.py peft                                           # the table of what is there

Each training is PEFT's ``run.py``, unchanged, in a process of its own: Llama-3.2-3B, 5,000 steps of 4 problems, then
the accuracy on GSM8K's test set. It differs from PEFT's row ``lora/llama-3.2-3B-rank32`` by the optimizer, and by who
clips: LoFT by its own norm, at the same 1.0. PEFT's program writes a JSON for each, in ``temporary_results`` unless its
checkout is on the branch ``main``. What has its JSON is not trained again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import torch
from peft import LoraConfig, PeftModel
from transformers import get_cosine_schedule_with_warmup

from loft_ds import LoFTAdamW

FOLDER = "method_comparison/MetaMathQA"
RESULTS = ("results", "temporary_results")
OPTIMIZER = "LoFTAdamW"
MODEL = "llama-3.2-3B"
CLIP, WEIGHT_DECAY = 1.0, 0.1  # as in default_training_params.json


def write_experiment(folder: Path, r: int, rate: float) -> Path:
    """What PEFT's program reads of a training: ``experiments/loft/NAME`` in its folder.

    Args:
        folder: PEFT's, with ``run.py``.
        r: the adapters' rank; alpha and targets are those of PEFT's own rows.
        rate: the learning rate.
    """
    experiment = folder / "experiments" / "loft" / f"{MODEL}-rank{r}-lr_{rate:g}"
    LoraConfig(r=r, lora_alpha=2 * r, task_type="CAUSAL_LM").save_pretrained(experiment)
    settings = {"lr": rate, "weight_decay": WEIGHT_DECAY, "max_grad_norm": CLIP}
    params = {"optimizer_type": OPTIMIZER, "optimizer_kwargs": settings, "grad_norm_clip": 0.0}
    (experiment / "training_params.json").write_text(json.dumps(params, indent=2) + "\n")
    return experiment


def build_loft(model: PeftModel, warm_up: float, *, max_steps: int, lr_scheduler_arg: str, **settings: Any) -> Any:
    """LoFT and the schedule that PEFT's program gives every optimizer.

    Args:
        model: with its adapters.
        warm_up: part of the steps.
        max_steps: how many there are.
        lr_scheduler_arg: its name.
        settings: of the optimizer.

    Raises:
        ValueError: another schedule than PEFT's default.
    """
    if lr_scheduler_arg != "cosine":
        raise ValueError(f"the comparison's schedule is cosine, not {lr_scheduler_arg}")
    optimizer = LoFTAdamW(model, **settings)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, int(warm_up * max_steps), max_steps)


def train(experiment: Path) -> None:
    """One training in this process, by PEFT's program, to which LoFT is one more optimizer by name."""
    folder = experiment.parents[2]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    utils: Any = importlib.import_module("utils")
    others = utils.get_optimizer_and_scheduler

    def build(model: PeftModel, *, optimizer_type: str, **settings: Any) -> Any:
        if optimizer_type == OPTIMIZER:
            return build_loft(model, utils.WARMUP_STEP_RATIO, **settings)
        return others(model, optimizer_type=optimizer_type, **settings)

    utils.get_optimizer_and_scheduler = build
    setattr(torch.optim, OPTIMIZER, LoFTAdamW)  # where the program looks whether a name is one
    sys.argv = ["run.py", "--verbose", str(experiment.relative_to(folder))]
    runpy.run_path("run.py", run_name="__main__")


def read_results(folder: Path) -> pandas.DataFrame:
    """LoRA's rows, full fine-tuning's and LoFT's, best first."""
    rows = []
    for file in sorted(each for name in RESULTS for each in (folder / name).glob("*.json")):
        result = json.loads(file.read_text())
        run, trained = result["run_info"], result["train_info"]
        if not run["experiment_name"].startswith(("lora/", "full-finetuning/", "loft/")):
            continue
        last, config, adapter = trained["metrics"][-1], run["train_config"], run["peft_config"]
        rows.append(
            {
                "experiment": run["experiment_name"],
                "optimizer": config["optimizer_type"],
                "learning rate": config["optimizer_kwargs"]["lr"],
                "r": adapter["r"] if adapter else "",
                "test accuracy": last["test accuracy"],
                "training loss": last["train loss"],
                "forgetting": last["forgetting"],
                "minutes": trained["train_time"] / 60,
                "peak GB": trained["accelerator_memory_max"] / 1e9,
                "date": run["created_at"][:10],
            }
        )
    return pandas.DataFrame(rows).sort_values("test accuracy", ascending=False)


def main(arguments: list[str] | None = None) -> None:
    """Trains what is asked for and has no result yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of PEFT")
    parser.add_argument("--ranks", type=int, nargs="+", default=[], help="of adapters to train with LoFT")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4], help="learning rates, each with each rank")
    parser.add_argument("--experiment", type=Path, help=argparse.SUPPRESS)  # of a process that trains
    args = parser.parse_args(arguments)
    folder = args.checkout.resolve() / FOLDER
    if not (folder / "run.py").is_file():
        parser.error(f"{args.checkout} is no checkout of PEFT: it has no {FOLDER}/run.py")
    if args.experiment is not None:
        train(args.experiment)
        return
    for experiment in [write_experiment(folder, r, rate) for r in args.ranks for rate in args.rates]:
        if not any((folder / name / f"loft--{experiment.name}.json").exists() for name in RESULTS):
            command = [sys.executable, __file__, str(folder.parents[1]), "--experiment", str(experiment)]
            subprocess.run(command, check=True)
    print(read_results(folder).to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    main()
