"""What a second moment kept in bfloat16 does to the trajectory, next to what it saves.

    python benchmarks/second_moment_storage.py

One layer W (96, 64) = B @ A learns a random matrix from noisy mini-batches whose features have a condition number of
30. The same data drive LoFT in float64, in float32, in float32 with a bfloat16 second moment, and with one rounded to
the nearest. Printed: how far W ends from the float64 run's, relative to how far that one went, and the mean loss of
the last 50 steps. Medians over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from unittest import mock

import peft
import torch
from torch import Tensor, nn

from loft_ds import LoFTAdamW
from loft_ds.kernels import storage

OUT, IN, BATCH = 96, 64, 32
KINDS = ["float64", "float32", "bfloat16", "bfloat16, nearest"]


def train(kind: str, rank: int, beta2: float, steps: int, seed: int) -> tuple[Tensor, float]:
    """The product of the factors (96, 64) after training, and the loss at the end."""
    torch.manual_seed(seed)
    dtype = torch.float64 if kind == "float64" else torch.float32
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(IN, OUT, bias=False)), config).to(dtype)
    layer = model.base_model.model[0]
    stored = torch.bfloat16 if kind.startswith("bfloat16") else None
    optimizer = LoFTAdamW(model, lr=2e-3, betas=(0.9, beta2), second_moment_dtype=stored)
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


def to_nearest(values: Tensor, seed: int) -> Tensor:
    return values.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    print("| beta2 | rank | second moment | bytes a feature row | distance from float64 | loss |")
    print("| ---: | ---: | --- | ---: | ---: | ---: |")
    for beta2, rank in itertools.product((0.99, 0.999), (4, 16)):
        references: list[Tensor] = []
        for kind in KINDS:
            distances, losses = [], []
            rounding = to_nearest if kind.endswith("nearest") else storage.round_stochastically
            with mock.patch.object(storage, "round_stochastically", rounding):
                for seed in range(arguments.seeds):
                    product, loss = train(kind, rank, beta2, arguments.steps, seed)
                    if kind == "float64":
                        references.append(product)
                    distances.append(float((product - references[seed]).norm() / references[seed].norm()))
                    losses.append(loss)
            size = rank * (rank + 1) // 2 * {"float64": 8, "float32": 4}.get(kind, 2)
            distance, loss = statistics.median(distances), statistics.median(losses)
            print(f"| {beta2} | {rank} | {kind} | {size} | {distance:.1e} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
