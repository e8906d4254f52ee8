"""Runs the main job under ZeRO 0 to 3 and with plain LoRA, and draws the losses: ``results/main_job.png``, ``.json``.

    python benchmarks/main_job.py

Every run sees the same data in the same order. Learning rates are chosen for each method by its own sweep, at the
stage of ``SWEEP_AT``, by the held-out loss at the end; the sweep stands in the JSON. If a sweep's best is at its edge,
the script says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from provenance import ROOT, commit_of, device_name

STAGES = ("zero0", "zero1", "zero2", "zero3")
SWEEP_AT = "zero2"
SWEEP = {"loft": (1e-4, 2e-4, 4e-4, 8e-4), "lora": (1e-3, 2e-3, 4e-3, 8e-3)}


def launch(optimizer: str, config: str, learning_rate: float, steps: int, ranks: int, resume: bool) -> dict[str, Any]:
    """One run of the main job through DeepSpeed's launcher, and what is kept of it."""
    count = [] if torch.accelerator.is_available() else ["--num_accelerators", str(ranks)]
    command = [
        *("deepspeed", *count, "launch/train.py", "--deepspeed", f"ds_configs/{config}.json"),
        *("--optimizer", optimizer, "--learning_rate", str(learning_rate), "--max_steps", str(steps)),
    ]
    print(shlex.join(command), flush=True)
    folder = ROOT / "runs" / "main_job" / f"{optimizer}-{config}-{learning_rate}-{steps}"
    record = folder / "benchmark.json"
    if resume and record.exists():
        return json.loads(record.read_text())
    executable = str(Path(sys.executable).parent / "deepspeed")
    extra = ["--output_dir", str(folder), "--disable_tqdm", "True"]
    commit = commit_of(ROOT)
    subprocess.run([executable, *command[1:], *extra], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    history = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    logged = [entry for entry in history if "loss" in entry]
    result = {
        "optimizer": optimizer,
        "config": config,
        "learning_rate": learning_rate,
        "command": shlex.join(command),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "loss": [entry["loss"] for entry in logged],
        "grad_norm": [entry.get("grad_norm") for entry in logged],
        **json.loads((folder / "metrics.json").read_text()),
    }
    record.write_text(json.dumps(result))
    return result


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Losses on the left; on the right how far each stage is from stage 0."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    by_name = {(run["optimizer"], run["config"]): run for run in runs}
    reference = by_name["loft", STAGES[0]]
    for index, stage in enumerate(STAGES):
        run = by_name["loft", stage]
        steps = range(1, len(run["loss"]) + 1)
        label = f"LoFT, ZeRO {stage[-1]}: held out {run['eval_loss_after']:.3f}"
        # The curves lie on each other: wide to narrow, so that all are seen.
        left.plot(steps, run["loss"], label=label, linewidth=8 - 2 * index, alpha=0.45 + 0.15 * index)
        if stage != STAGES[0]:
            apart = [max(abs(a - b), 1e-7) for a, b in zip(run["loss"], reference["loss"], strict=True)]
            right.semilogy(steps, apart, label=f"ZeRO {stage[-1]}", marker=".")
    lora = by_name["lora", SWEEP_AT]
    label = f"LoRA with AdamW: held out {lora['eval_loss_after']:.3f}"
    left.plot(range(1, len(lora["loss"]) + 1), lora["loss"], label=label, color="black", linestyle="--")
    left.set(
        xlabel="step", ylabel="training loss (nats a token)", title=f"held out before: {lora['eval_loss_before']:.3f}"
    )
    right.set(xlabel="step", ylabel="|loss - loss under ZeRO 0|", title="LoFT (1e-7 stands for that or less)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2, help="processes on a machine without an accelerator")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--resume", action="store_true", help="take the finished runs that lie in runs/main_job")
    parser.add_argument("--draw_only", action="store_true", help="draw the picture again from the JSON")
    args = parser.parse_args()
    record = args.out / "main_job.json"
    if args.draw_only:
        draw(json.loads(record.read_text())["runs"], record.with_suffix(".png"))
        return

    def run(optimizer: str, config: str, rate: float) -> dict[str, Any]:
        return launch(optimizer, config, rate, args.steps, args.ranks, args.resume)

    sweeps = {name: [run(name, SWEEP_AT, rate) for rate in rates] for name, rates in SWEEP.items()}
    best = {name: min(sweep, key=lambda one: one["eval_loss_after"]) for name, sweep in sweeps.items()}
    for name, winner in best.items():
        if winner["learning_rate"] in (SWEEP[name][0], SWEEP[name][-1]):
            print(f"{name}: the best learning rate {winner['learning_rate']} is at the sweep's edge; widen it")
    others = [run("loft", stage, best["loft"]["learning_rate"]) for stage in STAGES if stage != SWEEP_AT]
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": device_name(),
        "python": platform.python_version(),
        "sweep": {
            name: [{key: one[key] for key in ("learning_rate", "eval_loss_after")} for one in sweep]
            for name, sweep in sweeps.items()
        },
        "runs": [*others, best["loft"], best["lora"]],
    }
    record.write_text(json.dumps(results, indent=1) + "\n")
    draw(results["runs"], record.with_suffix(".png"))


if __name__ == "__main__":
    main()
