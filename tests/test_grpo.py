"""The study of reinforcement learning at rank 1: it goes on where it stopped, and its page is what the lines say."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

import pages
import pytest
from launch_helpers import ROOT, make_model, unlaunched

TRL = Path(sys.prefix) / "trl"  # `make setup` fills it


def cases_of(runs):
    cases = defaultdict(list)
    for run in runs:
        cases[run["method"], run["eps"], run["lr"]].append(run)
    return cases


@pytest.mark.study
def test_the_study(tmp_path):
    if not TRL.is_dir():
        pytest.skip(f"tests/trl.txt is not installed in {TRL}: run make setup")
    model, file = make_model(tmp_path / "model"), tmp_path / "grpo.jsonl"
    script = ROOT / "benchmarks" / "grpo.py"
    command = [sys.executable, script, "--model", model, "--results", file, "--steps", "2"]

    def go_on():
        done = subprocess.run(command, cwd=tmp_path, env=unlaunched(TRL), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return file.read_text().splitlines()

    lines = go_on()
    runs = [json.loads(line) for line in lines]
    for method in ("LoFT", "LoRA"):
        for eps in (1e-8, 1e-4):
            swept = [run for run in runs if (run["method"], run["eps"], run["seed"]) == (method, eps, 0)]
            best = max(swept, key=lambda run: fmean(run["reward"]))["lr"]
            assert len(swept) > 1
            assert sorted(run["seed"] for run in cases_of(runs)[method, eps, best]) == [0, 1, 2]
            if eps == 1e-8:
                of_small = best
        assert sorted(run["seed"] for run in cases_of(runs)[method, 1e-4, of_small]) == [0, 1, 2]
    for run in runs:
        assert len(run["reward"]) == len(run["grad_norm"]) == len(run["factors_norm"]) == 2
        # AdamW's are clipped to 1.0 by that very norm, which is not LoFT's.
        clipped = run["factors_norm"] == pytest.approx([min(norm, 1.0) for norm in run["grad_norm"]], rel=1e-5)
        assert clipped == (run["method"] == "LoRA")
        assert run["commit"]
        assert run["versions"]["trl"]

    file.write_text("\n".join(lines[:-1]) + "\n")
    again = [json.loads(line) for line in go_on()]
    assert again[:-1] == runs[:-1]
    assert again[-1]["reward"] == runs[-1]["reward"]


def test_the_page_is_what_the_lines_say():
    page = (pages.PAGES_FOLDER / "grpo.md").read_text()
    assert page == pages.grpo()
    lines = (pages.RESULTS / "grpo.jsonl").read_text().splitlines()
    tables = page.split("## What the denominators are")
    rows = [[[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in part.splitlines()] for part in tables]
    for (method, eps, lr), runs in cases_of(map(json.loads, lines)).items():
        if len(runs) == 1:
            continue
        key = [method, f"{eps:g}", f"{lr:g}"]
        (rewards,), (first, *_) = ([row for row in part if row[:3] == key] for part in rows)
        assert float(rewards[3].split()[0]) == round(fmean(fmean(run["reward"]) for run in runs), 3)
        assert float(rewards[4].split()[0]) == round(fmean(run["reward"][-1] for run in runs), 3)
        middle = median(run["denominators"]["0.5"] for run in runs)
        assert first[6] == f"{middle:.1e}"
        assert first[8] == f"{middle / (middle + eps):.2g}"
