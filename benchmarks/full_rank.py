"""How far each way of computing LoFT is from AdamW where it must be AdamW: m = n = r.

    python benchmarks/full_rank.py [--official PATH]

Relative distance of W from torch.optim.AdamW's on the same gradients, for LoFT here, for the paper's own form with
inverse Gram matrices in float32, and with ``--official`` for a checkout of the authors' code.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pandas
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from loft_ds import LoFTAdamW
from provenance import RESULTS, provenance

BETAS = (0.9, 0.99)
LR = 1e-3
CONDITION = 30.0


class GramForm:
    """The paper's formulas as they stand, in the parameters' own dtype, with a relative damping of the inverse."""

    def __init__(self, model: PeftModel, damping: float) -> None:
        self.layer, self.damping, self.t = model.base_model.model[0], damping, 0
        n = self.layer.lora_A["default"].weight.shape[0]
        zeros = self.layer.lora_A["default"].weight.new_zeros
        self.state = {side: {"M": zeros(n, n), "P": zeros(n, n, n), "T": None} for side in "AB"}

    @torch.no_grad()
    def step(self) -> None:
        """Section 3 of the paper."""
        self.t += 1
        s, (b1, b2) = self.layer.scaling["default"], BETAS
        a, b = self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        # The gradients as they were taken: both factors before either moves.
        rows = {"A": (a.T, a.grad.T, s * b.clone()), "B": (b, b.grad, s * a.T.clone())}
        for side, (x, grad, basis) in rows.items():
            state = self.state[side]
            gram = basis.T @ basis
            inverse = torch.linalg.inv(gram + self.damping * gram.diagonal().mean() * torch.eye(len(gram)).to(gram))
            g = grad @ inverse
            if state["T"] is not None:
                turn = state["T"].T @ basis @ inverse
                state["M"], state["P"] = state["M"] @ turn, turn.T @ state["P"] @ turn
            state["T"] = basis
            state["M"] = b1 * state["M"] + (1 - b1) * g
            state["P"] = b2 * state["P"] + (1 - b2) * g[:, :, None] * g[:, None, :]
            if (side == "B") == (self.t % 2 == 1):
                second = torch.einsum("jr,krs,js->kj", basis, state["P"], basis).clamp_min(0)
                first = state["M"] @ basis.T / (1 - b1**self.t)
                x -= LR * (first / ((second / (1 - b2**self.t)).sqrt() + 1e-8)) @ basis @ inverse


def problem(n: int, dtype: torch.dtype, seed: int) -> tuple[PeftModel, nn.Parameter]:
    """A square layer with full-rank factors, and the same W as one parameter."""
    torch.manual_seed(seed)
    model = get_peft_model(
        nn.Sequential(nn.Linear(n, n, bias=False)), LoraConfig(r=n, lora_alpha=n, target_modules=["0"])
    ).to(dtype)
    layer = model.base_model.model[0]
    for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        left, _, right = torch.linalg.svd(torch.randn(n, n, dtype=torch.float64))
        spectrum = torch.logspace(0, -math.log10(CONDITION), n, dtype=torch.float64)
        factor.data.copy_(left @ torch.diag(spectrum) @ right)
    nn.init.zeros_(layer.base_layer.weight)
    return model, nn.Parameter(merged(model).to(dtype))


def merged(model: PeftModel) -> Tensor:
    """W (n, n) in float64."""
    layer = model.base_model.model[0]
    product = layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double()
    return layer.scaling["default"] * product


def distance(build: Callable[[PeftModel], Any], n: int, dtype: torch.dtype, steps: int, seed: int) -> float:
    """Relative distance of W from AdamW's after some steps."""
    model, weight = problem(n, dtype, seed)
    optimizer, adamw = build(model), torch.optim.AdamW([weight], lr=LR, betas=BETAS, weight_decay=0.0)
    target = torch.randn(n, n, dtype=dtype)
    for _ in range(steps):
        x = torch.randn(n, n, dtype=dtype)
        model.zero_grad()
        adamw.zero_grad()
        (model(x) - x @ target.T).square().mean().backward()
        (x @ weight.T - x @ target.T).square().mean().backward()
        optimizer.step()
        adamw.step()
    away = float((merged(model) - weight.detach()).norm() / weight.detach().norm())
    return math.inf if math.isnan(away) else away


def official(path: str) -> Callable[[PeftModel], Any]:
    """The authors' optimizer, from a checkout of their repository."""
    sys.path.insert(0, path)
    from loft_optim.optimizer import LoFTAdamW as Official  # type: ignore[import-not-found]

    def build(model: PeftModel) -> Any:
        torch.set_default_dtype(torch.float64)  # it allocates its second moments in torch's default
        params = [p for p in model.parameters() if p.requires_grad]
        # alpha = r, so that PEFT's scaling, which that code leaves out, is 1; eps as everywhere here.
        return Official(params, lr=LR, betas=BETAS, eps=1e-8, weight_decay=0.0, model=model)

    return build


def main() -> None:
    """Measure all and write ``results/full_rank.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", metavar="PATH", help="a checkout of the authors' code")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods: dict[str, tuple[Callable[[PeftModel], Any], torch.dtype]] = {
        "LoFT here, float64": (lambda m: LoFTAdamW(m, lr=LR, betas=BETAS), torch.float64),
        "LoFT here, float32": (lambda m: LoFTAdamW(m, lr=LR, betas=BETAS), torch.float32),
        "inverse Gram matrix, float64, no damping": (lambda m: GramForm(m, 0.0), torch.float64),
        "inverse Gram matrix, float32, damping 1e-6": (lambda m: GramForm(m, 1e-6), torch.float32),
        "inverse Gram matrix, float32, no damping": (lambda m: GramForm(m, 0.0), torch.float32),
    }
    if args.official:
        methods["authors' code, float64"] = (official(args.official), torch.float64)
    rows: list[dict[str, Any]] = []
    for name, (build, dtype) in methods.items():
        for n, steps in ((8, 40), (8, 200), (16, 200), (32, 200)):
            measured = sorted(distance(build, n, dtype, steps, seed) for seed in range(args.seeds))
            rows.append({"method": name, "n": n, "steps": steps, "median": measured[len(measured) // 2]})
            print(rows[-1], flush=True)
    facts = {
        **provenance(torch.device("cpu")),
        "seeds": args.seeds,
        "settings": {"betas": BETAS, "lr": LR, "condition of each factor": CONDITION},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "full_rank.json").write_text(
        json.dumps(
            {**facts, "rows": [{**r, "median": r["median"] if math.isfinite(r["median"]) else None} for r in rows]},
            indent=1,
        )
        + "\n"
    )
    frame = pandas.DataFrame(rows)
    frame["case"] = [f"n = {n}, {steps} steps" for n, steps in zip(frame["n"], frame["steps"], strict=True)]
    table = frame.pivot(index="method", columns="case", values="median").loc[list(methods), frame["case"].unique()]
    text = [
        "# Distance from AdamW in the full-rank limit",
        "",
        "Relative distance of W from torch.optim.AdamW's on the same gradients (median over seeds); 0 is right.",
        "",
        table.map(lambda value: "diverged" if value > 1e3 else f"{value:.1e}").to_markdown(disable_numparse=True),
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    (RESULTS / "full_rank.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
