"""Does it learn better? Trainings of LoFT, LoRA and full fine-tuning on real models, at the same sweep and budget.

    python benchmarks/quality.py classification --workers 2   # or factorisation, head, longer, reviews, language, tunes
    python benchmarks/quality.py reviews --methods LoFT LoRA  # some columns
    python benchmarks/quality.py captured                     # how much of the full gradient a rank can follow
    python benchmarks/quality.py page                         # docs/results/quality.md and a page a study

A study's trainings are appended to ``results/quality/STUDY.jsonl``, each with its seed, versions, wall time and commit;
started again, it does what is missing. First every method's whole sweep of learning rates with seed 0; then the other
seeds at the rate with the lowest validation loss, and at no other. Where a study has a ``reference``, the accumulated
change of the weights is compared with that of AdamW on the adapted matrices themselves, from the same start on the same
data: the study of the distance to full fine-tuning costs no trainings of its own. ``--quick`` does a few steps of a few
methods, to see that the study works.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import nn

from loft_ds.zero.config import SettingsError
from provenance import RESULTS, ROOT, provenance
from studies.captured import captured
from studies.methods import CUTS, METHODS
from studies.page import RIVALS, write_quality
from studies.tasks import Classification, Factorisation, Language, Task, Tunes
from studies.training import Changes, Run, best_of_rank, changes, compare, steps_after, train

LOFT, PUBLISHED = "LoFT", "LoFT as published"
JOINT, ALTERNATE = "LoFT, joint", "LoFT, alternate"  # each is the default at some ranks: see LoFTAdamW's turns
FULL = ("full", "full, adapted matrices alone")
GRADIENT = "LoFT, first directions from gradients"
WEIGHT = "LoFT, first directions from the weight"
COLD = ("LoFT, no warm-up", "LoRA, no warm-up")
START = "LoFT, gradient start"
STACKED = (f"{START}, no warm-up", START, f"{START} left in, no warm-up", f"{START} left in")
SETTINGS = ("LoFT, eps 1e-6", "LoFT, no clipping", "LoFT, warm-up of 30%")
ABLATIONS = tuple(name for name in METHODS if name.startswith(("LoFT without", "LoFT simple")))
ALPHAS = ("LoRA, alpha = r", "LoRA, alpha = 4 r")
LORAS = ("LoRA", *ALPHAS, "rsLoRA", "PiSSA", "LoRA-GA", "LoRA+", "LoRA-FA", "Riemannian")
PEERS = ("LoRA-Pro", "LoRA-RITE", "AltLoRA+")


@dataclass(frozen=True)
class Study:
    """A task and what is compared on it.

    Attributes:
        task: what is trained.
        columns: (methods, ranks) in the order in which they are trained.
        seeds: trainings at the best learning rate.
        rates: how many rates of each method's sweep are taken.
        reference: the learning rate of the full fine-tuning that weights are compared with; None for no comparison.
    """

    task: Task
    columns: tuple[tuple[tuple[str, ...], tuple[int | None, ...]], ...]
    seeds: int = 3
    rates: int = 4
    reference: float | None = None


STUDIES = {
    "factorisation": Study(
        Factorisation(),
        (
            ((FULL[0],), (None,)),
            ((LOFT, ALTERNATE, PUBLISHED, *LORAS, *PEERS, *RIVALS), (8,)),
            ((*ABLATIONS, *SETTINGS, *COLD), (8,)),
        ),
    ),
    "classification": Study(
        Classification("r8"),
        (
            ((*FULL, "head alone"), (None,)),
            ((LOFT, ALTERNATE, PUBLISHED, "LoRA"), (1,)),
            ((LOFT, ALTERNATE, PUBLISHED, "LoRA"), (16,)),
            ((LOFT, PUBLISHED, "LoRA"), (2,)),
            ((GRADIENT, "LoRA-GA"), (1,)),
            ((LOFT, "LoRA"), (4,)),
            ((ALTERNATE,), (2, 4)),
            ((WEIGHT,), (1,)),
            ((GRADIENT,), (2, 4)),
            ((LOFT, "LoRA"), (64,)),
            ((*LORAS[1:], *PEERS), (2,)),
            (SETTINGS, (2,)),
            (COLD, (2, 1)),
            ((f"{FULL[1]}, no warm-up",), (None,)),
            (ABLATIONS, (2,)),
            ((JOINT,), (64,)),
            (RIVALS, (2, 4, 1)),
            (RIVALS[:2], (16,)),
            (COLD, (4,)),
            (STACKED, (1, 2, 4)),
            (tuple(name for name in CUTS if "kept" in name), (1, 2, 4)),
            (tuple(name for name in CUTS if "kept" not in name), (1,)),
            (ALPHAS, (16, 1)),
            (ABLATIONS, (16,)),
        ),
        reference=3e-4,
    ),
    "head": Study(
        Classification("r8", head_rate=1e-2),
        (
            (FULL[1:], (None,)),
            ((LOFT, "LoRA"), (1, 2, 16)),
            (FULL[:1], (None,)),
            (COLD, (2, 1)),
            ((f"{FULL[1]}, no warm-up",), (None,)),
            ((PUBLISHED, GRADIENT, "LoRA-FA"), (1,)),
        ),
    ),
    "longer": Study(
        Classification("r8", steps=300), ((FULL[1:], (None,)), ((LOFT, "LoRA"), (1,)), ((LOFT, "LoRA"), (16,))), rates=3
    ),
    "reviews": Study(
        Classification("reviews"),
        (
            (FULL[1:], (None,)),
            ((LOFT, "LoRA"), (1, 16)),
            ((PUBLISHED, ALTERNATE), (16,)),
            ((LOFT, "LoRA"), (2,)),
            (FULL[:1], (None,)),
        ),
        seeds=5,
    ),
    "language": Study(
        Language(),
        (
            (FULL[1:], (None,)),
            ((LOFT, "LoRA"), (1, 16)),
            ((ALTERNATE,), (16,)),
            ((LOFT, "LoRA"), (2,)),
            (FULL[:1], (None,)),
            (("LoFT without second-moment calibration",), (16,)),
        ),
    ),
    "tunes": Study(Tunes(), ((FULL[:1], (None,)), ((LOFT, "LoRA"), (16,)), (FULL[1:], (None,))), seeds=5),
}
CAPTURED = tuple((LOFT, rank) for rank in (1, 2, 4, 16, 64))
CAPTURED_RATE = 3e-4
SNAPSHOTS = (0.1, 0.3, 1.0)  # of the training, when the weights are compared with the reference's


def sweep(study: Study, done: list[dict[str, Any]]) -> Iterator[Run]:
    """The trainings still to be done, as far as the results so far tell."""
    measured = {_key(record): record for record in done}
    cells = [(method, rank) for methods, ranks in study.columns for rank in ranks for method in methods]
    for method, rank in cells:
        rates = [study.task.rate_scale * rate for rate in METHODS[method].rates[: study.rates]]
        first = [Run(study.task.name, method, rank, lr, 0, study.task.steps) for lr in rates]
        missing = [run for run in first if run not in measured]
        yield from missing
        if not missing:
            scores = {run.lr: measured[run].get(study.task.score, float("inf")) for run in first}
            best = min(scores, key=lambda lr: scores[lr])
            others = [replace(first[0], lr=best, seed=seed) for seed in range(1, study.seeds)]
            yield from (run for run in others if run not in measured)


def _key(record: dict[str, Any]) -> Run:
    return Run(**{name: record[name] for name in Run.__dataclass_fields__})


def measure(run: Run, study: Study) -> dict[str, Any]:
    """One training, in a worker process, and how far from the reference its weights are on the way."""
    if study.reference is None:
        return train(run, study.task)
    references = _references(replace(run, method=FULL[1], rank=None, lr=study.reference), study.task)
    compared: dict[str, dict[str, float]] = {}
    beyond: dict[str, float] = {}

    def watch(step: int, model: nn.Module, before: Changes) -> None:
        if str(step) not in references:
            return
        change = changes(model, before)
        compared[str(step)] = compare(change, references[str(step)])
        if run.method in (GRADIENT, START, "ScaLoRA") and run.rank is not None:
            # Adapters that are taken out of the frozen weight, at the start or at every step: more than rank r in all.
            beyond["beyond_its_rank"] = compare(best_of_rank(change, run.rank), change)["distance"]

    result = train(run, study.task, watch)
    if run.rank is not None and run.method == LOFT:
        last = references[str(run.steps)]
        compared["nearest of this rank"] = compare(best_of_rank(last, run.rank), last)
    return {**result, "compared": compared, **beyond}


def _references(run: Run, task: Task) -> dict[str, Changes]:
    """The changes of the reference's weights by step, trained once by whichever worker comes first."""
    file = ROOT / "runs" / "quality" / f"{run.task}-{run.lr}-{run.seed}-{run.steps}.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            wanted = steps_after(SNAPSHOTS, run)
            kept: dict[str, Changes] = {}

            def watch(step: int, model: nn.Module, before: Changes) -> None:
                if step in wanted:
                    kept[str(step)] = changes(model, before)

            train(run, task, watch)
            torch.save(kept, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
    references: dict[str, Changes] = torch.load(file, weights_only=True)
    return references


def run_study(study: Study, file: Path, workers: int) -> None:
    """Train what is missing of a study, appending each result as it comes."""
    facts = provenance()
    file.parent.mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet, initargs=(workers,)) as pool:
        running: dict[Any, Run] = {}
        while True:
            waiting = [run for run in sweep(study, records(file)) if run not in running.values()]
            for run in waiting[: workers - len(running)]:
                running[pool.submit(measure, run, study)] = run
            if not running:
                return
            future = next(as_completed(running))
            record = future.result()
            del running[future]
            with file.open("a") as out:
                out.write(json.dumps({**record, **facts}) + "\n")
            shown = {key: value for key, value in record.items() if key.endswith(("loss", "f1"))}
            print(json.dumps({**asdict(_key(record)), **shown, "seconds": record["seconds"]}), flush=True)


def run_captured(task: Task, file: Path) -> None:
    """The part of the full gradient that LoFT can follow, by rank and start, appended as each training ends."""
    _quiet(1)
    facts = provenance()
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(record["method"], record["rank"]) for record in records(file)}
    for method, rank in CAPTURED:
        if (method, rank) not in done:
            lines = captured(Run(task.name, method, rank, CAPTURED_RATE, 0, task.steps), task)
            with file.open("a") as out:
                out.writelines(json.dumps({**line, **facts}) + "\n" for line in lines)


def records(file: Path) -> list[dict[str, Any]]:
    """The results of a study so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _quiet(workers: int) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def quick(study: Study) -> Study:
    """A few steps of one method of each kind, at one rank and two learning rates, with two seeds."""
    task = copy.copy(study.task)
    task.steps = 3
    if isinstance(task, Classification):
        task.validation = task.test = 64
    if isinstance(task, Language):
        task.documents = 4
    return replace(study, task=task, columns=(((FULL[0],), (None,)), ((LOFT, "LoRA"), (2,))), seeds=2, rates=2)


def main() -> None:
    """Run one study, or write the pages of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=[*STUDIES, "captured", "page"])
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, each in a process of its own")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="only these columns")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that the study works")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality", help="folder of the JSON lines")
    args = parser.parse_args()
    if args.methods and args.study not in STUDIES:
        parser.error(f"{args.study} has no columns to choose")
    if args.study == "page":
        write_quality(args.results, ROOT / "docs" / "results")
        return
    study = STUDIES["classification" if args.study == "captured" else args.study]
    study = quick(study) if args.quick else study
    if args.methods:
        if strange := set(args.methods) - {m for methods, _ in study.columns for m in methods}:
            parser.error(f"{args.study} has no columns {', '.join(sorted(strange))}")
        chosen = ((tuple(m for m in methods if m in args.methods), ranks) for methods, ranks in study.columns)
        study = replace(study, columns=tuple(chosen))
    file = args.results / f"{args.study}.jsonl"
    if args.study == "captured":
        run_captured(study.task, file)
    else:
        run_study(study, file, args.workers)


if __name__ == "__main__":
    try:
        main()
    except SettingsError as error:
        raise SystemExit(str(error)) from error
