"""The quality studies work: a few steps of each kind, resumed where they stopped, and the page of their results."""

import json

import pytest
import torch

import quality
from studies.page import write_page
from studies.training import best_of_rank, compare


def own_rate(results, method):
    return next(record["lr"] for record in results if record["method"] == method and record["seed"] == 1)


def run(name, folder):
    file = folder / f"{name}.jsonl"
    quality.run_study(quality.quick(quality.STUDIES[name]), file, workers=1)
    return file, [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", ["factorisation", "classification"])
def test_a_study_and_its_page(name, tmp_path):
    _, results = run(name, tmp_path / "quality")
    # Three methods, two rates each, one more seed at the better one.
    assert len(results) == 9
    assert {record["method"] for record in results} == {"full", "LoFT", "LoRA"}
    score = quality.STUDIES[name].task.score
    for method in ("full", "LoFT", "LoRA"):
        own = [record for record in results if record["method"] == method]
        (again,) = (record for record in own if record["seed"] == 1)
        assert again["lr"] == min((record for record in own if record["seed"] == 0), key=lambda r: r[score])["lr"]
    assert all(record["commit"] and record["seconds"] > 0 and len(record["training_losses"]) == 3 for record in results)

    write_page(tmp_path / "quality", {name: score})
    page = (tmp_path / "quality.md").read_text()
    chosen = [r for r in results if r["method"] == "LoFT" and r["lr"] == own_rate(results, "LoFT")]
    shown = "loss" if name == "factorisation" else "test_loss"
    assert f"| {sum(r[shown] for r in chosen) / len(chosen):.3g} ± " in page
    assert f"quality/{name}.png" in page
    assert (tmp_path / "quality" / f"{name}.png").stat().st_size > 0


def test_a_study_goes_on_where_it_stopped(tmp_path):
    file, results = run("factorisation", tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]))
    _, resumed = run("factorisation", tmp_path)
    assert [r["training_losses"] for r in resumed] == [r["training_losses"] for r in results]
    assert resumed[:7] == results[:7], "done anew"


def test_nearest_change_of_a_rank():
    torch.manual_seed(0)
    reference = {"w": torch.randn(6, 4)}
    assert compare(reference, reference)["distance"] == 0
    near = compare(best_of_rank(reference, 2), reference)
    tail = torch.linalg.svdvals(reference["w"])[2:].norm() / reference["w"].norm()
    assert near["distance"] == pytest.approx(float(tail), abs=1e-6)  # Eckart and Young
    assert near["cosine"] == pytest.approx((1 - float(tail) ** 2) ** 0.5, abs=1e-6)
