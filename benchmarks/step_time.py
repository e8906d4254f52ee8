"""What an optimizer step costs: time and peak extra memory, every alternative side by side.

    python benchmarks/step_time.py --quick                       # a minute, prints only
    python benchmarks/step_time.py --official PATH --output benchmarks/results   # PATH: github.com/tnurbek/loft

A cell is one linear layer of a real model at one rank. All methods of a cell run in turn in the same process, sample
by sample, and so do the matrix product and the copy whose rates give the floor: what else the machine does hits all of
them. A sample is the mean of two steps, because an alternating LoFT moves ``B`` in one and ``A`` in the next; a time is
the median. On a CPU it is CPU time of one thread, so that other processes cost nothing.

``LoFT`` is the default: both factors move on every step up to rank ``JOINT_RANK``, one of them above. The authors' code
moves one at any rank, as ``LoFT alternating`` does.

The floor of a step is ``max(arithmetic / matrix-product rate, bytes / copy rate)``, with the arithmetic that LoFT needs
with packed second moments (no square root, no division) and every number of its state read and written once.

Extra memory is the highest that torch's allocator stood above its level before the step, in a step of its own. What a
thread of the compiled kernels takes by itself, some MB at most, is not in it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from peft.optimizers import create_lorafa_optimizer
from torch import nn

from loft_ds import Blocks, LoFTAdamW, kernels
from loft_ds.algebra import products_in
from loft_ds.blocks import JOINT_RANK
from provenance import commit_of, provenance

# The distinct linear layers (out, in) of each model.
MODELS = {
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "Llama-3-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "Llama-3-70B": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
}
# How often each of the first's is in it.
LAYERS = dict(zip(MODELS["SmolLM2-135M"], (60, 60, 60, 30), strict=True))
RANKS = [1, 4, 16, 64, 128]
LOFT, ALTERNATE, SIMPLE, OFFICIAL = "LoFT", "LoFT alternating", "LoFT simple", "authors' LoFT"
FUSED, CPU_ADAM, LORA_FA, FULL = "AdamW fused", "DeepSpeedCPUAdam", "LoRA-FA", "AdamW full matrix"
METHODS = [LOFT, ALTERNATE, OFFICIAL, SIMPLE, FUSED, CPU_ADAM, LORA_FA, FULL]

PRODUCT_SIZE, COPY_SIZE = 2048, 1 << 26
GIB = 2**30


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """CPU time on a CPU, all else by the clock on the wall."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def extra_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The allocator's high-water mark above its level at the start."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes), default=0)


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def adapted_linear(shape: tuple[int, int], rank: int, device: torch.device) -> nn.Module:
    """A PEFT model of one linear layer; the frozen matrix takes address space, never memory."""
    with torch.device("meta"):
        linear = nn.Linear(shape[1], shape[0], bias=False)
    model = nn.Sequential()
    model.add_module("linear", linear.to_empty(device=device))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["linear"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT's B = 0 would spare LoFT most of its work
            nn.init.normal_(parameter, std=0.02)
    return adapted.to(device)


class Step:
    """An optimizer with gradients set by hand, new ones each step."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.parameters = [p for p in parameters if p.requires_grad]  # LoRA-FA has frozen some
        parameters = self.parameters
        self.gradients = [[torch.randn_like(p) * 1e-3 for p in parameters] for _ in range(2)]

    def __call__(self) -> None:
        """Two steps."""
        for gradients in self.gradients:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()


def build(method: str, shape: tuple[int, int], rank: int, device: torch.device) -> Step:
    if method == FULL:
        parameter = nn.Parameter(torch.randn(shape, device=device) * 0.02)
        return Step(torch.optim.AdamW([parameter], fused=True), [parameter])
    model = adapted_linear(shape, rank, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Step(optimizer_of(method, model), parameters)


def optimizer_of(method: str, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if method in (LOFT, ALTERNATE, SIMPLE):
        blocks = Blocks(second_moment="elementwise" if method == SIMPLE else "matrix")
        return LoFTAdamW(model, lr=1e-4, blocks=blocks, turns="alternate" if method == ALTERNATE else None)
    if method == OFFICIAL:
        return importlib.import_module("loft_optim.optimizer").LoFTAdamW(parameters, lr=1e-4, model=model)
    if method == CPU_ADAM:
        return DeepSpeedCPUAdam(parameters, lr=1e-4, adamw_mode=True)
    if method == LORA_FA:
        assert isinstance(model, peft.PeftModel)
        rank = model.peft_config["default"].r
        return create_lorafa_optimizer(model, r=rank, lora_alpha=2 * rank, lr=1e-4)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def floor(shape: tuple[int, int], rank: int) -> tuple[float, float]:
    """Arithmetic and bytes of one LoFT step, the mean over a turn of ``B`` and one of ``A``; at ranks at which both
    move jointly, of both.
    """
    packed = rank * (rank + 1) // 2
    joint = rank <= JOINT_RANK
    moves = 2 if joint else 1  # of a factor in two steps
    # Products of its rows and (r, r) matrices in two steps, of a Gram matrix only a triangle. As it leads: gradient, U
    # to the factor, Gram matrix and cross product; as it follows: gradient, momentum, pending, Gram matrix. Jointly
    # also, as it leads, the last move's Gram matrix and cross product; as it follows, momentum once more, rows times
    # gradient, U to the factor, and two and a half for what of U lies outside.
    products = 3.5 + 3.5 + (1.5 + 5.5 if joint else 0)
    operations = numbers = 0.0
    for k, l in (shape, shape[::-1]):  # noqa: E741
        operations += moves * 2 * k * l * (packed + 2 * rank)  # V, M and U @ Q
        operations += 3 * k * rank**3  # R.T P R, of whose second product only a triangle is needed
        operations += 2 * rank**2 * (products * k + moves * 2 * l)  # and Q and the corrections, of the partner's rows
        # In a move P and X are read and written and T is read. In two steps M is twice; both gradients are read; and
        # what is pending, or the rows before a move, are written and read.
        numbers += moves * (k * (2 * packed + 2 * rank) + l * rank) + k * rank * (2 * 2 + 2 + 2)
    return operations / 2, 4 * numbers / 2


def needed_bytes(method: str, shape: tuple[int, int], rank: int) -> float:
    """State and temporaries, to leave out what cannot fit."""
    packed, size = rank * (rank + 1) // 2, shape[0] * shape[1]
    return {
        **dict.fromkeys((LOFT, ALTERNATE), 4 * sum(shape) * (packed + 12 * rank) + 2**27),
        # (k, r, r) twice while it is rotated; the (k, r, l) product and its product with T.
        OFFICIAL: 4 * (2 * sum(shape) * rank**2 + 2 * size * rank + 2 * size),
        FULL: 4 * 5 * size,
    }.get(method, 4 * sum(shape) * rank * 20)


def measure_cell(
    shape: tuple[int, int],
    rank: int,
    methods: list[str],
    device: torch.device,
    repeats: int,
    limit: float,
    most_tflop: float,
) -> dict[str, Any]:
    """Medians of all methods and the floor for one layer and rank.

    Args:
        shape: (out, in) of the layer.
        rank: of the adapter.
        methods: what is measured.
        device: where.
        repeats: samples of each method.
        limit: seconds of samples a method may take.
        most_tflop: LoFT in either form is left out where a step needs more, in 10^12 operations.
    """
    tflop = floor(shape, rank)[0] / 1e12
    steps: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = {}
    for method in sorted(methods, key=lambda m: needed_bytes(m, shape, rank)):
        needed = needed_bytes(method, shape, rank)
        if needed > 0.9 * available_bytes(device):
            results[method] = {"note": f"needs about {needed / GIB:.0f} GiB"}
            continue
        if tflop > most_tflop and method in (LOFT, ALTERNATE, OFFICIAL):
            results[method] = {"note": f"needs {tflop:.1f} TFLOP"}
            continue
        steps[method] = build(method, shape, rank, device)
        steps[method]()
        results[method] = {"extra_bytes": extra_bytes(steps[method], device), "samples": []}

    # The kernels' float32 products are three TF32 ones where they use tensor cores: no slower way is a floor.
    fused = kernels._fused() if device.type == "cuda" else None
    passes = 3 if fused is not None and fused._precision(device) == "tf32x3" else 1
    rates = Rates(device, passes)
    for repeat in range(repeats):
        for method, step in steps.items():
            samples = results[method]["samples"]
            if repeat == 0 or sum(samples) * 2 * (1 + 1 / len(samples)) < limit:
                samples.append(seconds(step, device) / 2)
        rates.measure()
    for result in results.values():
        if "samples" in result:
            result["seconds"] = statistics.median(result["samples"])
            result["best_seconds"] = min(result["samples"])
    return {
        "shape": list(shape),
        "rank": rank,
        "methods": {m: results[m] for m in methods if m in results},
        **rates.medians(),
        "load_average": os.getloadavg()[0],
        "floor_seconds": rates.floor_of(shape, rank),
    }


class Rates:
    """What a machine does in matrix products and copies, measured now and then.

    Args:
        device: where.
        passes: a float32 product is so many of the unit's.
    """

    def __init__(self, device: torch.device, passes: int = 1) -> None:
        self.device, self.passes = device, passes
        self.left, self.right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device) for _ in range(2))
        self.source = torch.ones(COPY_SIZE, device=device)
        self.product, self.target = torch.empty_like(self.left), torch.empty_like(self.source)
        self.flops: list[float] = []
        self.bytes: list[float] = []
        self.measure()
        self.flops, self.bytes = [], []  # that was to warm up

    def measure(self) -> None:
        with products_in("tf32" if self.passes == 3 else "ieee"):
            times = [self.passes * seconds(lambda: torch.mm(self.left, self.right, out=self.product), self.device)]
        if self.device.type == "cpu":  # on some CPUs oneDNN has twice the rate of what torch.mm calls
            left, right = self.left.to_mkldnn(), self.right.to_mkldnn()
            times.append(seconds(lambda: nn.functional.linear(left, right), self.device))
        self.flops.append(2 * PRODUCT_SIZE**3 / min(times))
        self.bytes.append(2 * self.source.nbytes / seconds(lambda: self.target.copy_(self.source), self.device))

    def medians(self) -> dict[str, float]:
        return {"product_flops": statistics.median(self.flops), "copy_bytes": statistics.median(self.bytes)}

    def floor_of(self, shape: tuple[int, int], rank: int) -> float:
        """Seconds of one step."""
        operations, moved = floor(shape, rank)
        rate = self.medians()
        return max(operations / rate["product_flops"], moved / rate["copy_bytes"])


def measure_training(rank: int, methods: list[str], device: torch.device, repeats: int) -> dict[str, Any]:
    """The optimizer's share of a training step of a Llama with SmolLM2-135M's shapes, on 4 x 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = peft.get_peft_model(LlamaForCausalLM(config), adapters).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    tokens = torch.randint(config.vocab_size, (4, 512), device=device)

    def forward_backward() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    left_out = (FULL, LORA_FA)  # these would train other parameters
    optimizers = {m: optimizer_of(m, model) for m in methods if m not in left_out}
    rates = Rates(device)
    samples: dict[str, list[float]] = {name: [] for name in ["forward and backward", *optimizers]}
    for repeat in range(-1, repeats):
        elapsed = []
        for _ in range(1 if repeat < 0 else 2):
            for parameter in parameters:
                parameter.grad = None
            elapsed.append(seconds(forward_backward, device))
        if repeat < 0:  # warm-up; B = 0 in the first step
            for parameter in parameters:
                nn.init.normal_(parameter, std=0.02)
        else:
            samples["forward and backward"].append(statistics.mean(elapsed))
        for name, optimizer in optimizers.items():
            pair = statistics.mean(seconds(optimizer.step, device) for _ in range(2))
            if repeat >= 0:
                samples[name].append(pair)
        rates.measure()
    return {
        "rank": rank,
        "tokens": tokens.numel(),
        "seconds": {name: statistics.median(each) for name, each in samples.items()},
        **rates.medians(),
        "floor_seconds": sum(count * rates.floor_of(shape, rank) for shape, count in LAYERS.items()),
    }


def show_time(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def write(data: dict[str, Any], folder: Path | None) -> None:
    """What has been measured so far: a long run that is stopped has its cells."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step_time.json").write_text(json.dumps(data, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer, two ranks, two repeats")
    parser.add_argument("--official", type=Path, help="a checkout of the authors' code, github.com/tnurbek/loft")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--square", action="store_true", help="only the square layer of each model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=40.0, help="seconds of samples that a method may take in a cell")
    parser.add_argument("--most-tflop", type=float, default=math.inf, help="leave LoFT out where a step needs more")
    parser.add_argument("--training-ranks", nargs="*", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--training-only", action="store_true", help="keep the cells that lie in the output folder")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder of step_time.json")
    arguments = parser.parse_args()
    if arguments.training_only and (arguments.quick or not arguments.output):
        parser.error("--training-only needs the folder of the cells, --output, and no --quick")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    methods = [m for m in METHODS if (m != OFFICIAL or arguments.official) and (m != CPU_ADAM or device.type == "cpu")]
    if arguments.official:
        sys.path.insert(0, str(arguments.official))
    models, ranks, repeats = arguments.models, arguments.ranks, arguments.repeats
    if arguments.quick:
        models, ranks, repeats, arguments.training_ranks = ["SmolLM2-135M"], [4, 16], 2, []
    data: dict[str, Any] = {
        "environment": {
            **provenance(device),
            "dtype": "float32",
            "official_commit": commit_of(arguments.official) if arguments.official else None,
        },
        "cuda": device.type == "cuda",
        "cells": [],
        "training": [],
    }
    if arguments.training_only:
        data, models = json.loads((arguments.output / "step_time.json").read_text()), []
        data["training"] = [run for run in data["training"] if run["rank"] not in arguments.training_ranks]
    for model in models:
        shapes = MODELS[model][:1] if arguments.quick or arguments.square else MODELS[model]
        for shape, rank in itertools.product(shapes, ranks):
            cell = measure_cell(shape, rank, methods, device, repeats, arguments.limit, arguments.most_tflop)
            data["cells"].append({"model": model, **cell})
            times = {m: show_time(r["seconds"]) if "seconds" in r else r["note"] for m, r in cell["methods"].items()}
            print(model, shape, f"r={rank}", times, "floor", show_time(cell["floor_seconds"]), flush=True)
            write(data, arguments.output)
            gc.collect()
            torch.cuda.empty_cache()
    for rank in arguments.training_ranks:
        data["training"].append({**measure_training(rank, methods, device, min(3, repeats)), **provenance(device)})
        print(data["training"][-1], flush=True)
        write(data, arguments.output)


if __name__ == "__main__":
    main()
