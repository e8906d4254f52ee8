"""CPU time of a default step of SmolLM2-135M's pairs, of this checkout and another one in turn. Prints only.

python benchmarks/step_against.py ../other-checkout --ranks 1 16
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
from torch import nn

from loft_ds import LoFTAdamW
from provenance import ROOT

# The linear layers (out, in) and how often each is in the model: step_time's, which no older checkout could import.
LAYERS = {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}


def step_seconds(rank: int, repeats: int) -> float:
    """The median of pairs of steps on one thread: alternating ones differ."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = [shape for shape, count in LAYERS.items() for _ in range(count)]
    with torch.device("meta"):  # the frozen matrices take address space, never memory
        layers = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes))
    targets = [str(i) for i in range(len(shapes))]
    model = peft.get_peft_model(layers.to_empty(device="cpu"), peft.LoraConfig(r=rank, target_modules=targets))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        nn.init.normal_(p, std=0.02)  # PEFT's B = 0 would spare LoFT most of its work
    optimizer = LoFTAdamW(model, lr=1e-4)
    taken = []
    for _ in range(2 * repeats + 2):
        for p in trained:
            p.grad = torch.randn_like(p) * 1e-3
        start = time.thread_time()
        optimizer.step()
        taken.append(time.thread_time() - start)
    return statistics.median((one + two) / 2 for one, two in zip(taken[2::2], taken[3::2], strict=True))


def main() -> None:
    """Measure in processes of their own, each with one checkout on its path; or, with none to compare, here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    for rank in options.ranks:
        if options.other is None:
            print(step_seconds(rank, options.repeats))
            continue
        command = [sys.executable, __file__, "--ranks", str(rank), "--repeats", str(options.repeats)]
        seconds: dict[Path, list[float]] = {options.other.resolve(): [], ROOT: []}
        for checkout in list(seconds) * options.turns:
            out = subprocess.check_output(command, env={**os.environ, "PYTHONPATH": str(checkout)}, text=True)
            seconds[checkout].append(float(out.splitlines()[-1]))
        other, here = (1e3 * statistics.mean(each) for each in seconds.values())
        print(f"r = {rank}: {other:.0f} ms there, {here:.0f} ms here, {other / here:.1f} times", flush=True)


if __name__ == "__main__":
    main()
