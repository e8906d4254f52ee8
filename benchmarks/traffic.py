"""Bytes that ranks exchange in an optimizer step, and the state they hold, for any world size: from the plans alone.

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
import torch

from loft_ds.plan import Division, Shapes, received, shapes_of, traffic
from loft_ds.plan.traffic import products
from provenance import RESULTS, provenance

MODELS = ("SmolLM2-135M", "Llama-3-8B", "Llama-3-405B")


def measure(shapes: Shapes, adapter_rank: int, stage: int, world: int) -> dict[str, Any]:
    """What the worst rank of all receives in a step, what it would have to receive, and how even the state is."""
    start = time.perf_counter()
    division = Division(shapes.factors(adapter_rank), stage, world)
    kinds = received(division)
    total = torch.stack(list(kinds.values())).sum(0)
    worst = int(total.argmax())
    found = traffic(division, worst)
    least = total - kinds["products"] + products(division, needed=True)
    elements = division.elements.double()
    return {
        "stage": "1, 2" if stage < 3 else "3",
        "ranks": world,
        "worst rank": worst,
        "received MB": found.total / 1e6,
        "rows MB": found.least / 1e6,
        "partners MB": found.partners / 1e6,
        "products MB": found.products / 1e6,
        "received / rows": found.total / found.least if found.least else 1.0,
        "received / (rows + sums)": found.total / (found.least + found.needed) if found.total else 1.0,
        "of any rank": float(torch.where(least > 0, total / least, 1.0).max()),
        "collectives": found.collectives,
        "largest / mean state": float(elements.max() / elements.mean()),
        "bases MB": float(division.bases.max()) / 1e6,
        "planning s": time.perf_counter() - start,
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
        "Of LoFT's step alone, the rank of all that receives most; the mean of a step of B and one of A.",
        "At r = 16 both factors of a pair move on every step, at r = 64 one of them.",
        "`rows`: gradients in, parameters out and the rows of T in float32, each only where it is not there already.",
        "`sums`: the Gram matrices (triangles) and products (r, r) that `loft_ds/step.py` asks for, of all rows of",
        "each pair that is spread over ranks, in float64, once on every rank that takes part. A sum over n ranks in",
        "two exchanges brings 2 (n - 1) / n times itself. The ratio to rows and sums is that of the same rank,",
        "and then the largest of any rank. `bases`: all (r, r) matrices of the state.",
        "`planning`: one process divides the rows, adds up what every rank receives and builds one rank's plans, on",
        "cores that others share.",
        "",
        pandas.DataFrame(rows).to_markdown(index=False, floatfmt=".3g"),
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    (RESULTS / "traffic.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
