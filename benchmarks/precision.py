"""What less precision does to quotients, trajectory, loss and time: of stored second moments, and of the denominators.

    python benchmarks/precision.py      # some minutes; writes results/precision.json

One layer W (96, 64) = B @ A learns a random matrix from noisy mini-batches whose features have a condition number of
30. The same data drive LoFT in float64 and in each of ``KINDS``. Recorded are medians over seeds: how far W ends from
the float64 run's, relative to how far that one went, and the mean loss of the last 50 steps; and how far ``U Q`` of a
step is from float64's of the same state, where nothing spares the first steps; and how far W is from AdamW's in the
full-rank limit. All round the operands of the denominators' product in plain torch, so they are the same on any
hardware. Times are of what this machine has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import full_rank as full_rank_limit
import peft
import torch
from torch import Tensor, nn

from loft_ds import LoFTAdamW, kernels
from loft_ds.kernels import Precision, Quotient, compiled, reference, tiled
from provenance import RESULTS, provenance

OUT, IN, BATCH, LR = 96, 64, 32, 2e-3
KINDS: dict[str, dict[str, Any]] = {
    "float64": {},
    "float32": {},
    "second moments in bfloat16": {"second_moment_dtype": torch.bfloat16},
    "TF32 denominators": {"denominator_precision": "tf32"},
    "bfloat16 denominators": {"denominator_precision": "bf16"},
}
SETTINGS = list(itertools.product((0.99, 0.999), (4, 16)))  # beta2, r
SHOWN_STEPS = (2, 3, 4, 5, 10, 40)  # of the first one B is zero
TIMED, TIMED_SHAPE = (4, 16, 64), (1536, 576)  # r; rows of the factor, rows of its partner
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def rounded(values: Tensor, precision: Precision) -> Tensor:
    """What the units of tensor cores take of float32."""
    if precision == "bf16":
        return values.bfloat16().to(values.dtype)
    if precision == "tf32":  # 10 bits of the mantissa's 23, to the nearest
        return ((values.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)
    return values


PROJECT, PRODUCTS = tiled.projected_update, tiled.khatri_rao


def project(momentum: Tensor, packed: Sequence[Tensor], basis: Tensor, quotient: Quotient) -> Tensor:
    """``tiled.projected_update`` with rounded operands of the denominators, on any hardware."""
    precision = quotient.precision
    with mock.patch.object(tiled, "khatri_rao", lambda basis: rounded(PRODUCTS(basis), precision)):
        operands = [each if precision == "ieee" else rounded(each, precision) for each in packed]
        return PROJECT(momentum, operands, basis, replace(quotient, precision="ieee"))


@contextmanager
def plain_torch(update: Callable[..., Tensor]) -> Iterator[None]:
    """Steps that do without compiled kernels."""
    with (
        mock.patch.object(compiled, "library", return_value=None),
        mock.patch.object(tiled, "projected_update", update),
    ):
        yield


def train(kind: str, rank: int, beta2: float, steps: int, seed: int) -> tuple[Tensor, float]:
    """The product of the factors (96, 64) after training, and the loss at the end."""
    torch.manual_seed(seed)
    dtype = torch.float64 if kind == "float64" else torch.float32
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(IN, OUT, bias=False)), config).to(dtype)
    layer = model.base_model.model[0]
    optimizer = LoFTAdamW(model, lr=LR, betas=(0.9, beta2), **KINDS[kind])
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    target, spectrum = normal(IN, OUT) / 8, torch.logspace(0, -1.5, IN, dtype=torch.float64)
    losses = []
    for _ in range(steps):
        x = normal(BATCH, IN) * spectrum
        y = x @ target + 0.05 * normal(BATCH, OUT)
        loss = (model(x.to(dtype)) - y.to(dtype)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    return product.detach(), statistics.mean(losses[-50:])


def trajectories(steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Where each kind ends."""
    for beta2, rank in SETTINGS:
        references: list[Tensor] = []
        for kind in KINDS:
            distances, losses = [], []
            for seed in range(seeds):
                product, loss = train(kind, rank, beta2, steps, seed)
                if kind == "float64":
                    references.append(product)
                distances.append(float((product - references[seed]).norm() / references[seed].norm()))
                losses.append(loss)
            row = {"distance": statistics.median(distances), "loss": statistics.median(losses)}
            yield {"beta2": beta2, "r": rank, "kind": kind, **row}
            print(row, flush=True)


def first_quotients(seeds: int) -> Iterator[dict[str, Any]]:
    """How far each precision is from float64 in one step, of a float32 run's state."""
    for rank in (4, 16):
        errors: dict[tuple[str, int], list[float]] = defaultdict(list)
        calls = 0

        def look(momentum: Tensor, packed: Sequence[Tensor], basis: Tensor, quotient: Quotient) -> Tensor:
            nonlocal calls
            step, calls = calls // 2 + 1, calls + 1  # both factors move in each
            for i in range(len(momentum)) if step in SHOWN_STEPS else ():
                exact = replace(quotient, correction2=quotient.correction2[i].double())
                right = reference.projected_update(momentum[i].double(), packed[i].double(), basis[i].double(), exact)
                for precision in PRECISIONS:
                    found = project(momentum, packed, basis, replace(quotient, precision=precision))[i]
                    errors[precision, step].append(float((found - right).norm() / right.norm()))  # noqa: B023
            return PROJECT(momentum, packed, basis, quotient)

        with plain_torch(look):
            for seed in range(seeds):
                calls = 0
                train("float32", rank, 0.999, max(SHOWN_STEPS), seed)
        for precision in PRECISIONS:
            medians = {step: statistics.median(errors[precision, step]) for step in SHOWN_STEPS}
            yield {"r": rank, "precision": precision, "errors": medians}


def full_rank(seeds: int) -> Iterator[dict[str, Any]]:
    """The distance from AdamW where m = n = r."""
    for precision in PRECISIONS:

        def build(model: peft.PeftModel, precision: Precision = precision) -> LoFTAdamW:
            return LoFTAdamW(model, lr=full_rank_limit.LR, betas=full_rank_limit.BETAS, denominator_precision=precision)

        with plain_torch(project):
            found = [full_rank_limit.distance(build, 32, torch.float32, 200, seed) for seed in range(seeds)]
        yield {"n": 32, "steps": 200, "precision": precision, "distance": statistics.median(found)}


def times(repeats: int) -> Iterator[dict[str, Any]]:
    """Seconds of ``projected_update`` by what this machine has, in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has = PRECISIONS if device.type == "cuda" else ("ieee", "bf16") if "BF16" in compiled.capability() else ("ieee",)
    for rank in TIMED:
        generator = torch.Generator().manual_seed(rank)
        (k, n), p = TIMED_SHAPE, rank * (rank + 1) // 2
        momentum, basis = (torch.randn(1, size, rank, generator=generator).to(device) for size in (k, n))
        packed = [torch.rand(k, p, generator=generator).to(device)]
        taken: dict[str, list[float]] = defaultdict(list)
        for _, precision in itertools.product(range(repeats), has):
            quotient = Quotient(1.0, torch.ones(1, n, device=device), 1e-8, math.inf, precision)
            start = time.perf_counter()
            kernels.projected_update(momentum, packed, basis, quotient)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[precision].append(time.perf_counter() - start)
        yield {"r": rank, "seconds": {precision: statistics.median(each) for precision, each in taken.items()}}


def main() -> None:
    """Measure all, and write ``results/precision.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with plain_torch(project):
        found = {"trajectories": list(trajectories(options.steps, options.seeds))}
    found |= {"quotients": list(first_quotients(options.seeds)), "full_rank": list(full_rank(options.seeds))}
    found |= {"times": list(times(20))}
    settings = {"steps": options.steps, "seeds": options.seeds, "learning rate": LR, "W": [OUT, IN]}
    facts = {**provenance(), "settings": {**settings, "timed shape": TIMED_SHAPE}}
    (options.output / "precision.json").write_text(json.dumps({**facts, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
