"""What a run tells while it runs: to people, to TensorBoard, and line by line to ``log.jsonl``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint import naming
from ..hf import LoFTTrainer
from ..ranks import first_rank

LOG = "log.jsonl"


class LoggedTrainer(LoFTTrainer):
    """A LoFTTrainer whose log of the loss also says what a step costs: see :class:`Meter`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._meter = Meter(self.args.device)
        self.add_callback(self._meter)
        self.add_callback(JsonLines())

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer's; every rank's batches are of one size."""
        self._meter.tokens += inputs["input_ids"].numel() * self.args.world_size
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's."""
        super().log({**logs, **self._meter.read()} if "loss" in logs else logs, start_time)


class Meter(TrainerCallback):
    """Means over the steps since the last reading, on this rank.

    ``step_time`` is seconds from the end of a step to the end of the next, reading its data included, evaluating and
    saving left out. ``optimizer_share`` is the part of it inside the optimizer's own ``step``, which DeepSpeed calls
    once a group: LoFT's work and traffic, without what DeepSpeed does before and after.

    Args:
        device: where the training runs. On an accelerator the optimizer is timed by events in its queue, which
            nobody waits for before the log does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.tokens = 0
        self._steps = 0
        self._seconds = 0.0
        self._marks: list[Any] = []  # begin, end, begin, end, ... of the optimizer's calls
        self._hooks: list[Any] = []
        self._since = 0.0

    def _mark(self, *_: Any) -> None:
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            event = torch.Event(self._device, enable_timing=True)
            event.record()
            self._marks.append(event)

    def _between(self, begin: Any, end: Any) -> float:
        if self._device.type == "cpu":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def read(self) -> dict[str, float]:
        """Seconds a step, tokens a second over all ranks, and the optimizer's share; then counting begins anew."""
        inside = sum(map(self._between, self._marks[::2], self._marks[1::2]))
        read = {
            "step_time": self._seconds / self._steps,
            "tokens_per_second": self.tokens / self._seconds,
            "optimizer_share": inside / self._seconds,
        }
        self.tokens, self._steps, self._seconds = 0, 0, 0.0
        self._marks.clear()
        return read

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper, then DeepSpeed's
            optimizer = optimizer.optimizer
        self._hooks = [optimizer.register_step_pre_hook(self._mark), optimizer.register_step_post_hook(self._mark)]
        self._since = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._seconds += now - self._since
        self._steps += 1
        self._since = now

    def _resume(self, *_: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    on_evaluate = on_save = _resume


class JsonLines(TrainerCallback):
    """Every entry of the Trainer's log as a line of ``log.jsonl``, the moment it is made.

    A resumed run begins with the lines of its checkpoint, so that no step stands there twice.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if first_rank():
            self._write(args, "w", state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if first_rank():
            self._write(args, "a", state.log_history[-1:])

    def _write(self, args: TrainingArguments, mode: str, entries: list[dict[str, Any]]) -> None:
        path = Path(args.output_dir) / LOG
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's ``log.jsonl``."""
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
