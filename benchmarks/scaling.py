"""How memory, traffic and arithmetic of a training step fall with the ranks, measured on ranks that really run.

    python benchmarks/scaling.py --quick                     # two minutes, prints only
    python benchmarks/scaling.py                             # writes results/scaling.{json,md,png}
    deepspeed benchmarks/scaling.py --model Qwen2.5-7B       # on GPUs: one world size, that of the launcher

Without a launcher it spawns the ranks itself, as many as asked for, on however few cores there are. Of every rank:

- **bytes**, by kind, of the storages that exist between a backward pass and the optimizer's step, each counted once;
- **traffic** of a step: every c10d operator that torch dispatches, with the sizes of its tensors. ``all_to_all`` counts
  what goes to and comes from others; the others are counted as a ring carries them out: ``(N - 1) / N`` of the whole
  for gather, scatter and reduce, twice that for ``all_reduce``;
- **arithmetic**: the matrix products that ``torch.utils.flop_counter`` counts;
- **seconds** of forward, backward and optimizer, medians of steps in which nothing is counted.

Traffic and arithmetic are means of a step of ``B`` and one of ``A``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import numpy
import pandas
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from loft_ds import LoFTAdamW
from provenance import RESULTS, provenance

# A Llama whose adapters are large beside it, so that what the optimizer does can be seen on two cores.
TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Setup:
    """One training to measure.

    Attributes:
        stage: of ZeRO.
        batch: sequences of a rank in a step.
        rank: of the adapters, on every linear layer.
        precision: "bf16" or "fp32".
        model: what a config.json says, or a built-in name of loft_ds.plan.
        length: tokens of a sequence.
        steps: those whose time is taken.
        offload_second_moment: LoFTAdamW's.
    """

    stage: int
    batch: int
    rank: int = 16
    precision: str = "bf16"
    model: dict[str, Any] = field(default_factory=lambda: TINY)
    length: int = 32
    steps: int = 4


@dataclass
class Measured:
    """What one rank measured of a :class:`Setup`; bytes, floating-point operations, seconds."""

    memory: dict[str, int]
    sent: dict[str, float]
    received: dict[str, float]
    calls: dict[str, float]
    arithmetic: dict[str, float]
    seconds: dict[str, float]
    tokens_per_second: float


def _bytes_of(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the tensors' storages that are not in ``seen``, and puts them there."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def memory_of(engine: Any, optimizer: LoFTAdamW) -> dict[str, int]:
    """Bytes that this rank has allocated by kind; a storage that is two things is the first of them."""
    wrapper, parameters = engine.optimizer, list(engine.module.parameters())
    states = list(optimizer.state.values())

    def weights(trained: bool) -> Iterator[Tensor]:
        for p in parameters:
            if p.requires_grad == trained:
                yield from (p.data, *([p.ds_tensor] if hasattr(p, "ds_tensor") else []))

    def gradients() -> Iterator[Tensor]:
        yield from (p.grad for p in parameters if p.grad is not None)
        for grads in getattr(wrapper, "averaged_gradients", {}).values():
            yield from grads if isinstance(grads, list) else [grads]
        if getattr(wrapper, "grad_partitions_flat_buffer", None) is not None:
            yield wrapper.grad_partitions_flat_buffer

    def state(*kinds: str) -> Iterator[Tensor]:
        yield from (s[kind] for s in states for kind in kinds if kind in s)

    def buckets() -> Iterator[Tensor]:
        for bucket in getattr(wrapper, "ipg_buckets", {}).values():
            held = getattr(bucket, "buffer", None)
            yield from [] if held is None else held if isinstance(held, list) else [held]

    seen: set[int] = set()
    return {
        "base weights": _bytes_of(weights(False), seen),
        "adapters": _bytes_of(weights(True), seen),
        "gradients": _bytes_of(gradients(), seen),
        "masters": _bytes_of((p for group in optimizer.param_groups for p in group["params"]), seen),
        "momentum": _bytes_of(state("momentum", "exp_avg"), seen),
        "second moments": _bytes_of(state("second_moment", "exp_avg_sq"), seen),
        "pending or previous": _bytes_of(state("pending", "previous"), seen),
        "bases": _bytes_of(state("basis"), seen),
        "reduce buckets": _bytes_of(buckets(), seen),
    }


class Traffic(TorchDispatchMode):
    """Counts the collectives that torch dispatches: calls, and bytes that this rank sends and receives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = defaultdict(int)
        self.sent: dict[str, float] = defaultdict(float)
        self.received: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        others = (world - 1) / world

        def size(argument: Any) -> int:
            if isinstance(argument, Tensor):
                return argument.numel() * argument.element_size()
            return sum(map(size, argument)) if isinstance(argument, list | tuple) else 0

        if name == "alltoall_base_":
            output, sent, _, received_counts, sent_counts = args[:5]
            both = [
                size(t) * (1 - counts[rank] / sum(counts)) if sum(counts) else 0.0
                for t, counts in ((sent, sent_counts), (output, received_counts))
            ]
        elif name.startswith("allreduce"):
            both = [2 * others * size(args[0])] * 2
        elif name.startswith(("allgather", "_allgather")):
            both = [others * size(args[0])] * 2
        elif name.startswith(("reduce_scatter", "_reduce_scatter")):
            both = [others * size(args[1])] * 2
        elif name.startswith(("broadcast", "reduce_")):
            both = [others * size(args[0])] * 2
        elif name in ("barrier", "monitored_barrier_"):
            both = [0.0, 0.0]
        else:
            raise NotImplementedError(f"how many bytes c10d::{name} moves is not known here")
        self.calls[name] += 1
        self.sent[name] += both[0]
        self.received[name] += both[1]


def settings(setup: Setup) -> dict[str, Any]:
    """DeepSpeed's configuration: buckets far smaller than its defaults, which are for models of billions."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": setup.batch,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": setup.stage, "reduce_bucket_size": 2**16, "allgather_bucket_size": 2**16},
    }
    if setup.precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def build_model(setup: Setup) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**setup.model)
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return get_peft_model(
        model,
        LoraConfig(r=setup.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )


def measure(rank: int, world: int, setup: Setup) -> Measured:
    """Train a few steps on this rank, one of ``world`` in an initialised process group."""
    device = torch.device(get_accelerator().current_device_name())
    model = build_model(setup)
    optimizer = LoFTAdamW(model, lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(setup))
    generator = torch.Generator().manual_seed(rank)
    vocabulary = setup.model["vocab_size"]

    def timed(phase: str, function: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[phase].append(time.perf_counter() - start)
        return result

    @contextmanager
    def counted(phase: str) -> Iterator[None]:
        with traffic, FlopCounterMode(display=False) as flops:
            yield
        arithmetic[phase] += flops.get_total_flops() / 2

    def tokens() -> Tensor:
        return torch.randint(vocabulary, (setup.batch, setup.length), generator=generator).to(device)

    seconds: dict[str, list[float]] = defaultdict(list)
    arithmetic: dict[str, float] = defaultdict(float)
    traffic = Traffic()
    for _ in range(2):  # both factors have moved, every state is there
        engine.backward(engine(input_ids=(batch := tokens()), labels=batch).loss)
        engine.step()
    memory = {}
    for _ in range(2):
        batch = tokens()
        with counted("forward"):
            loss = engine(input_ids=batch, labels=batch).loss
        with counted("backward"):
            engine.backward(loss)
        memory = memory_of(engine, optimizer)
        with counted("optimizer"):
            engine.step()
    for _ in range(setup.steps):
        batch = tokens()
        loss = timed("forward", lambda: engine(input_ids=batch, labels=batch).loss)  # noqa: B023
        timed("backward", lambda: engine.backward(loss))  # noqa: B023
        timed("optimizer", engine.step)
    engine.destroy()
    median = {phase: statistics.median(times) for phase, times in seconds.items()}
    per_step = [{k: v / 2 for k, v in counts.items()} for counts in (traffic.sent, traffic.received, traffic.calls)]
    speed = world * setup.batch * setup.length / sum(median.values())
    return Measured(memory, *per_step, dict(arithmetic), median, speed)
