"""One training of one method on one task, and how far its weights went from full fine-tuning's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .methods import CLIP, METHODS, adapted_matrices
from .tasks import Task

FORWARD_LIMIT = 1e3  # a loss beyond it: the training has diverged


@dataclass(frozen=True)
class Run:
    """What one training is, and the key of its result."""

    task: str
    method: str
    rank: int | None
    lr: float
    seed: int
    steps: int


Changes = dict[str, Tensor]
Watch = Callable[[int, nn.Module, Changes], None]


def train(run: Run, task: Task, watch: Watch | None = None) -> dict[str, Any]:
    """The measures of a training, with the losses of its steps.

    Args:
        run: which training.
        task: its task.
        watch: called before the first step and after every one with how many were made, the model, and the adapted
            matrices as they were before training.
    """
    start = time.perf_counter()
    model = task.model(run.seed)
    matrices = adapted_matrices(model, task.targets, task.head)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in set(matrices)}
    torch.manual_seed(run.seed)
    method = METHODS[run.method]
    prepared = method.prepare(task, model, run.rank or 0, run.lr, run.seed)
    warm_up = max(1, round(method.warm_up * run.steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, 1 - max(0, step - warm_up) / (run.steps - warm_up))

    schedules = [LambdaLR(optimizer, factor) for optimizer in prepared.optimizers]
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    looks = steps_after(task.looks, run)
    losses: list[float] = []
    held_out: dict[str, float] = {}
    diverged = False
    prepared.model.train()
    if watch is not None:
        watch(0, prepared.model, before)
    for step in range(run.steps):
        loss = task.loss(prepared.model, run.seed, step)
        losses.append(float(loss.detach()))
        if not losses[-1] < FORWARD_LIMIT:
            diverged = True
            break
        loss.backward()
        if not prepared.own_clip:
            nn.utils.clip_grad_norm_(trained, CLIP)
        for optimizer, schedule in zip(prepared.optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step + 1 in looks:
            with _evaluation(prepared.model):
                held_out[str(step + 1)] = task.held_out(prepared.model)
        if watch is not None:
            watch(step + 1, prepared.model, before)
    measures: dict[str, float] = {}
    if not diverged:
        with _evaluation(prepared.model):
            measures = task.evaluate(prepared.model)
    return {
        **asdict(run),
        "diverged": diverged,
        **measures,
        **({"held_out": held_out} if held_out else {}),
        "training_losses": [round(loss, 5) for loss in losses],
        "trainable": sum(p.numel() for p in trained),
        "seconds": round(time.perf_counter() - start, 3),
    }


def steps_after(parts: Iterable[float], run: Run) -> set[int]:
    """How many steps were made after parts of a training, one at least."""
    return {max(1, round(part * run.steps)) for part in parts}


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def changes(model: nn.Module, before: Changes) -> Changes:
    """The change of each adapted matrix: the adapter's product, or the weight less what it was."""
    with torch.no_grad():
        deltas = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                name = f"{name.removeprefix('base_model.model.')}.weight"
                # PiSSA moves a part of the weight into the adapter, so both count.
                deltas[name] = module.get_base_layer().weight + module.get_delta_weight("default") - before[name]
        own = dict(model.named_parameters())
        return deltas or {name: own[name] - weight for name, weight in before.items()}


def compare(change: Changes, reference: Changes) -> dict[str, float]:
    """The cosine of the angle between two changes, all matrices as one vector, and their distance over the
    reference's length.
    """
    product = sum(float((change[name] * of).sum()) for name, of in reference.items())
    distance = sum(float((change[name] - of).square().sum()) for name, of in reference.items()) ** 0.5
    length, reference_length = (sum(float(t.square().sum()) for t in d.values()) ** 0.5 for d in (change, reference))
    return {
        "cosine": product / max(length * reference_length, 1e-30),
        "distance": distance / reference_length,
        "length": length / reference_length,
    }


def best_of_rank(reference: Changes, rank: int) -> Changes:
    """The nearest change that adapters of a rank can make: each matrix's truncated singular value decomposition."""
    nearest = {}
    for name, matrix in reference.items():
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        nearest[name] = left[:, :rank] * values[:rank] @ right[:rank]
    return nearest
