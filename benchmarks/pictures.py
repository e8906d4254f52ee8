"""The project's pictures, each made of data that are stored or of what the code itself says.

    python benchmarks/pictures.py                # all of them, as docs/pictures/NAME.png
    python benchmarks/pictures.py hero resume    # some
    python benchmarks/pictures.py full_rank --official PATH   # its steps anew, with a checkout of the authors' code

A picture is two functions in ``PICTURES``: one gets the data, the other draws them and nothing else.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import full_rank
import matplotlib as mpl
import pandas
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from pages import FAULTS, facts_of, faulty_of, state_of, stored
from torch import Tensor

from loft_ds import LoFTAdamW, algebra
from loft_ds.plan import Division, Job, memory, shapes_of
from loft_ds.plan.memory import STATE
from loft_ds.plan.shapes import derive
from loft_ds.plan.traffic import received
from loft_ds.reference import Reference
from loft_ds.sharding.exchange import Cut
from loft_ds.step import Phase
from provenance import RESULTS, ROOT, provenance
from studies.page import (
    BOUND,
    FULL,
    LOFT,
    LORA,
    MEASURES,
    OLD,
    chosen_of,
    interval,
    rank_name,
    read_study,
    score_of,
)

FOLDER = ROOT / "docs" / "pictures"
# Okabe and Ito's colours, which colour-blind readers tell apart too.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#6b6b6b"
COLOURS = {LOFT: BLUE, LORA: RED}
STYLE = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelsize": 13,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13.5,
    "axes.titlepad": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,  # 12 inches are 1200 pixels
    "font.size": 12.5,
    "grid.color": "#dddddd",
    "legend.fontsize": 12.5,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "xtick.labelsize": 12.5,
    "ytick.labelsize": 12.5,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A function that draws, in the style that all pictures have."""

    @functools.wraps(draw)
    def wrapped(data: Any) -> Figure:
        with mpl.rc_context(STYLE):
            figure = draw(data)
            figure.draw_without_rendering()  # ticks are made as they are needed, and take the style of then
            return figure

    return wrapped


class End(NamedTuple):
    """A label beside a line's end."""

    y: float
    text: str
    colour: str


def label_ends(axes: Any, ends: Iterable[End]) -> None:
    """Write labels right of the axes, each as near to its line's height as the others leave room."""
    axes.figure.draw_without_rendering()  # so that the limits and the height are what they will be
    line = 1.25 * mpl.rcParams["font.size"] * axes.figure.dpi / 72 / axes.get_window_extent().height
    ends = sorted(ends)
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((1, end.y)))[1] for end in ends]
    sizes = [line * (1 + end.text.count("\n")) for end in ends]
    for _ in range(100):  # neighbours that overlap give way, both alike
        for low in range(len(ends) - 1):
            overlap = heights[low] + (sizes[low] + sizes[low + 1]) / 2 - heights[low + 1]
            if overlap > 0:
                heights[low] -= overlap / 2
                heights[low + 1] += overlap / 2
    for end, height in zip(ends, heights, strict=True):
        axes.annotate(end.text, (1.02, height), xycoords="axes fraction", color=end.colour, va="center")


def spread(axes: Any, values: Sequence[float], form: str = "{:g}") -> None:
    """A logarithmic axis of x with a tick at each value, written out."""
    axes.set_xscale("log")
    axes.set_xticks(values, [form.format(value).replace("e-0", "e-") for value in values])
    axes.set_xticks([], minor=True)


def plain(axes: Any) -> None:
    """A logarithmic axis of y over few powers of ten, its numbers written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


# --- hero: what LoFT is for


def means(chosen: pandas.DataFrame, method: str, measure: str) -> pandas.DataFrame:
    """Mean and half of the 95% interval by rank; rank 0 is that of a method without adapters."""
    cells = chosen[chosen["method"] == method].groupby("rank")[measure]
    return pandas.DataFrame({"mean": cells.mean(), "half": cells.agg(lambda values: interval(values)[1])})


def load_hero() -> dict[str, Any]:
    """Test loss on R8 by rank; optimizer state of Llama-3-8B as planned, and of a small model as measured."""
    chosen = chosen_of(read_study(RESULTS / "quality" / "classification.jsonl"))
    shapes, worlds = shapes_of("Llama-3-8B"), [2**power for power in range(13)]
    trained = sum(factor.numel for factor in shapes.factors(16))

    def state(stage: int, world: int) -> float:
        kinds = memory(shapes, Job(rank=16, world=world, stage=stage))
        return float(torch.stack([kinds[kind] for kind in (*STATE, "bases", "kept rows")]).sum(0).max()) / 1e9

    def adamw(numbers: int) -> list[float]:  # two float32 numbers for each
        return [8 * numbers / world / 1e9 for world in worlds]

    small = [row for row in stored("scaling")["rows"] if row["scaling"] == "strong"]
    return {
        "loss": {method: means(chosen, method, "test_loss") for method in (LOFT, LORA, FULL)},
        "worlds": worlds,
        "planned": {
            "full fine-tuning": adamw(shapes.parameters),
            "LoFT, ZeRO 0": [state(0, world) for world in worlds],
            "LoFT, ZeRO 1 to 3": [state(3, world) for world in worlds],
            "LoRA": adamw(trained),
        },
        "small": {
            stage: [(row["ranks"], state_of(row), state_of(row["law"])) for row in small if row["stage"] == stage]
            for stage in (0, 3)
        },
        "release": facts_of("scaling")["release"],
    }


@styled
def draw_hero(data: dict[str, Any]) -> Figure:
    """Three panels: does it learn, what does it hold, is that so."""
    figure = Figure(figsize=(12, 4.6))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.35, 1.15, 0.8))
    loss, worlds, planned = data["loss"], data["worlds"], data["planned"]
    full = loss[FULL].loc[0]
    left.axhspan(full["mean"] - full["half"], full["mean"] + full["half"], color="#e6e6e6")
    left.axhline(full["mean"], color=BLACK, linestyle="--", label=FULL)
    for method, aside in ((LORA, 1.04), (LOFT, 1 / 1.04)):  # so that intervals do not lie on each other
        table = loss[method]
        x = [rank * aside for rank in table.index]
        left.errorbar(x, table["mean"], table["half"], fmt="o-", capsize=4, color=COLOURS[method], label=method)
    spread(left, list(loss[LOFT].index))
    left.set_xlabel("rank of the adapters")
    left.set_title("Test loss\nMiniLM on Reuters R8, 100 steps")
    ends = [End(loss[method]["mean"].iloc[-1], method, COLOURS[method]) for method in (LOFT, LORA)]
    label_ends(left, [*ends, End(full["mean"], "full fine-\ntuning", BLACK)])

    looks = {"full fine-tuning": (BLACK, "--"), "LoFT, ZeRO 0": (BLUE, ":"), "LoRA": (RED, "-")}
    ends = []
    for name, values in planned.items():
        colour, line = looks.get(name, (BLUE, "-"))
        middle.plot(worlds, values, line, color=colour, label=name)
        ends.append(End(values[-1], name.replace(", ", ",\n").replace("fine-", "fine-\n"), colour))
    spread(middle, [1, 8, 64, 512, 4096])
    middle.set(yscale="log", xlabel="GPUs", ylabel="GB a GPU")
    middle.set_title("Optimizer state, planned\nLlama-3-8B, r = 16")
    label_ends(middle, ends)

    for stage, rows in data["small"].items():
        ranks, measured, law = zip(*rows, strict=True)
        right.plot(ranks, law, ":" if stage == 0 else "-", color=BLUE, label=f"ZeRO {stage}, planned")
        right.plot(ranks, measured, "o", color=BLUE, label=f"ZeRO {stage}, measured")
    spread(right, [1, 2, 3, 4, 8])
    plain(right)
    right.set(xlabel="CPU ranks", ylabel="MB a rank")
    right.set_title(f"Measured (dots): small\nLlama, release {data['release']}")
    label_ends(right, [End(rows[-1][1], f"ZeRO {stage}", BLUE) for stage, rows in data["small"].items()])
    return figure


# --- spans: what a pair of factors can reach of a step


def load_spans(m: int = 12, n: int = 16, r: int = 3, steps: int = 40, shown: int = 10) -> dict[str, Any]:
    """Steps of AdamW and of LoFT on the same gradients of a linear problem, and what the pair can reach of AdamW's.

    A length is that of a step of ``W`` over ``lr sqrt(m n)``: 1 is a step of one learning rate in every number.
    """
    generator, lr, betas = torch.Generator().manual_seed(0), 3e-3, (0.9, 0.999)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    loft = Reference(normal(r, n) / n**0.5, torch.zeros(m, r), 1.0, lr=lr, betas=betas)
    weight = torch.zeros(m, n, dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([weight], lr=lr, betas=betas, weight_decay=0.0)
    target = normal(m, 4) @ normal(4, n)
    data: dict[str, Any] = {
        "rank": r,
        "step": shown,
        "lengths": {name: [] for name in ("AdamW", "reached", LOFT, "limit")},
    }

    def span(rows: Tensor) -> Tensor:
        return torch.linalg.svd(rows)[0]  # of all columns: the first r are the span's

    def length(step: Tensor) -> float:
        return float(step.norm()) / (m * n) ** 0.5

    for t in range(1, steps + 1):
        x = normal(n, 6)
        gradient = (loft.change - target) @ x @ x.T / 3
        rows = {side: X.clone() for side, X in loft.X.items()}
        before, adamw_before = loft.change, weight.detach().clone()
        weight.grad = gradient.clone()
        adamw.step()
        loft.step(rows["B"].T @ gradient, gradient @ rows["A"])
        moved = "BA"[(t + 1) % 2]
        rows[moved] = loft.X[moved]  # the following factor is turned to the leading one as it has moved
        left, right = span(rows["B"]), span(rows["A"])
        # In coordinates whose first r rows and columns are the spans, what is out of reach is a block.
        full, own = (left.T @ (a - b) @ right / lr for a, b in ((adamw_before, weight.detach()), (before, loft.change)))
        out = torch.zeros_like(full)
        out[r:, r:] = full[r:, r:]
        limit = algebra.longest_quotient(*betas, t)
        for name, value in zip(data["lengths"], (length(full), length(full - out), length(own), limit), strict=True):
            data["lengths"][name].append(value)
        if t == shown:
            data["steps"] = {"AdamW": full.numpy(), LOFT: own.numpy()}
    return data


@styled
def draw_spans(data: dict[str, Any]) -> Figure:
    """One step of each in the coordinates of both spans, and the lengths of all."""
    figure = Figure(figsize=(12, 4.2))
    first, second, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    r, t, lengths = data["rank"], data["step"], data["lengths"]
    most = max(abs(step).max() for step in data["steps"].values())
    for axes, (name, step) in zip((first, second), data["steps"].items(), strict=True):
        axes.imshow(step, cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
        rows, columns = step.shape
        axes.add_patch(Rectangle((-0.5, -0.5), r, rows, fill=False, edgecolor=BLUE, linewidth=4))
        axes.add_patch(Rectangle((-0.5, -0.5), columns, r, fill=False, edgecolor=RED, linewidth=4))
        middle = (r + rows) / 2 - 0.5, (r + columns) / 2 - 0.5
        axes.text(middle[1], middle[0], "out of reach" if axes is first else "nothing", ha="center", va="center")
        axes.set(xticks=[], yticks=[], title=f"Step {t} of {name}: length {lengths[name][t - 1]:.2f}")
        axes.set_ylabel("moving B reaches this column", color=BLUE)
        axes.set_xlabel("moving A reaches this row", color=RED)
        axes.xaxis.set_label_position("top")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    first.text(
        0, -0.03, f"In reach of the pair: length {lengths['reached'][t - 1]:.2f}", va="top", transform=first.transAxes
    )
    names = {"AdamW": "AdamW", "reached": "of it in\nreach", LOFT: LOFT, "limit": "longest\nthat AdamW\ncan be"}
    colours = {"AdamW": BLACK, "reached": GREEN, LOFT: BLUE, "limit": GREY}
    steps = range(1, len(lengths[LOFT]) + 1)
    for name, values in lengths.items():
        line = {"limit": ":", "AdamW": "--"}.get(name, "-")
        right.plot(steps, values, line, color=colours[name], label=name)
    right.set(xlabel="step", ylabel="length / (lr √mn)", title="Length of every step", ylim=(0, None))
    label_ends(right, [End(values[-1], names[name], colours[name]) for name, values in lengths.items()])
    return figure


# --- rows: who owns which rows


def load_rows(world: int = 3, rank: int = 4) -> dict[str, Any]:
    """How the factors of a small Llama are cut, in the elements that DeepSpeed holds and the rows that LoFT owns."""
    settings = {
        **{"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 192},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    }
    factors = derive("small", settings).factors(rank)
    data: dict[str, Any] = {
        "world": world,
        "names": [factor.name for factor in factors],
        "cuts": {},
        "state": {},
        "moves": {},
    }

    def parts(cut: Cut) -> list[tuple[int, float, float]]:
        whole = int(cut.edges[-1])
        return [(q, a / whole, b / whole) for q in cut.ranks for a, b in [cut.interval(q)] if a < b]

    for stage in (2, 3):
        division = Division(factors, stage, world)
        for kind in ("held", "owned"):
            data["cuts"][stage, kind] = [parts(getattr(division.partitions[factor], kind)) for factor in factors]
        data["state"][stage] = (division.elements / division.elements.sum()).tolist()
        came = received(division)
        data["moves"][stage] = float(came["gradients"].sum()) / 4 / sum(division.sizes)
    return data


@styled
def draw_rows(data: dict[str, Any]) -> Figure:
    """A bar a factor, coloured by the rank that has it."""
    figure = Figure(figsize=(12, 6))
    panels = figure.subplots(1, 4, sharey=True)
    colours = (BLUE, ORANGE, GREEN, PINK)
    count, layers = len(data["names"]), len({name.split(".")[2] for name in data["names"]})
    titles = {"held": "DeepSpeed holds", "owned": "LoFT owns rows"}
    for axes, ((stage, kind), cuts) in zip(panels, data["cuts"].items(), strict=True):
        for place, cut in enumerate(cuts):
            for rank, begin, end in cut:
                axes.barh(place, end - begin, left=begin, height=0.82, color=colours[rank], label=f"rank {rank}")
        axes.set(title=f"ZeRO {stage}: {titles[kind]}", xlim=(0, 1), ylim=(count - 0.4, -0.6), xticks=[])
        axes.grid(visible=False)
        if kind == "owned":
            shares = ", ".join(f"{share:.0%}" for share in data["state"][stage])
            axes.set_xlabel(f"rows of a factor\n\nstate: {shares}\ngradients sent: {data['moves'][stage]:.1%}")
        else:
            axes.set_xlabel("elements of a factor")
        for layer in range(1, layers):
            axes.axhline(count / layers * layer - 0.5, color=BLACK, linewidth=1)
    middle = [count / layers * (layer + 0.5) - 0.5 for layer in range(layers)]
    panels[0].set_yticks(middle, [f"layer {layer}\n(7 pairs)" for layer in range(layers)])
    handles = [Rectangle((0, 0), 1, 1, color=colours[rank]) for rank in range(data["world"])]
    figure.legend(handles, [f"rank {rank}" for rank in range(data["world"])], loc="outside upper center", ncols=4)
    return figure


# --- exchanges: what one step sends


def load_exchanges(model: str = "Llama-3-8B", rank: int = 16) -> dict[str, Any]:
    """MB that each part of a step brings to the rank that receives most."""
    factors = shapes_of(model).factors(rank)
    triangle, square = rank * (rank + 1) // 2, rank**2
    # What of the products each phase asks for: see ``loft_ds.plan.traffic.products``.
    numbers = {Phase.OVERLAPS: triangle + 2 * square, Phase.MOVED: 2 * triangle + square + 1, Phase.OUTSIDE: 2 * square}
    data: dict[str, Any] = {"model": model, "rank": rank, "MB": {}}
    for stage, world in ((2, 8), (3, 8), (3, 64)):
        division = Division(factors, stage, world)
        came = received(division)
        worst = int(torch.stack(list(came.values())).sum(0).argmax())
        megabytes = {kind: float(each[worst]) / 1e6 for kind, each in came.items()}
        each = {"read": megabytes["gradients"], "write": megabytes["updates"]}
        each |= {phase.name: megabytes["products"] * part / sum(numbers.values()) for phase, part in numbers.items()}
        each |= {phase.name: megabytes["partners"] / 2 for phase in (Phase.PARTNERS, Phase.FOLLOWERS)}
        data["MB"][stage, world] = each
    return data


EXCHANGES = {
    "read": "2 all_to_all\ngradients",
    "OVERLAPS": "2 all_to_all\nsums",
    "BASES": "",
    "NORM": "all_reduce\nthe norm",
    "PARTNERS": "all_to_all\nwhole rows",
    "MOVED": "2 all_to_all\nsums",
    "TURNED": "",
    "FOLLOWERS": "all_to_all\nwhole rows",
    "OUTSIDE": "2 all_to_all\nsums",
    "BALANCE": "",
    "write": "2 all_to_all\nvalues",
}


@styled
def draw_exchanges(data: dict[str, Any]) -> Figure:
    """The parts of a step in their order, and what each brings."""
    figure = Figure(figsize=(12, 4.8))
    axes = figure.subplots()
    places = {name: place for place, name in enumerate(EXCHANGES)}
    colours = {(2, 8): GREEN, (3, 8): ORANGE, (3, 64): BLUE}
    for index, (key, each) in enumerate(data["MB"].items()):
        sent = {name: value for name, value in each.items() if value}
        at = [places[name] + 0.38 * (index - 1.5) for name in sent]
        bars = axes.bar(at, list(sent.values()), 0.36, color=colours[key])
        axes.bar_label(bars, [f"{value:.2g}" for value in sent.values()], padding=2)
    for name, what in EXCHANGES.items():
        if not what:
            axes.axvspan(places[name] - 0.45, places[name] + 0.45, color="#eeeeee")
            axes.text(places[name], 0.5, "asks no other rank", transform=axes.get_xaxis_transform(), **TURNED)
    axes.set_xticks(range(len(EXCHANGES)), [f"{name}\n{what}" for name, what in EXCHANGES.items()], fontsize=11)
    axes.set(yscale="log", ylabel="MB received", xlim=(-0.6, len(EXCHANGES) - 0.4))
    axes.margins(y=0.15)
    axes.grid(visible=False, axis="x")
    axes.set_title(f"{data['model']}, r = {data['rank']}: the parts of a step in their order (planned)")
    names = [f"ZeRO {stage}, {n} ranks: {sum(each.values()):.3g} MB" for (stage, n), each in data["MB"].items()]
    handles = [Patch(color=colours[key]) for key in data["MB"]]
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


TURNED: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center", "color": GREY}


# --- full_rank: distance from AdamW where LoFT has to be AdamW

STEPS = (1, 2, 5, 10, 20, 50, 100, 200)


def measure_full_rank(official: str, seeds: int = 5, n: int = 32) -> None:
    """Write the distances after each of ``STEPS`` beside the picture."""
    torch.set_num_threads(1)
    methods: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
        "LoFT, float64": (lambda model: LoFTAdamW(model, lr=full_rank.LR, betas=full_rank.BETAS), torch.float64),
        "LoFT, float32": (lambda model: LoFTAdamW(model, lr=full_rank.LR, betas=full_rank.BETAS), torch.float32),
        "Gram form, float64": (lambda model: full_rank.GramForm(model, 0.0), torch.float64),
        "Gram form, float32": (lambda model: full_rank.GramForm(model, 1e-6), torch.float32),
        "authors' code, float64": (full_rank.official(official), torch.float64),
    }
    medians = {}
    for name, (build, dtype) in methods.items():
        runs = [[full_rank.distance(build, n, dtype, steps, seed) for seed in range(seeds)] for steps in STEPS]
        medians[name] = [statistics.median(run) for run in runs]
        print(name, medians[name], flush=True)
    facts = {**provenance(torch.device("cpu")), "n": n, "seeds": seeds, "steps": STEPS}
    (FOLDER / "full_rank.json").write_text(json.dumps({**facts, "medians": medians}, indent=1) + "\n")


def load_full_rank() -> dict[str, Any]:
    """What :func:`measure_full_rank` has measured."""
    found: dict[str, Any] = json.loads((FOLDER / "full_rank.json").read_text())
    return found


@styled
def draw_full_rank(data: dict[str, Any]) -> Figure:
    """Distances over the steps."""
    figure = Figure(figsize=(12, 4.8))
    axes = figure.subplots()
    colours = {"LoFT": BLUE, "Gram form": ORANGE, "authors' code": PINK}
    ends = []
    for name, values in data["medians"].items():
        method, _, dtype = name.partition(", ")
        axes.plot(data["steps"], values, "o-" if dtype == "float64" else "s--", color=colours[method], label=name)
        ends.append(End(values[-1], name, colours[method]))
    spread(axes, data["steps"])
    axes.set(yscale="log", xlabel="step", ylabel="relative distance of W from AdamW's")
    axes.set_title(f"m = n = r = {data['n']}, where LoFT has to be AdamW; median of {data['seeds']} seeds")
    label_ends(axes, ends)
    return figure


# --- step_time: what a step costs beside the floor

TIMED = {
    LOFT: (BLUE, "o-"),
    "authors' LoFT": (PINK, "s-"),
    "AdamW fused": (RED, "^-"),
    "AdamW full matrix": (BLACK, "v-"),
}


def load_step_time() -> dict[str, Any]:
    """Milliseconds of the square layers over the rank."""
    data: dict[str, Any] = {"facts": facts_of("step_time"), "layers": {}}
    for cell in stored("step_time")["cells"]:
        if cell["shape"][0] == cell["shape"][1]:
            layer = data["layers"].setdefault(f"{cell['model']}, {cell['shape'][0]} x {cell['shape'][1]}", {})
            known = {name: cell["methods"].get(name, {}).get("seconds") for name in TIMED}
            for name, value in {**known, "floor": cell["floor_seconds"]}.items():
                if value:
                    layer.setdefault(name, []).append((cell["rank"], 1e3 * value))
    return data


@styled
def draw_step_time(data: dict[str, Any]) -> Figure:
    """A panel a layer."""
    figure = Figure(figsize=(12, 5.2))
    panels = figure.subplots(1, len(data["layers"]), sharey=True)
    for axes, (title, lines) in zip(panels, data["layers"].items(), strict=True):
        for name, points in lines.items():
            colour, look = TIMED.get(name, (GREY, ":"))
            axes.plot(*zip(*points, strict=True), look, color=colour, label=name)
        spread(axes, [rank for rank, _ in lines["floor"]])
        axes.set(yscale="log", xlabel="rank of the adapter", title=title)
    panels[0].set_ylabel("milliseconds of a step")
    handles, names = panels[0].get_legend_handles_labels()
    names = [
        {"AdamW fused": "LoRA's AdamW", "AdamW full matrix": "AdamW of the layer"}.get(name, name) for name in names
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.suptitle(f"One layer, release {data['facts']['release']}, {data['facts']['device']}", x=0.01, ha="left")
    return figure


# --- scaling: measured and planned

SHARED = {0: (BLACK, "-"), 1: (ORANGE, "-"), 2: (SKY, "--"), 3: (BLUE, "-")}
PANELS = {
    "state MB": "LoFT's state, MB",
    "optimizer MFLOP": "arithmetic, MFLOP",
    "all_to_all kB": "received in all_to_all, kB",
}


def load_scaling() -> dict[str, Any]:
    """By panel and stage: ranks, measured and planned, of the fullest rank in strong scaling."""
    rows = [row for row in stored("scaling")["rows"] if row["scaling"] == "strong"]

    def value(row: dict[str, Any], panel: str) -> float:
        return state_of(row) if panel == "state MB" else float(row[panel])

    panels = {
        panel: {
            stage: [
                (row["ranks"], value(row, panel), value(row["law"], panel)) for row in rows if row["stage"] == stage
            ]
            for stage in SHARED
        }
        for panel in PANELS
    }
    return {"facts": facts_of("scaling"), "settings": stored("scaling")["settings"], "panels": panels}


@styled
def draw_scaling(data: dict[str, Any]) -> Figure:
    """Dots measured, lines planned."""
    figure = Figure(figsize=(12, 4.8))
    for axes, (panel, stages) in zip(figure.subplots(1, len(PANELS)), data["panels"].items(), strict=True):
        for stage, rows in stages.items():
            colour, line = SHARED[stage]
            ranks, measured, law = zip(*rows, strict=True)
            axes.plot(ranks, law, line, color=colour, label=f"ZeRO {stage}, planned")
            axes.plot(ranks, measured, "o", color=colour, markersize=9 - 1.5 * stage, label=f"ZeRO {stage}, measured")
        spread(axes, [ranks for ranks, *_ in stages[0]])
        axes.set(xlabel="ranks", title=PANELS[panel])
        if panel != "all_to_all kB":  # which is zero at some
            plain(axes)
    handles = [line for line in axes.lines if line.get_linestyle() != "None"]
    figure.legend(handles, [f"ZeRO {stage}" for stage in SHARED], loc="outside lower center", ncols=4)
    dots = f"dots measured with release {data['facts']['release']} on CPU ranks"
    figure.suptitle(f"A small Llama, r = {data['settings']['rank']}: {dots}, lines planned", x=0.01, ha="left")
    return figure


# --- resume and main job: losses of runs that have to be one


def load_resume() -> dict[str, Any]:
    """Both runs."""
    return stored("resume")


@styled
def draw_resume(data: dict[str, Any]) -> Figure:
    """The losses, and how far they are apart."""
    figure = Figure(figsize=(12, 4.8))
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    unbroken, broken = data["runs"]
    (whole,) = unbroken["parts"]
    steps = range(1, whole["steps"] + 1)
    left.plot(steps, unbroken["losses"], color="#bbbbbb", linewidth=7, label=f"unbroken: {ranks_of(whole)}")
    apart = [abs(a - b) for a, b in zip(broken["losses"], unbroken["losses"], strict=True)]
    first = 0
    for part, colour in zip(broken["parts"], (BLUE, RED, GREEN), strict=True):
        own = slice(first, first + part["steps"])
        left.plot(steps[own], broken["losses"][own], color=colour, label=ranks_of(part))
        right.plot(steps[own], apart[own], "o", color=colour, label=ranks_of(part))
        first += part["steps"]
        for axes in (left, right) if first < len(steps) else ():
            axes.axvline(first + 0.5, color=GREY, linestyle=":")
    left.set(xlabel="step", ylabel="loss", title="one run, saved and resumed on other ranks")
    spacing = 2 * torch.finfo(torch.float32).eps  # of float32 between 2 and 4
    right.axhline(spacing, color=GREY, linestyle="--", label="float32's spacing")
    right.set(xlabel="step", ylabel="|loss - loss unbroken|", title="distance from the unbroken run, float32")
    right.yaxis.set_major_formatter("{x:g}")
    handles, names = (
        a + b[-1:] for a, b in zip(*(axes.get_legend_handles_labels() for axes in (left, right)), strict=True)
    )
    figure.legend(handles, names, loc="outside lower center", ncols=5)
    return figure


def ranks_of(part: dict[str, int]) -> str:
    return f"{part['ranks']} rank{'s' * (part['ranks'] > 1)}, ZeRO {part['stage']}"


def load_main_job() -> dict[str, Any]:
    """All runs."""
    return {"facts": facts_of("main_job"), "runs": stored("main_job")["runs"]}


@styled
def draw_main_job(data: dict[str, Any]) -> Figure:
    """The losses, and how far those of LoFT are apart."""
    figure = Figure(figsize=(12, 4.8))
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    runs = {(run["optimizer"], run["config"][-1]): run["loss"] for run in data["runs"]}
    first = runs["loft", "0"]
    steps = range(1, len(first) + 1)
    for (optimizer, stage), losses in sorted(runs.items()):
        if optimizer == "loft":
            colour, _ = SHARED[int(stage)]
            # They lie on each other: wide to narrow, so that all are seen.
            left.plot(steps, losses, color=colour, linewidth=9 - 2.4 * int(stage), label=f"LoFT, ZeRO {stage}")
            apart = [abs(a - b) for a, b in zip(losses, first, strict=True)]
            right.plot(steps, apart, "o-", color=colour, label=f"LoFT, ZeRO {stage}")
        else:
            left.plot(steps, losses, "--", color=RED, label=f"LoRA with AdamW, ZeRO {stage}")
    left.set(xlabel="step", ylabel="training loss", title="SmolLM2-135M on Shakespeare")
    right.set(
        xlabel="step", ylabel="|loss - loss at ZeRO 0|", title=f"LoFT, release {data['facts']['release']}, float32"
    )
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


# --- reliability: runs under faults on the unbroken one


def load_reliability() -> dict[str, Any]:
    """All runs."""
    return stored("reliability")


@styled
def draw_reliability(data: dict[str, Any]) -> Figure:
    """The losses, where the faults came, and how far the losses are apart."""
    figure = Figure(figsize=(12, 6.4))
    plots: dict[str, Axes] = figure.subplot_mosaic([["left", "right"], ["below", "right"]], width_ratios=(1.4, 1))
    left, right, below = plots["left"], plots["right"], plots["below"]
    unbroken, faulty = data["runs"][0]["losses"], faulty_of(data)
    steps = range(1, len(unbroken) + 1)
    left.plot(steps, unbroken, color="#bbbbbb", linewidth=7, label="unbroken")
    for (kind, runs), colour in zip(faulty.items(), (BLUE, RED), strict=True):
        for run in runs:
            left.plot(steps, run["losses"], color=colour, linewidth=1.2, label=f"faults, {kind}")
    for run in data["runs"][1:]:
        # Equal ones are nowhere on a logarithmic axis.
        apart = [abs(a - b) or math.nan for a, b in zip(run["losses"], unbroken, strict=True)]
        if run in faulty["other ranks"]:
            right.plot(steps, apart, color=RED, linewidth=1.2, label="faults, other ranks")
        elif not run["faults"]:
            right.plot(steps, apart, "--", color=BLACK, label=run["name"])
    every = [run for runs in faulty.values() for run in runs]
    for kind, colour in zip(FAULTS, (RED, BLACK, PINK, GREEN, ORANGE, BLUE), strict=True):
        struck = [(row, job) for row, run in enumerate(every) for job in run["jobs"] if job["fault"] == kind]
        at = [job.get("last", job["whole"]) for _, job in struck]
        below.plot(at, [row for row, _ in struck], "|", color=colour, markersize=11, markeredgewidth=2.2, label=kind)
    left.set(ylabel="loss", title="losses of all runs")
    below.set(xlabel="step", yticks=range(len(every)), title="faults, after the last step that was done")
    below.set_yticklabels([run["name"] for run in every])
    below.set_ylim(len(every) - 0.4, -0.6)
    below.sharex(left)
    right.set(xlabel="step", title="|loss - loss unbroken|, float32", yscale="log")
    handles: dict[str, Any] = {}
    for axes in (left, right, below):
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
    return figure


# --- quality: the sweep of a study, and its measure over ranks


def load_study(name: str) -> pandas.DataFrame:
    """All its trainings."""
    return read_study(RESULTS / "quality" / f"{name}.jsonl")


@styled
def draw_study(frame: pandas.DataFrame) -> Figure:
    """The sweeps of LoFT and LoRA by rank, and the measure over ranks."""
    figure = Figure(figsize=(12, 4.8))
    first, second, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    second.sharey(first)
    score, chosen, methods = score_of(frame), chosen_of(frame), set(frame["method"])
    measure = next(name for name in MEASURES if name in frame)
    ranks = sorted(set(frame["rank"]) - {0})
    colours = dict(zip(ranks, (SKY, BLUE, GREEN, ORANGE, RED), strict=False))
    own = LOFT if LOFT in methods else OLD
    for axes, method in ((first, own), (second, LORA)):
        for rank, cell in frame[(frame["method"] == method) & (frame["seed"] == 0)].groupby("rank"):
            cell = cell.sort_values("lr")
            axes.plot(cell["lr"], cell[score], "o-", color=colours[rank], label=rank_name(rank))
        spread(axes, sorted(set(frame[frame["method"] == method]["lr"])), "{:.0e}")
        axes.set(xlabel="learning rate", title=f"{method}, seed 0")
    first.set_ylabel(score.replace("_", " "))
    swept = {line.get_label(): line for axes in (first, second) for line in axes.lines}
    names = [rank_name(rank) for rank in ranks if rank_name(rank) in swept]
    figure.legend([swept[name] for name in names], names, loc="outside lower left", ncols=5)
    bound = FULL if FULL in methods else BOUND
    shown = [name for name in (LOFT, OLD, LORA, bound) if name in methods]
    if len(ranks) == 1 and "held_out" in frame:
        draw_way(right, chosen[chosen["method"].isin(shown)], measure)
    else:
        draw_over_ranks(right, {method: means(chosen, method, measure) for method in shown})
        spread(right, ranks)
        right.set_ylabel(MEASURES[measure])
    if measure == "loss":  # over many powers of ten
        first.set_yscale("log")
        plain(right)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=4)
    return figure


def draw_over_ranks(axes: Axes, tables: dict[str, pandas.DataFrame]) -> None:
    """Each method's measure at its chosen rate."""
    for place, (method, table) in enumerate(tables.items()):
        colour, look = SHOWN[method]
        if 0 in table.index:
            axes.axhline(
                table.loc[0, "mean"], color=colour, linestyle=look, label=method.replace(" matrices alone", "")
            )
        else:
            x = [rank * 1.06 ** (place - 1) for rank in table.index]  # so that intervals do not lie on each other
            axes.errorbar(x, table["mean"], table["half"], fmt=look, capsize=4, color=colour, label=method)
    axes.set(xlabel="rank of the adapters", title="chosen rate, 95% intervals")


def draw_way(axes: Axes, chosen: pandas.DataFrame, measure: str) -> None:
    """Each method's loss on the way to its last, means over seeds; as fine a line, where full fine-tuning ends."""
    for method, cell in chosen.groupby("method", sort=False):
        colour, look = SHOWN[str(method)]
        looks = pandas.json_normalize(cell["held_out"].tolist()).rename(columns=int).mean()
        looks[cell["steps"].iloc[0]] = cell[measure].mean()
        axes.plot(looks.index, looks, look, color=colour, label=method)
        if method == FULL:
            axes.axhline(looks.iloc[-1], color=colour, linewidth=0.8)
    axes.set(xlabel="steps", ylabel=MEASURES[measure], title="chosen rate, mean of the seeds")


SHOWN = {LOFT: (BLUE, "o-"), OLD: (SKY, "s--"), LORA: (RED, "^-"), FULL: (BLACK, "--"), BOUND: (GREY, "--")}
STUDIES_DRAWN = ("classification", "language", "tunes", "longer", "head", "reviews", "factorisation")
PICTURES: dict[str, tuple[Callable[[], Any], Callable[[Any], Figure]]] = {
    "hero": (load_hero, draw_hero),
    "spans": (load_spans, draw_spans),
    "rows": (load_rows, draw_rows),
    "exchanges": (load_exchanges, draw_exchanges),
    "full_rank": (load_full_rank, draw_full_rank),
    "step_time": (load_step_time, draw_step_time),
    "scaling": (load_scaling, draw_scaling),
    "resume": (load_resume, draw_resume),
    "main_job": (load_main_job, draw_main_job),
    "reliability": (load_reliability, draw_reliability),
    **{f"quality_{name}": (functools.partial(load_study, name), draw_study) for name in STUDIES_DRAWN},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw some or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; all if none")
    parser.add_argument(
        "--official", metavar="PATH", help="measure full_rank anew, with a checkout of the authors' code"
    )
    options = parser.parse_args(arguments)
    if strange := set(options.names) - set(PICTURES):
        parser.error(f"no picture is named {', '.join(sorted(strange))}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.official:
        measure_full_rank(options.official)
    for name in options.names or PICTURES:
        load, draw = PICTURES[name]
        draw(load()).savefig(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
