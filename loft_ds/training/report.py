"""What a run leaves beside its adapter and its log: ``metrics.json`` and ``loss.png``."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files: needs no display
from matplotlib import pyplot as plt

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "loft_ds")


def series(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity in the Trainer's log."""
    entries = [entry for entry in history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def write_report(folder: Path, facts: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes both files and gives back what ``metrics.json`` holds.

    Args:
        folder: The run's output folder.
        facts: What the run was: model, text, optimizer, sizes.
        history: The Trainer's log.
    """
    steps, train = series(history, "loss")
    _, held_out = series(history, "eval_loss")
    _, runtime = series(history, "train_runtime")
    metrics = {
        **facts,
        "steps": steps[-1] if steps else 0,
        "train_loss_first": train[0] if train else None,
        "train_loss_last": train[-1] if train else None,
        "eval_loss_before": held_out[0] if len(held_out) > 1 else None,
        "eval_loss_after": held_out[-1],
        "eval_perplexity_after": math.exp(min(held_out[-1], 700.0)),  # exp overflows a float from 710 on
        "train_runtime_seconds": runtime[-1] if runtime else None,
        "versions": {package: version(package) for package in PACKAGES},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw_losses(folder / "loss.png", {"training": series(history, "loss")}, {"held out": series(history, "eval_loss")})
    return metrics


def draw_losses(
    path: Path,
    curves: dict[str, tuple[list[int], list[float]]],
    points: dict[str, tuple[list[int], list[float]]] | None = None,
) -> None:
    """Draws losses over steps: ``curves`` as lines, ``points`` with markers."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, (steps, values) in curves.items():
        axes.plot(steps, values, label=label)
    for label, (steps, values) in (points or {}).items():
        axes.plot(steps, values, marker="o", linestyle="--", label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
