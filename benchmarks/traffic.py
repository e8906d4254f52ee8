"""Bytes a rank sends in an optimizer step, and the state it holds, for any world size: from the plans alone.

    python benchmarks/traffic.py

Builds the exchange plans of a real model's adapters without processes (``loft_ds.plan``), and adds up what crosses
between ranks in one step (the mean of a step of B and one of A), beside the least that the sharding by rows needs, and
the largest share of the state beside the mean.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import pandas

from loft_ds.plan import Division, Shapes, shapes_of, traffic
from provenance import RESULTS, provenance

MODELS = ("SmolLM2-135M", "Llama-3-8B", "Llama-3-405B")


def measure(shapes: Shapes, adapter_rank: int, stage: int, world: int) -> dict[str, Any]:
    """The worst rank's bytes received in a step, the least it would have to receive, and how even the state is."""
    start = time.perf_counter()
    division = Division(shapes.factors(adapter_rank), stage, world)
    seconds = time.perf_counter() - start
    # The ranks in the middle and at the ends see every kind of boundary; all of thousands would take minutes.
    ranks = sorted({0, 1, world // 3, world // 2, world - 2, world - 1} & set(range(world)))
    start = time.perf_counter()
    found = [traffic(division, rank) for rank in ranks]
    seconds += (time.perf_counter() - start) / len(ranks)
    worst = max(found, key=lambda t: t.total)
    elements = division.elements.double()
    return {
        "stage": "1, 2" if stage < 3 else "3",
        "ranks": world,
        "received MB": worst.total / 1e6,
        "least MB": worst.least / 1e6,
        "partners MB": worst.partners / 1e6,
        "Grams MB": worst.products / 1e6,
        "received / least": max(t.total / t.least if t.least else 1.0 for t in found),
        "collectives": worst.collectives,
        "largest / mean state": float(elements.max() / elements.mean()),
        "bases MB": float(division.bases.max()) / 1e6,
        "planning s": seconds,
    }


def main() -> None:
    """Measure all and write ``results/traffic.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 8, 64, 512, 4096])
    args = parser.parse_args()
    rows = []
    for name in MODELS:
        shapes = shapes_of(name)
        for rank in (16, 64):
            for stage in (2, 3):
                for world in args.worlds:
                    rows.append({"model": name, "r": rank, **measure(shapes, rank, stage, world)})
                    print(rows[-1], flush=True)
    facts = {
        **provenance(),
        "device": "none: counted from the plans, not timed",
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "traffic.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    text = [
        "# Bytes between ranks, and state a rank",
        "",
        "Of LoFT's step alone, the worst of the ranks looked at, float32; the mean of a step of B and one of A.",
        "`least` is gradients in, parameters out and the rows of T, each only where it is not there already.",
        "`planning` is the time of one process to build one rank's plans, on cores that others share.",
        "",
        pandas.DataFrame(rows).to_markdown(index=False, floatfmt=".3g"),
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    (RESULTS / "traffic.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
