"""A run that goes on on other ranks at another ZeRO stage, beside the same run unbroken.

    python benchmarks/resume.py      # two minutes; writes results/resume.json

A small Llama learns the bytes of this repository's license with LoFT. After each part it saves by ``save_checkpoint``,
and new processes, as many as the next part has ranks, go on from there by ``load_checkpoint``. Every step has the same
sequences, however many ranks share them. What is recorded is the mean loss of every step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from scaling import TINY, Setup, build_model, settings
from torch import Tensor, multiprocessing

from loft_ds import LoFTAdamW, load_checkpoint, save_checkpoint
from provenance import RESULTS, ROOT, provenance

BATCH, LENGTH, RANK, LR = 6, 64, 8, 3e-3
# Weights as large as those of a trained model of this width: its frozen head would else hardly tell bytes apart.
MODEL = {**TINY, "initializer_range": 0.2}


@dataclass(frozen=True)
class Part:
    """Steps of a run on so many ranks at one stage of ZeRO."""

    ranks: int
    stage: int
    steps: int


BROKEN = (Part(2, 2, 20), Part(3, 3, 20), Part(1, 1, 20))
UNBROKEN = (Part(2, 2, 60),)


def batch(step: int) -> Tensor:
    """The bytes (BATCH, LENGTH) that all ranks together see in a step."""
    text = torch.frombuffer(bytearray((ROOT / "LICENSE").read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    return text[starts[:, None] + torch.arange(LENGTH)]


def train(part: Part, first: int, checkpoints: Path) -> list[float]:
    """The losses of a part, from where the last one has saved; on each of its ranks."""
    setup = Setup(part.stage, BATCH // part.ranks, RANK, "fp32", MODEL, LENGTH)
    model = build_model(setup, torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=model, optimizer=LoFTAdamW(model, lr=LR), config=settings(setup))
    if first:
        load_checkpoint(engine, checkpoints)
    losses = []
    for step in range(first, first + part.steps):
        own = batch(step).chunk(part.ranks)[dist.get_rank()]
        loss = engine(input_ids=own, labels=own).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double() / part.ranks
        dist.all_reduce(mean)
        losses.append(float(mean))
    save_checkpoint(engine, checkpoints)
    engine.destroy()
    return losses


def _serve(rank: int, part: Part, first: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(part.ranks), LOCAL_SIZE=str(part.ranks))
    store = (folder / f"store-{first}").as_uri()
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, verbose=False, init_method=store, rank=rank, world_size=part.ranks
    )
    losses = train(part, first, folder / "checkpoints")
    if rank == 0:
        (folder / f"losses-{first}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def run(parts: tuple[Part, ...]) -> list[float]:
    """The losses of all parts, each in processes of its own."""
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in parts:
            first = len(losses)
            multiprocessing.set_forkserver_preload([__name__])
            multiprocessing.start_processes(_serve, (part, first, folder), part.ranks, start_method="forkserver")
            losses += json.loads((folder / f"losses-{first}.json").read_text())
    return losses


def main() -> None:
    """Run both and write ``results/resume.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    runs = [
        {"name": name, "parts": [asdict(part) for part in parts], "losses": run(parts)}
        for name, parts in (("unbroken", UNBROKEN), ("broken", BROKEN))
    ]
    apart = [abs(a - b) for a, b in zip(*(entry["losses"] for entry in runs), strict=True)]
    print(f"largest difference of a step's loss: {max(apart):.1e}; the last: {apart[-1]:.1e}")
    facts = {**provenance(torch.device("cpu")), "settings": {"r": RANK, "learning rate": LR, "model": MODEL}}
    (options.output / "resume.json").write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
