"""Bytes a rank sends in an optimizer step, and the state it holds, for any world size: from the plans alone.

    python benchmarks/traffic.py

Builds the exchange plans of every rank of a real model's adapters on the meta device, without processes, and adds
them up: what crosses between ranks in one step (the mean of a step of B and one of A), beside the least that the
sharding by rows needs, and the largest share of the state beside the mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import pandas
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loft_ds.factors import Factor, find_trainable
from loft_ds.sharding.exchange import Partition, plan_gather, plan_rows
from provenance import RESULTS, provenance

MODELS = {
    "SmolLM2-135M": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ),
    "Llama-3-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    ),
}
FLOAT = 4


def factors_of(config: LlamaConfig, rank: int) -> list[Factor]:
    """The factors of adapters on all linear layers, without any weights."""
    with init_empty_weights():
        lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM(config), lora)
    return find_trainable(model).factors


def partitions(factors: Sequence[Factor], stage: int, world: int) -> list[Partition]:
    """How DeepSpeed spreads them: each in equal parts at stage 3, all as one flat tensor at stages 1 and 2."""
    if stage == 3:
        parts = torch.arange(world + 1)
        return [Partition(f, (parts * -(-f.numel // world)).clamp(max=f.numel)) for f in factors]
    size = -(-sum(f.numel for f in factors) // (2 * world)) * 2
    out, start = [], 0
    for factor in factors:
        out.append(Partition(factor, (torch.arange(world + 1) * size - start).clamp(0, factor.numel)))
        start += factor.numel
    return out


def measure(factors: Sequence[Factor], stage: int, world: int) -> dict[str, Any]:
    """The worst rank's bytes received in a step, the least it would have to receive, and how even the state is."""
    parts = {p.factor: p for p in partitions(factors, stage, world)}
    state = torch.zeros(world)
    for part in parts.values():
        rank = part.factor.rank
        state += part.rows * (rank * (rank + 1) // 2 + 2 * rank)  # second moment, momentum, pending or previous
    received, least = [], []
    split = [p for p in parts.values() if p.is_split]
    # The ranks in the middle and at the ends see every kind of boundary; all of thousands would take minutes.
    for rank in sorted({0, 1, world // 2, world - 2, world - 1} & set(range(world))):
        came = sum(n for q, n in enumerate(plan_rows(split, rank).recv_counts) if q != rank) if split else 0
        back = 0
        gathered = 0
        for side in "AB":
            moving = [p for p in parts.values() if p.factor.side == side]
            partners = [parts[p.factor.partner] for p in moving]
            moved = [p for p in split if p.factor.side == side]
            back += sum(n for q, n in enumerate(plan_rows(moved, rank).send_counts) if q != rank) if moved else 0
            plan = plan_gather(moving, partners, rank)
            if plan is not None:
                gathered += factors[0].rank * sum(n for q, n in enumerate(plan.recv_counts) if q != rank)
        # float64 Gram and cross Gram of the pairs about to move that no rank has alone, in a ring all-reduce.
        spread = sum(not bool((p.holds_whole & parts[p.factor.partner].holds_whole).any()) for p in moving)
        grams = 2 * FLOAT * 2 * factors[0].rank ** 2 * spread * 2 * (world - 1) / world
        received.append(FLOAT * (2 * came + back / 2 + gathered / 2) + grams)
        least.append(FLOAT * (came + back / 2 + gathered / 2))
    worst = max(range(len(received)), key=received.__getitem__)
    return {
        "stage": "1, 2" if stage < 3 else "3",
        "ranks": world,
        "received MB": received[worst] / 1e6,
        "least MB": least[worst] / 1e6,
        "Grams MB": grams / 1e6,
        "received / least": received[worst] / least[worst] if least[worst] else 1.0,
        "state a rank MB": FLOAT * float(state.max()) / 1e6,
        "largest / mean state": float(state.max() / state.mean()),
    }


def main() -> None:
    """Measure all and write ``results/traffic.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 8, 64, 512])
    args = parser.parse_args()
    rows = []
    for name, config in MODELS.items():
        for rank in (16, 64):
            factors = factors_of(config, rank)
            for stage in (2, 3):
                for world in args.worlds:
                    rows.append({"model": name, "r": rank, **measure(factors, stage, world)})
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
        "",
        pandas.DataFrame(rows).to_markdown(index=False, floatfmt=".3g"),
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    (RESULTS / "traffic.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
