"""An hour of training under faults, beside the same training unbroken.

    python benchmarks/soak.py             # an hour of faults and the unbroken runs; writes results/reliability.json
    python benchmarks/soak.py --quick     # two minutes; prints alone

A small Llama learns Shakespeare's bytes by ``launch/train.py``, each rank on a host of its own (network namespaces). At
random moments a random fault ends the job, and the same command goes on, until the last step: one run. Then the next
begins. Every other one stays on its ranks and its stage, and must end with the very bytes of the unbroken run. The rest
goes on elsewhere at every second restart. ``save_total_limit`` is 1: there is one whole checkpoint to fall back on.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from loft_ds.checkpoint.files import read_json
from loft_ds.checkpoint.manifest import MANIFEST
from loft_ds.training.assets import default_texts
from loft_ds.training.logs import LOG
from provenance import RESULTS, ROOT, provenance

sys.path.append(str(ROOT / "tests"))  # whose hosts with cables to pull are no part of the package
hosts, helpers = map(importlib.import_module, ("hosts", "launch_helpers"))

BATCH, BLOCK, RANK, LR, TEXT = 12, 32, 4, 3e-3, 50_000
STAGES, WORLDS = (1, 2, 3), (2, 3, 1, 4)
SAME, MOVED = "same ranks", "other ranks"
KILL, POWER, SAVE, STOP, PAUSE, CUT = (
    "SIGKILL",
    "SIGKILL of all ranks",
    "SIGKILL in a save",
    "SIGTERM",
    "SIGSTOP",
    "cut network",
)
KINDS = (KILL, POWER, SAVE, STOP, PAUSE, CUT)
ALONE = (KILL, SAVE, STOP)  # what can happen to a job of one rank; POWER would be KILL
LATE = "time-out, not injected"  # a machine so busy that one rank keeps the others waiting for too long
START, PACE, SAVING = 6, 0.5, 0.2  # seconds that a job takes to start, a step, and a save, on two cores
STOPPED = 128 + signal.SIGTERM
PATIENCE = 180  # seconds from a fault until a rank that has not ended counts as hung; the time-outs add up to far less
CLONE_NEWNET = 0x40000000  # linux/sched.h
# How far other ranks may carry a run. They sum in another order, and float32 is spaced by 5e-7 where losses are between
# 4 and 8. An unbroken run on other ranks is further away: AdamW's first step, a gradient over its own size, makes whole
# steps of gradients that are little more than rounding. So a run changes its ranks only once a step is saved.
FURTHEST = {"furthest loss": 1e-5, "furthest weights": 1e-5}

CONTEXT = multiprocessing.get_context("forkserver")  # imports torch and all else once for every rank of every restart
CONTEXT.set_forkserver_preload(["loft_ds.training.train", "deepspeed.runtime.zero.muon.muon_optimizer"])


@dataclass(frozen=True)
class Scale:
    """How long it all takes.

    Attributes:
        steps: of each run.
        save: a checkpoint every so many steps.
        spell: steps that a job does on the average until a fault.
        timeout: seconds that a collective may take.
        faults: of a run at most; then it goes on to its end.
        minutes: within which faults come, the last run beginning before 85 of 100 are over; 0 for two runs.
        others: ranks and stage of further unbroken runs.
    """

    steps: int
    save: int
    spell: int
    timeout: float
    faults: int
    minutes: float
    others: tuple[tuple[int, int], ...]


WHOLE = Scale(100, 5, 10, 30, 1000, 55, ((1, 1),))
QUICK = Scale(80, 5, 4, 8, 3, 0, ((1, 1),))  # more steps than the faults of a run let it do


@dataclass(frozen=True)
class Fault:
    """What is to happen to a job, and when.

    Attributes:
        kind: one of those above.
        victim: the rank that it happens to.
        steps: after so many of the job's own; 0 while it starts.
        delay: seconds from then on.
        within: seconds into a save, for the kind that waits for one.
    """

    kind: str
    victim: int
    steps: int
    delay: float
    within: float


class Chance:
    """All that is drawn, from one seed: the kinds from a shuffled deck, so that each comes as often as any other."""

    def __init__(self, seed: int, scale: Scale, kinds: Sequence[str]) -> None:
        self._random = random.Random(seed)
        self._scale = scale
        self._kinds = kinds
        self._deck: list[str] = []
        self._moves = 0

    def fault(self, world: int) -> Fault:
        """The next one for a job of so many ranks."""
        possible = ALONE if world == 1 else self._kinds
        while not any(kind in possible for kind in self._deck):
            self._deck += self._random.sample(KINDS, len(KINDS))
        kind = next(kind for kind in self._deck if kind in possible)
        self._deck.remove(kind)
        early = self._random.random() < 0.2 and kind != SAVE
        steps = 0 if early else self._random.randint(1, 2 * self._scale.spell)
        victim = self._random.randrange(world)
        delay, within = (self._random.uniform(0, longest) for longest in (START if early else PACE, SAVING))
        return Fault(kind, victim, steps, delay, within)

    def move(self) -> tuple[int, int]:
        """Where a job goes on: the next number of ranks, at any stage."""
        self._moves += 1
        return WORLDS[self._moves % len(WORLDS)], self._random.choice(STAGES)


class Site:
    """Where jobs run: the model, the text, and hosts if there can be any."""

    def __init__(self, folder: Path, scale: Scale, network: Any) -> None:
        self.folder, self.scale, self.network = folder, scale, network
        self._model = helpers.make_model(folder / "model")
        # Weights as large as those of a trained model of this width, whose frozen head can tell bytes apart.
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(self._model, initializer_range=0.2)
        AutoModelForCausalLM.from_config(config).save_pretrained(self._model)
        self._text = folder / "text.txt"
        self._text.write_text(default_texts()[0][:TEXT])

    def start(self, out: Path, ranks: int, stage: int) -> list[Any]:
        """The processes of a job, as many as it has ranks, which no launcher ends when one of them ends."""
        flags = {
            "deepspeed": ROOT / "ds_configs" / f"zero{stage}.json",
            "model_name_or_path": self._model,
            "train_file": self._text,
            "output_dir": out,
            "resume_from_checkpoint": True,
            "max_steps": self.scale.steps,
            "save_strategy": "steps",
            "save_steps": self.scale.save,
            "save_total_limit": 1,
            "per_device_train_batch_size": BATCH // ranks,
            "dataloader_drop_last": True,  # or an epoch's last batch would depend on the number of ranks
            "per_device_eval_batch_size": 1,
            "block_size": BLOCK,
            "lora_rank": RANK,
            "learning_rate": LR,
            "ddp_timeout": self.scale.timeout,
            "eval_on_start": False,
            "disable_tqdm": True,
            "report_to": "none",
        }
        argv = ["train.py", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
        sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
        address = self.network.addresses[0] if self.network else "127.0.0.1"
        environment = {"MASTER_ADDR": address, "MASTER_PORT": helpers.free_port(), **sizes}
        spaces = self.network._spaces if self.network else [None] * ranks
        log_of(out).unlink(missing_ok=True)
        processes = [
            CONTEXT.Process(target=serve, args=(rank, argv, environment, log_of(out), spaces[rank]))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        return processes


def log_of(out: Path) -> Path:
    """What the last job of a run has said."""
    return out.with_name(f"{out.name}.log")


def serve(rank: int, argv: list[str], environment: dict[str, Any], log: Path, space: str | None) -> None:
    """One rank: ``launch/train.py``, as a launcher starts it."""
    gc.freeze()  # what has been imported stays, and DeepSpeed collects garbage for every engine
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if space is not None:
        if ctypes.CDLL(None, use_errno=True).setns(os.open(f"/run/netns/{space}", os.O_RDONLY), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {space}")
        environment |= {"GLOO_SOCKET_IFNAME": hosts.INTERFACE, "TP_SOCKET_IFNAME": hosts.INTERFACE}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = argv
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")


class Run:
    """A training, over all its restarts.

    Attributes:
        out: its folder.
        jobs: what happened to each job, for the record.
        losses: of each step the losses that it had whenever it was done, with the job that did it.
    """

    def __init__(self, site: Site, name: str) -> None:
        self.out = site.folder / name
        self.jobs: list[dict[str, Any]] = []
        self.losses: dict[int, list[tuple[int, float]]] = {}
        self.site = site
        self._seen: set[frozenset[tuple[str, float]]] = set()
        self._safe = 0  # the step that must never be lost any more

    def train(self, ranks: int, stage: int, fault: Fault | None = None) -> bool:
        """One job, from the last checkpoint to a fault or to the end; whether it reached the end.

        Raises:
            RuntimeError: if it fails and no fault was injected.
        """
        began = time.monotonic()
        processes = self.site.start(self.out, ranks, stage)
        job: dict[str, Any] = {"ranks": ranks, "stage": stage, "fault": None}

        def over() -> bool:
            return not any(process.is_alive() for process in processes)

        def wait(condition: Callable[[], bool], pause: float = 0.05) -> bool:
            while not condition():
                if over():
                    return False
                time.sleep(pause)
            return True

        if fault is not None:
            due = wait(lambda: not fault.steps or len(self._fresh()) >= fault.steps)
            clock = time.monotonic() + fault.delay
            due = due and wait(lambda: time.monotonic() > clock)
            if due and fault.kind == SAVE:
                known = set(self._checkpoints())
                due = wait(lambda: bool(self._checkpoints().keys() - known), 0.001)
                time.sleep(fault.within)
            if due and not over():
                job |= {"fault": fault.kind, "victim": fault.victim}
                self._strike(fault, processes)
        struck = time.monotonic()
        job["hung"] = self._end(processes, job)
        if job["fault"] == CUT:
            self.site.network.mend(fault.victim if fault else 0)
        job |= {"seconds": round(time.monotonic() - began, 1), "seconds to end": round(time.monotonic() - struck, 1)}
        job["codes"] = [process.exitcode for process in processes]
        done = job["codes"] == [0] * ranks
        if not done and job["fault"] is None:
            said = log_of(self.out).read_text()
            if "hangs: it is alive" not in said and "Timed out" not in said and "no sign of life" not in said:
                raise RuntimeError(f"a job on {ranks} ranks at ZeRO {stage} failed by itself:\n{said}")
            job["fault"] = LATE
        self._note(job)
        return done

    def _strike(self, fault: Fault, processes: list[Any]) -> None:
        victim = processes[fault.victim]
        if fault.kind == CUT:
            self.site.network.cut(fault.victim)
            return
        number = {STOP: signal.SIGTERM, PAUSE: signal.SIGSTOP}.get(fault.kind, signal.SIGKILL)
        for process in processes if fault.kind == POWER else [victim]:
            if process.is_alive():
                os.kill(process.pid, number)

    def _end(self, processes: list[Any], job: dict[str, Any]) -> int:
        """Waits until the ranks have ended by themselves, and ends those that do not; how many these were."""
        paused = processes[job["victim"]] if job["fault"] == PAUSE else None
        # Without a fault the job has all the time it needs.
        deadline = time.monotonic() + PATIENCE if job["fault"] else None
        for process in processes:
            if process is not paused:
                process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        hung = [process for process in processes if process is not paused and process.is_alive()]
        for process in [*hung, *([paused] if paused else [])]:
            process.kill()
            process.join()
        return len(hung)

    def _note(self, job: dict[str, Any]) -> None:
        """What the job has done, and what is left of it."""
        number, fresh = len(self.jobs), self._fresh()
        self._seen |= {frozenset(entry.items()) for entry in fresh}
        done = {int(entry["step"]): entry["loss"] for entry in fresh if "loss" in entry}
        for step, loss in done.items():
            self.losses.setdefault(step, []).append((number, loss))
        lost = 0
        if done:
            job |= {"first": min(done), "last": max(done)}
            lost = self._safe - (job["first"] - 1)
            # A step that follows a save is proof that the save was over, and SIGTERM's status that all is saved.
            save = 1 if set(job["codes"]) <= {0, STOPPED} else self.site.scale.save
            self._safe = max(self._safe, (job["last"] - (save > 1)) // save * save)
        whole = {step: folder for step, folder in self._checkpoints().items() if is_whole(folder)}
        newest = max(whole, default=0)
        job |= {"whole": newest, "torn": len(self._checkpoints()) - len(whole)}
        job |= {"lost": max(0, lost, self._safe - newest)}
        job |= dict(zip(("checked", "damaged"), check_bytes(whole[newest]) if whole else (0, 0), strict=True))
        self.jobs.append(job)
        print(self.out.name, number, {key: value for key, value in job.items() if key != "checked"}, flush=True)

    def _fresh(self) -> list[dict[str, float]]:
        """The entries of the log that no job before has written: a restart repeats those of its checkpoint. Each says
        how long its step took, so that a step done again has another entry.
        """
        log = self.out / LOG
        text = log.read_text() if log.exists() else ""
        entries: list[dict[str, float]] = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [entry for entry in entries if frozenset(entry.items()) not in self._seen]

    def _checkpoints(self) -> dict[int, Path]:
        return {int(folder.name.partition("-")[2]): folder for folder in self.out.glob("checkpoint-*")}

    def curve(self) -> dict[int, float]:
        """The losses that the run's own log has in the end."""
        entries = map(json.loads, (self.out / LOG).read_text().splitlines())
        return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint says that it was written to its end."""
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


def check_bytes(folder: Path) -> tuple[int, int]:
    """How many bytes of state a whole checkpoint has, and how many of them are in files that are not what was saved."""
    folder /= (folder / "latest").read_text()
    checked = damaged = 0
    for name, digest in read_json(folder / MANIFEST)["files"].items():
        content = (folder / name).read_bytes()
        checked += len(content)
        damaged += len(content) * (hashlib.sha256(content).hexdigest() != digest)
    return checked, damaged


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight."""
    tensors = {name: tensor.double() for name, tensor in load_file(out / "adapter_model.safetensors").items()}
    return {a: tensors[a.replace("lora_A", "lora_B")] @ tensors[a] for a in tensors if "lora_A" in a}


def compare(run: Run, unbroken: Run) -> dict[str, Any]:
    """How far a run's end is from that of the unbroken one."""
    mine, theirs = ((each.out / "adapter_model.safetensors").read_bytes() for each in (run, unbroken))
    own, wanted = weights_of(run.out), weights_of(unbroken.out)
    apart = sum(float((own[name] - wanted[name]).square().sum()) for name in wanted) ** 0.5
    curve, reference = run.curve(), unbroken.curve()
    return {
        "steps missing": len(reference.keys() - curve.keys()),
        "furthest loss": max(abs(each - reference[step]) for step, done in run.losses.items() for _, each in done),
        "furthest weights": apart / sum(float(w.square().sum()) for w in wanted.values()) ** 0.5,
        "bytes": len(theirs),
        "bytes that differ": sum(a != b for a, b in zip(mine, theirs, strict=True)),
    }


def done_again(run: Run) -> dict[str, Any]:
    """Steps that a fault took and a later job did once more; those of the same ranks and stage have the same loss."""
    again = same = other = 0
    for done in run.losses.values():
        again += len(done) - 1
        for (first, loss), (second, repeated) in itertools.pairwise(done):
            alike = all(run.jobs[first][key] == run.jobs[second][key] for key in ("ranks", "stage"))
            same += alike
            other += alike and loss != repeated
    return {"steps done again": again, "on the same ranks and stage": same, "of these with another loss": other}


def soak(run: Run, chance: Chance | None, ranks: int, stage: int, until: float = math.inf, moves: bool = False) -> None:
    """Trains to the end, with faults until that time if there is a chance; with ``moves`` every second restart is on
    other ranks.
    """
    for number in itertools.count(1):
        due = number <= run.site.scale.faults and time.monotonic() < until
        if run.train(ranks, stage, chance.fault(ranks) if chance and due else None):
            return
        if chance and moves and number % 2 == 0 and run.jobs[-1]["whole"]:
            ranks, stage = chance.move()


def record(run: Run, unbroken: Run | None) -> dict[str, Any]:
    """A run as the results have it."""
    faults = Counter(job["fault"] for job in run.jobs if job["fault"])
    late = faults.pop(LATE, 0)
    found: dict[str, Any] = {
        "name": run.out.name,
        "faults": dict(sorted(faults.items())),
        LATE: late,
        **done_again(run),
        "steps lost": sum(job["lost"] for job in run.jobs),
        "bytes checked": sum(job["checked"] for job in run.jobs),
        "bytes damaged": sum(job["damaged"] for job in run.jobs),
        "ranks hung": sum(job["hung"] for job in run.jobs),
        "seconds": round(sum(job["seconds"] for job in run.jobs)),
    }
    return {
        **found,
        **(compare(run, unbroken) if unbroken else {}),
        "jobs": run.jobs,
        "losses": [*run.curve().values()],
    }


def find_violations(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What a record of :func:`measure` has that must not be."""
    faulty = [run for run in runs if run["faults"]]
    wrong = []
    for run in faulty:
        none = ("steps lost", "steps missing", "bytes damaged", "ranks hung", "of these with another loss")
        limits = dict.fromkeys(none, 0.0)
        if run["name"].startswith(SAME):
            limits |= {"bytes that differ": 0, "furthest loss": 0}
        else:
            limits |= FURTHEST
        wrong += [f"{run['name']}: {run[key]} {key}, not {most}" for key, most in limits.items() if run[key] > most]
    return wrong


def measure(folder: Path, scale: Scale, seed: int) -> Iterator[list[dict[str, Any]]]:
    """The unbroken run, unbroken ones on other ranks, and those under faults, as many as there are by then."""
    reason = hosts.missing()
    kinds = [KILL, POWER, SAVE, STOP, PAUSE] + ([] if reason else [CUT])
    print(f"without cut networks: {reason}" if reason else "hosts with networks of their own", flush=True)
    with ExitStack() as stack:
        site = Site(folder, scale, None if reason else stack.enter_context(hosts.Hosts(max(WORLDS))))
        ranks, stage = WORLDS[0], 2
        unbroken = Run(site, "unbroken")
        soak(unbroken, None, ranks, stage)
        records = [record(unbroken, None)]
        for place in scale.others:
            run = Run(site, f"unbroken, {name_place(*place)}")
            soak(run, None, *place)
            records.append(record(run, unbroken))
        chance, began = Chance(seed, scale, kinds), time.monotonic()
        until = began + 60 * scale.minutes if scale.minutes else math.inf
        for number in itertools.count():
            if number >= 2 and time.monotonic() - began > 60 * 0.85 * scale.minutes:
                return
            run = Run(site, f"{(SAME, MOVED)[number % 2]}, {number // 2 + 1}")
            soak(run, chance, ranks, stage, until, moves=number % 2 == 1)
            records.append(record(run, unbroken))
            yield records


def name_place(ranks: int, stage: int) -> str:
    """So many ranks at a stage, in words."""
    return f"{ranks} rank{'s' * (ranks > 1)} at ZeRO {stage}"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run all and write ``reliability.json``.

    Raises:
        SystemExit: if anything was lost.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and faults; nothing is written")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args(arguments)
    scale = QUICK if options.quick else WHOLE
    facts = provenance(torch.device("cpu"))
    settings = {"seed": options.seed, "r": RANK, "learning rate": LR, "batch": BATCH, "block": BLOCK, **asdict(scale)}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        for runs in measure(Path(folder), scale, options.seed):
            print({key: value for key, value in runs[-1].items() if key not in ("jobs", "losses")}, flush=True)
            if not options.quick:
                content = json.dumps({**facts, "settings": settings, "runs": runs}, indent=1)
                (options.output / "reliability.json").write_text(content + "\n")
    if wrong := find_violations(runs):
        sys.exit("\n".join(wrong))
    return runs


if __name__ == "__main__":
    main()
