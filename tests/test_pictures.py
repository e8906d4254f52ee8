"""Every picture is drawn from what is stored, shows just that and can be read."""

import math
import re
import warnings

import pandas
import pictures
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from pages import stored

from loft_ds.plan import Division, received, shapes_of, traffic
from provenance import RESULTS
from studies.page import chosen_of, read_study


@pytest.fixture(scope="module")
def drawn():
    """``drawn(name)`` is a picture's data and its figure, rendered once, with warnings as errors."""
    kept = {}

    def one(name):
        if name not in kept:
            load, draw = pictures.PICTURES[name]
            data = load()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                figure = draw(data)
                FigureCanvasAgg(figure).draw()
            kept[name] = data, figure
        return kept[name]

    return one


def lines_of(axes):
    """By label, the points of each line."""
    return {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in axes.lines}


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_can_be_read(drawn, name):
    _, figure = drawn(name)
    renderer = figure.canvas.get_renderer()
    assert figure.get_size_inches()[0] * figure.dpi == 1200
    plots = [axes.get_window_extent() for axes in figure.axes]
    for legend in figure.legends:
        assert not any(legend.get_window_extent(renderer).overlaps(plot) for plot in plots), "a legend on the data"
    assert all(axes.get_legend() is None for axes in figure.axes)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 11
    extents = {text: text.get_window_extent(renderer) for text in texts}
    for axes in figure.axes:
        ends = [extents[text] for text in axes.texts if getattr(text, "xycoords", None) == "axes fraction"]
        assert all(end.x0 >= axes.get_window_extent().x1 for end in ends), "a line's label on the data"
        assert not any(a.overlaps(b) for place, a in enumerate(ends) for b in ends[:place]), "two labels on each other"
    labels = [axis.get_ticklabels(which="both") for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = {tick for each in labels for tick in each}  # some are beyond the limits, and not drawn
    for text in set(texts) - ticks:
        box = extents[text]
        inside = box.x0 >= 0 and box.x1 <= 1200 and box.y0 >= 0 and box.y1 <= figure.bbox.height
        assert inside, f"{text.get_text()!r} beyond the edge"
    assert (pictures.FOLDER / f"{name}.png").stat().st_size > 0


def test_hero(drawn):
    data, figure = drawn("hero")
    left, middle, right = figure.axes
    chosen = chosen_of(read_study(RESULTS / "quality" / "classification.jsonl"))
    for method in ("LoFT", "LoRA"):
        cells = chosen[chosen["method"] == method].groupby("rank")["test_loss"]
        (bars,) = (each for each in left.containers if each.get_label() == method)
        line, _, (ticks,) = bars
        assert list(line.get_ydata()) == list(cells.mean())
        for (low, high), (_, values) in zip(ticks.get_segments(), cells, strict=True):
            # Student's t of two degrees of freedom: all cells have three seeds.
            assert (high[1] - low[1]) / 2 == pytest.approx(4.3027 * values.sem(), rel=1e-4)
    full = chosen[chosen["method"] == "full"]["test_loss"].mean()
    assert list(left.lines[0].get_ydata()) == [full, full]
    assert lines_of(middle) == {
        name: [*zip(data["worlds"], each, strict=True)] for name, each in data["planned"].items()
    }
    # Two float32 moments of 8.03 billion weights, and of 42 million in the adapters.
    assert data["planned"]["full fine-tuning"][0] == pytest.approx(64.2, rel=1e-3)
    assert data["planned"]["LoRA"][0] == pytest.approx(0.3355, rel=1e-3)
    rows = [row for row in stored("scaling")["rows"] if row["scaling"] == "strong" and row["stage"] == 3]
    shown = lines_of(right)["ZeRO 3, measured"]
    assert [ranks for ranks, _ in shown] == [row["ranks"] for row in rows]
    for (_, megabytes), row in zip(shown, rows, strict=True):
        kinds = [kind for kind in row if re.match("momentum|second|pending|bases|kept", kind)]
        assert len(kinds) == 5
        assert megabytes == pytest.approx(sum(row[kind] for kind in kinds) / 1e3)


def test_spans(drawn):
    data, figure = drawn("spans")
    lengths, r = data["lengths"], data["rank"]
    assert abs(data["steps"]["LoFT"][r:, r:]).max() < 1e-9  # float64, of numbers of 1
    assert abs(data["steps"]["AdamW"][r:, r:]).max() > 0.1
    for adamw, reached, loft, limit in zip(*lengths.values(), strict=True):
        assert reached <= adamw <= limit
        assert loft <= limit
    for axes, step in zip(figure.axes, data["steps"].values(), strict=False):
        assert (axes.images[0].get_array() == step).all()
    assert {name: [y for _, y in points] for name, points in lines_of(figure.axes[2]).items()} == lengths


def test_rows(drawn):
    data, figure = drawn("rows")
    for axes, cuts in zip(figure.axes, data["cuts"].values(), strict=True):
        bars = [bar for bars in axes.containers for bar in bars]
        assert len(bars) == sum(map(len, cuts))
        widths = pandas.Series([bar.get_width() for bar in bars]).groupby([round(bar.get_y(), 3) for bar in bars]).sum()
        assert list(widths) == pytest.approx([1.0] * len(data["names"]))
    # Where DeepSpeed keeps factors together, a rank owns nearly what it holds; at stage 3 it holds a third of each.
    assert data["moves"][2] < 0.01
    assert [len(cut) for cut in data["cuts"][3, "held"]] == [data["world"]] * len(data["names"])
    assert all(sum(state) == pytest.approx(1) for state in data["state"].values())


def test_exchanges(drawn):
    data, figure = drawn("exchanges")
    factors = shapes_of(data["model"]).factors(data["rank"])
    bars = iter([bar.get_height() for bars in figure.axes[0].containers for bar in bars])
    for (stage, world), each in data["MB"].items():
        division = Division(factors, stage, world)
        worst = int(torch.stack(list(received(division).values())).sum(0).argmax())
        assert sum(each.values()) == pytest.approx(traffic(division, worst).total / 1e6)
        assert [next(bars) for value in each.values() if value] == [value for value in each.values() if value]
    assert set(pictures.EXCHANGES) == {"read", "write", *pictures.Phase.__members__}


def test_full_rank(drawn):
    data, figure = drawn("full_rank")
    wanted = {name: [*zip(data["steps"], values, strict=True)] for name, values in data["medians"].items()}
    assert lines_of(figure.axes[0]) == wanted


def test_step_time(drawn):
    _, figure = drawn("step_time")
    for axes in figure.axes:
        model, _, size = axes.get_title(loc="left").partition(", ")
        side = int(size.partition(" ")[0])
        cells = [c for c in stored("step_time")["cells"] if c["model"] == model and c["shape"] == [side, side]]
        shown = lines_of(axes)
        assert shown["floor"] == [(c["rank"], 1e3 * c["floor_seconds"]) for c in cells]
        for method in pictures.TIMED:
            known = [(c["rank"], c["methods"][method].get("seconds")) for c in cells]
            assert shown[method] == [(rank, 1e3 * seconds) for rank, seconds in known if seconds]


def test_scaling(drawn):
    _, figure = drawn("scaling")
    for axes, column in zip(figure.axes[1:], ("optimizer MFLOP", "all_to_all kB"), strict=True):
        for stage in range(4):
            rows = [r for r in stored("scaling")["rows"] if r["scaling"] == "strong" and r["stage"] == stage]
            shown = lines_of(axes)
            assert shown[f"ZeRO {stage}, measured"] == [(row["ranks"], row[column]) for row in rows]
            assert shown[f"ZeRO {stage}, planned"] == [(row["ranks"], row["law"][column]) for row in rows]


def test_resume(drawn):
    data, figure = drawn("resume")
    unbroken, broken = data["runs"]
    whole, *parts = (line for line in figure.axes[0].lines if line.get_label()[0] != "_")
    assert list(whole.get_ydata()) == unbroken["losses"]
    assert [loss for part in parts for loss in part.get_ydata()] == broken["losses"]
    assert [step for part in parts for step in part.get_xdata()] == list(range(1, len(broken["losses"]) + 1))
    assert [part["ranks"] for part in broken["parts"]] == [2, 3, 1]
    # Losses of 3 in float32, summed in another order on every number of ranks.
    assert max(abs(a - b) for a, b in zip(unbroken["losses"], broken["losses"], strict=True)) < 1e-5


def test_main_job(drawn):
    data, figure = drawn("main_job")
    shown = {name: [y for _, y in points] for name, points in lines_of(figure.axes[0]).items()}
    for run in data["runs"]:
        name = {"loft": "LoFT", "lora": "LoRA with AdamW"}[run["optimizer"]]
        assert shown[f"{name}, ZeRO {run['config'][-1]}"] == run["loss"]


@pytest.mark.parametrize("name", pictures.STUDIES_DRAWN)
def test_a_study(drawn, name):
    frame, figure = drawn(f"quality_{name}")
    score = "loss" if name == "factorisation" else "validation_loss"
    rows = frame[(frame["method"] == "LoRA") & (frame["seed"] == 0)].sort_values("lr")
    shown = lines_of(figure.axes[1])
    assert shown == {f"r = {rank}": [*zip(cell["lr"], cell[score], strict=True)] for rank, cell in rows.groupby("rank")}


def test_reliability(drawn):
    data, figure = drawn("reliability")
    left, right, below = figure.axes
    unbroken, *runs = data["runs"]
    faulty = sorted((run for run in runs if run["faults"]), key=lambda run: run["name"], reverse=True)
    whole, *shown = (list(line.get_ydata()) for line in left.lines)
    assert whole == unbroken["losses"]
    assert sorted(shown) == sorted(run["losses"] for run in faulty)
    assert all(run["losses"] == whole for run in faulty if run["name"].startswith("same ranks"))
    # Losses of 5 in float32, summed in another order on other ranks.
    moved = [line for line in right.lines if line.get_color() == pictures.RED]
    assert max(apart for line in moved for apart in line.get_ydata() if not math.isnan(apart)) < 1e-5
    struck = sum(job["fault"] in pictures.FAULTS for run in faulty for job in run["jobs"])
    assert sum(len(line.get_xdata()) for line in below.lines) == struck > 0
