"""How memory, traffic and arithmetic of a training step fall with the ranks, measured on ranks that really run.

    python benchmarks/scaling.py --quick                     # two minutes, prints only
    python benchmarks/scaling.py                             # writes results/scaling.{json,md,png}
    deepspeed --num_gpus 4 benchmarks/scaling.py --model Qwen2.5-7B  # on GPUs: one world size, that of the launcher

Without a launcher it spawns the ranks itself, as many as asked for, on however few cores there are. Under one it adds
its world size to those of the same model, settings and device that ``scaling.json`` has already. Of every rank:

- **bytes**, by kind, of the storages that exist between a backward pass and the optimizer's step, each counted once:
  the larger of after a step of ``B`` and after one of ``A``;
- **traffic** of a step: every c10d operator that torch dispatches, with the sizes of its tensors. ``all_to_all`` counts
  what goes to and comes from others; the others are counted as a ring carries them out: ``(N - 1) / N`` of the whole
  for gather, scatter and reduce, twice that for ``all_reduce``;
- **arithmetic**: the matrix products that ``torch.utils.flop_counter`` counts;
- **seconds** of forward, backward and optimizer, medians of steps in which nothing is counted.

Traffic and arithmetic are means of a step of ``B`` and one of ``A``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import numpy
import pandas
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from loft_ds import LoFTAdamW, kernels, plan
from loft_ds.plan import BUILTIN, Job, shapes_of
from loft_ds.plan.division import PERSISTENT, REDUCE_BUCKET, division_of
from provenance import RESULTS, provenance

if get_accelerator().device_name() == "cpu":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a collective of CPUs: it takes a minute to compile

# A Llama whose adapters are large beside it, so that what the optimizer does can be seen on two cores.
TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Setup:
    """One training to measure.

    Attributes:
        stage: of ZeRO.
        batch: sequences of a rank in a step.
        rank: of the adapters, on every linear layer.
        precision: "bf16" or "fp32".
        model: what a config.json says, or a built-in name of loft_ds.plan.
        length: tokens of a sequence.
        steps: those whose time is taken.
        reduce_bucket: DeepSpeed's ``reduce_bucket_size``; its default is for models of billions.
        persistent: DeepSpeed's ``stage3_param_persistence_threshold``: at the default a small model would never be cut.
    """

    stage: int
    batch: int
    rank: int = 16
    precision: str = "bf16"
    model: dict[str, Any] = field(default_factory=lambda: TINY)
    length: int = 32
    steps: int = 4
    reduce_bucket: int = 2**16
    persistent: int = 1000


@dataclass
class Measured:
    """What one rank measured of a :class:`Setup`; bytes, floating-point operations, seconds."""

    memory: dict[str, int]
    sent: dict[str, float]
    received: dict[str, float]
    calls: dict[str, float]
    arithmetic: dict[str, float]
    seconds: dict[str, float]
    tokens_per_second: float


def _bytes_of(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the tensors' storages that are not in ``seen``, and puts them there."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def memory_of(engine: Any, optimizer: LoFTAdamW) -> dict[str, int]:
    """Bytes that this rank has allocated by kind; a storage that is two things is the first of them."""
    wrapper, parameters, layout = engine.optimizer, list(engine.module.parameters()), optimizer.attach()
    assert layout is not None
    states = list(optimizer.state.values())
    sides = [side for stack in optimizer._runtime._stacks for side in stack.sides]

    def weights(trained: bool) -> Iterator[Tensor]:
        for p in parameters:
            if p.requires_grad == trained:
                yield from (p.data, *([p.ds_tensor] if hasattr(p, "ds_tensor") else []))

    def gradients() -> Iterator[Tensor]:
        yield from (p.grad for p in parameters if p.grad is not None)
        for grads in getattr(wrapper, "averaged_gradients", {}).values():
            yield from grads if isinstance(grads, list) else [grads]
        if getattr(wrapper, "grad_partitions_flat_buffer", None) is not None:
            yield wrapper.grad_partitions_flat_buffer

    def state(*kinds: str) -> Iterator[Tensor]:
        """Of pairs what there is, also of those that this rank owns no rows of and saves nothing of."""
        yield from (s[kind] for s in states for kind in kinds if kind.startswith("exp_avg") and kind in s)
        for part in (getattr(side, kind, None) for side in sides for kind in kinds):
            yield from [] if part is None else part if isinstance(part, list) else [part]

    def buckets() -> Iterator[Tensor]:
        for bucket in getattr(wrapper, "ipg_buckets", {}).values():
            held = getattr(bucket, "buffer", None)
            yield from [] if held is None else held if isinstance(held, list) else [held]

    seen: set[int] = set()
    return {
        "base weights": _bytes_of(weights(False), seen),
        "adapters": _bytes_of(weights(True), seen),
        "gradients": _bytes_of(gradients(), seen),
        "masters": _bytes_of((layout.held(p)[0] for p in parameters if p.requires_grad), seen),
        "momentum": _bytes_of(state("momentum", "exp_avg"), seen),
        "second moments": _bytes_of(state("second_moments", "exp_avg_sq"), seen),
        "pending or before": _bytes_of(state("pending", "before"), seen),
        "bases": _bytes_of(state("basis", "weights", "rotation"), seen),
        "kept rows": _bytes_of(getattr(layout, "_kept", {}).values(), seen),
        "reduce buckets": _bytes_of(buckets(), seen),
    }


class Traffic(TorchDispatchMode):
    """Counts the collectives that torch dispatches: calls, and bytes that this rank sends and receives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = defaultdict(int)
        self.sent: dict[str, float] = defaultdict(float)
        self.received: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        others = (world - 1) / world

        def size(argument: Any) -> int:
            if isinstance(argument, Tensor):
                return argument.numel() * argument.element_size()
            return sum(map(size, argument)) if isinstance(argument, list | tuple) else 0

        if name == "alltoall_base_":
            output, sent, _, received_counts, sent_counts = args[:5]
            both = [
                size(t) * (1 - counts[rank] / sum(counts)) if sum(counts) else 0.0
                for t, counts in ((sent, sent_counts), (output, received_counts))
            ]
        elif name.startswith("allreduce"):
            both = [2 * others * size(args[0])] * 2
        elif name.startswith(("allgather", "_allgather")):
            both = [others * size(args[0])] * 2
        elif name.startswith(("reduce_scatter", "_reduce_scatter")):
            both = [others * size(args[1])] * 2
        elif name.startswith(("broadcast", "reduce_")):
            both = [others * size(args[0])] * 2
        elif name in ("barrier", "monitored_barrier_"):
            both = [0.0, 0.0]
        else:
            raise NotImplementedError(f"how many bytes c10d::{name} moves is not known here")
        self.calls[name] += 1
        self.sent[name] += both[0]
        self.received[name] += both[1]


def settings(setup: Setup) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": setup.batch,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": setup.stage,
            "reduce_bucket_size": setup.reduce_bucket,
            "stage3_param_persistence_threshold": setup.persistent,
        },
    }
    if setup.precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def build_model(setup: Setup, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**setup.model)
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    with device if setup.stage < 3 else torch.device("cpu"):  # under stage 3 it may be too large for one device
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    targets: dict[bool, set[str]] = {False: set(), True: set()}
    for path, *_, experts in shapes_of(setup.model).layers:
        targets[experts > 1].add(".".join(path.split(".")[-2:]))
    lora = LoraConfig(
        r=setup.rank, target_modules=targets[False], target_parameters=sorted(targets[True]), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def measure(rank: int, world: int, setup: Setup) -> Measured:
    """Train a few steps on this rank, one of ``world`` in an initialised process group."""
    device = torch.device(get_accelerator().current_device_name())
    gc.collect()  # the setup before
    torch.cuda.empty_cache()
    model = build_model(setup, device)
    optimizer = LoFTAdamW(model, lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(setup))
    generator = torch.Generator().manual_seed(rank)
    vocabulary = setup.model["vocab_size"]

    def timed(phase: str, function: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[phase].append(time.perf_counter() - start)
        return result

    @contextmanager
    def counted(phase: str) -> Iterator[None]:
        # The counter does not see what Triton or C++ do. Plain torch has the same products, one kind of them in place.
        plain = mock.patch.object(kernels, "_implementation", return_value=kernels.tiled)
        in_place = {torch.ops.aten.baddbmm_: lambda _, left, right, **kwargs: 2 * math.prod(left) * right[-1]}
        with plain, traffic, FlopCounterMode(display=False, custom_mapping=in_place) as flops:
            yield
        arithmetic[phase] += flops.get_total_flops() / 2

    def tokens() -> Tensor:
        return torch.randint(vocabulary, (setup.batch, setup.length), generator=generator).to(device)

    seconds: dict[str, list[float]] = defaultdict(list)
    arithmetic: dict[str, float] = defaultdict(float)
    traffic = Traffic()
    for _ in range(2):  # both factors have moved, every state is there
        engine.backward(engine(input_ids=(batch := tokens()), labels=batch).loss)
        engine.step()
    memory: dict[str, int] = {}
    for _ in range(2):
        batch = tokens()
        with counted("forward"):
            loss = engine(input_ids=batch, labels=batch).loss
        with counted("backward"):
            engine.backward(loss)
        memory = {kind: max(size, memory.get(kind, 0)) for kind, size in memory_of(engine, optimizer).items()}
        with counted("optimizer"):
            engine.step()
    for _ in range(setup.steps):
        batch = tokens()
        loss = timed("forward", lambda: engine(input_ids=batch, labels=batch).loss)  # noqa: B023
        timed("backward", lambda: engine.backward(loss))  # noqa: B023
        timed("optimizer", engine.step)
    engine.destroy()
    median = {phase: statistics.median(times) for phase, times in seconds.items()}
    speed = world * setup.batch * setup.length / sum(median.values())
    sent, received, calls = (
        {name: count / 2 for name, count in counts.items()}
        for counts in (traffic.sent, traffic.received, traffic.calls)
    )
    return Measured(memory, sent, received, calls, dict(arithmetic), median, speed)


def _serve(rank: int, world: int, store: str, setups: list[Setup], out: str) -> None:
    """One spawned rank: measures every setup, and writes what it found to a file of its own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, verbose=False, init_method=Path(store).as_uri(), rank=rank, world_size=world
    )
    found = [asdict(measure(rank, world, setup)) for setup in setups]
    (Path(out) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def spawned(world: int, setups: list[Setup]) -> list[list[Measured]]:
    """Each setup on ``world`` processes of this machine: what each rank measured."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        # Ranks are forks of one process that has imported what they need: that takes longer than all they measure.
        multiprocessing.set_forkserver_preload([__name__])
        multiprocessing.start_processes(_serve, (world, store, setups, folder), world, start_method="forkserver")
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    return [[Measured(**rank[place]) for rank in ranks] for place in range(len(setups))]


def law(worlds: Sequence[int], sizes: Sequence[float]) -> tuple[float, float]:
    """``c`` and ``a`` of the ``c * N^-a`` that fits best, by least squares of logarithms."""
    slope, intercept = numpy.polyfit(numpy.log(worlds), numpy.log(sizes), 1)
    return float(numpy.exp(intercept)), float(-slope)


def planned(setup: Setup, world: int) -> dict[str, float]:
    """The exact law: what loft_ds.plan says of the fullest rank, in the columns of :func:`row_of`."""
    shapes = shapes_of(setup.model)
    precision = 2 if setup.precision == "bf16" else 4
    job = Job(setup.rank, world, setup.stage, precision, reduce_bucket=setup.reduce_bucket, persistent=setup.persistent)
    division = division_of(shapes, job)
    return {
        **{f"{kind} kB": float(size.max()) / 1e3 for kind, size in plan.memory(shapes, job, division).items()},
        "all_to_all kB": float(torch.stack([*plan.received(division).values()]).sum(0).max()) / 1e3,
        "optimizer MFLOP": float(plan.arithmetic(division)[0].max()) / 1e6,
    }


NESTED = ["law", "every rank"]  # of a row, what scaling.json alone has
STATE = ("momentum", "second moments", "pending or before")


def row_of(kind: str, world: int, setup: Setup, ranks: list[Measured]) -> dict[str, Any]:
    """One line of the table: the fullest rank's kB and MFLOP, the slowest rank's seconds; and all that it is of."""
    exact, alone = planned(setup, world), planned(replace(setup, stage=0), 1)

    def share(*kinds: str) -> float:
        """The fullest rank's bytes over 1/N of those that one rank alone would have."""
        fullest = max(sum(m.memory[kind] for kind in kinds) for m in ranks)
        return fullest * world / sum(1e3 * alone[f"{kind} kB"] for kind in kinds)

    loft = max(m.received.get("alltoall_base_", 0.0) for m in ranks)
    return {
        "scaling": kind,
        "stage": setup.stage,
        "ranks": world,
        **{f"{name} kB": max(m.memory[name] for m in ranks) / 1e3 for name in ranks[0].memory},
        "state x N / total": share(*STATE),
        "with bases and kept rows": share(*STATE, "bases", "kept rows"),
        "all_to_all kB": loft / 1e3,
        "other received kB": max(sum(m.received.values()) - m.received.get("alltoall_base_", 0.0) for m in ranks) / 1e3,
        "collectives": sum(ranks[0].calls.values()),
        "optimizer MFLOP": max(m.arithmetic["optimizer"] for m in ranks) / 1e6,
        **{f"{phase} s": max(m.seconds[phase] for m in ranks) for phase in ranks[0].seconds},
        "tokens/s": min(m.tokens_per_second for m in ranks),
        "law": exact,
        "every rank": [asdict(m) for m in ranks],
    }


def laws(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured beside planned, of each stage in strong scaling: how far apart, and the powers of N that fit."""
    out = []
    for stage in sorted({row["stage"] for row in rows}):
        own = [row for row in rows if row["scaling"] == "strong" and row["stage"] == stage]
        for column in own[-1]["law"]:
            found, exact = [r[column] for r in own], [r["law"][column] for r in own]
            if not any(found + exact):
                continue
            line = {"stage": stage, "quantity": column, "most ranks": own[-1]["ranks"], "measured": found[-1]}
            apart = max(abs(f - p) / (p or f or 1) for f, p in zip(found, exact, strict=True))
            line |= {"planned": exact[-1], "largest difference": apart}
            if len(own) > 1 and all(found + exact):
                powers = (round(law([r["ranks"] for r in own], sizes)[1], 4) + 0.0 for sizes in (found, exact))
                line |= zip(("measured N^-a", "planned N^-a"), powers, strict=True)
            out.append(line)
    return out


def collectives(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind of collective, the kB that the rank with the most of them sends and receives in strong scaling."""
    out = []
    for row in rows:
        if row["scaling"] == "strong":
            each: dict[str, float] = {}
            for way in ("sent", "received"):
                for name in sorted({name for rank in row["every rank"] for name in rank[way]}):
                    each[f"{name} {way}"] = max(rank[way].get(name, 0.0) for rank in row["every rank"]) / 1e3
            out.append({"stage": row["stage"], "ranks": row["ranks"], **{k: v for k, v in sorted(each.items()) if v}})
    return out


def large(name: str = "Llama-3-405B", rank: int = 64) -> list[dict[str, Any]]:
    """The two shares of :func:`row_of` as planned for a large model."""
    out = []
    for stage in (2, 3):
        for world in (8, 64, 512, 4096):
            line: dict[str, float] = {"stage": stage, "ranks": world}
            found, alone = (planned(Setup(s, 1, rank, model=BUILTIN[name]), n) for s, n in ((stage, world), (0, 1)))
            for title, kinds in (("state", STATE), ("with bases and kept rows", (*STATE, "bases", "kept rows"))):
                of = [sum(sizes[f"{kind} kB"] for kind in kinds) for sizes in (found, alone)]
                line[f"{title}, MB"], line[f"{title} x N / total"] = of[0] / 1e3, of[0] * world / of[1]
            out.append(line)
    return out


def efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens per second over N times those of the fewest ranks measured."""
    out = []
    for row in rows:
        fewest = min((r for r in rows if r["stage"] == row["stage"]), key=lambda r: r["ranks"])
        ideal = fewest["tokens/s"] * row["ranks"] / fewest["ranks"]
        out.append({**row, "efficiency": row["tokens/s"] / ideal})
    return out


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Second moments, arithmetic and traffic over the ranks: dots as measured, lines as planned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = ("second moments kB", "optimizer MFLOP", "all_to_all kB")
    for axes, column in zip(figure.subplots(1, 3), panels, strict=True):
        for stage in sorted({row["stage"] for row in rows}):
            own = [r for r in rows if r["scaling"] == "strong" and r["stage"] == stage]
            (line,) = axes.plot([r["ranks"] for r in own], [r["law"][column] for r in own], "-")
            axes.plot(
                [r["ranks"] for r in own], [r[column] for r in own], "o", color=line.get_color(), label=f"stage {stage}"
            )
        if column != "all_to_all kB":
            axes.loglog()
        worlds = sorted({row["ranks"] for row in rows})
        axes.set_xticks(worlds, worlds)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="ranks", title=f"{column} of a rank")
        axes.legend()
    figure.suptitle("Dots measured, lines planned")
    figure.savefig(path, dpi=110)


def earlier(facts: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same model and settings on the same kind of device."""
    path = folder / "scaling.json"
    found = json.loads(path.read_text()) if path.exists() else {}

    def kind(of: dict[str, Any]) -> tuple[Any, str]:
        return of.get("settings"), of.get("device", "").rpartition(" x ")[2]  # a launcher shows as many as it uses

    return found["rows"] if kind(found) == kind(facts) else []


def write(rows: list[dict[str, Any]], facts: dict[str, Any], folder: Path) -> None:
    """``scaling.json``, ``scaling.md`` and ``scaling.png``."""
    folder.mkdir(exist_ok=True)
    fitted = laws(rows)
    head = json.dumps({**facts, "laws": fitted}, indent=1)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "scaling.json").write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    draw(rows, folder / "scaling.png")

    def table(lines: list[dict[str, Any]], digits: int = 4) -> str:
        frame = pandas.DataFrame(lines).drop(columns=NESTED, errors="ignore").astype(object)
        return str(frame.where(frame.notna(), None).to_markdown(index=False, floatfmt=f".{digits}g"))

    text = [
        "# A training step on more and more ranks",
        "",
        "The fullest rank's bytes, as allocated between a backward pass and the optimizer's step, the largest traffic",
        "and arithmetic of a rank in one step (mean of one of B and one of A), and the slowest rank's seconds.",
        "Strong: as many sequences a step whatever the ranks; weak: as many a rank. All ranks share the device named",
        "below, and CPUs other work with them: **there the seconds of one run say what its phases cost beside each",
        "other, not how they scale.** What every single rank measured is in [scaling.json](scaling.json).",
        "",
        table(rows),
        "",
        "`state x N / total` is the fullest rank's momentum, second moments and pending or before over 1/N of those",
        "that one rank alone has: within 1% of one at stages 1 to 3. `with bases and kept rows` has the (r, r)",
        "matrices of LoFT's arithmetic on both sides, and on one the rows that owners keep so that the next step's",
        "gradients come without them. It is above one because the ranks that share a layer of the model all have its",
        "matrices, two of r^2 float64 numbers a factor: beyond one rank a layer they do not fall; and because one",
        "rank alone keeps no rows. Both are large beside the r (r + 4) / 2 numbers of a row where layers are as",
        "narrow as here. As planned for Llama-3-405B at r = 64:",
        "",
        table(large(), 5),
        "",
        "## Measured and planned",
        "",
        "The exact law is `loft_ds.plan`'s, which divides the rows as the ranks do: of the fullest rank (kB, MFLOP)",
        "on the most ranks, the largest difference at any number of ranks, and the power of N that fits each where",
        "there is no zero, in strong scaling. At stages 1 and 2 gradients do not fall as 1/N: where a parameter is",
        "cut between two ranks, what each keeps of its gradient is a view of the whole, so both keep all of it. (r,",
        "r) matrices fall until each rank has one layer of the model.",
        "",
        table(fitted),
        "",
        "![Second moments, arithmetic and traffic](scaling.png)",
        "",
        "## By collective",
        "",
        "kB of the rank with the most; `alltoall_base_` is LoFT's, the others are DeepSpeed's but for one number.",
        "",
        table(collectives(rows)),
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    (folder / "scaling.md").write_text("\n".join(text) + "\n")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and write; under a launcher that launcher's ranks only, and rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=24, help="sequences of a step in strong scaling, all ranks'")
    parser.add_argument("--per-rank", type=int, default=3, help="sequences of a rank's step in weak scaling")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--model", choices=["tiny", *BUILTIN], default="tiny")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--quick", action="store_true", help="1 and 2 ranks at stages 0 and 3, two steps; print only")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options = parser.parse_args(arguments)
    if options.quick:
        options.worlds, options.stages = [1, 2], [0, 3]

    def setup(stage: int, batch: int) -> Setup:
        model = TINY if options.model == "tiny" else BUILTIN[options.model]
        own = {} if options.model == "tiny" else {"reduce_bucket": REDUCE_BUCKET, "persistent": PERSISTENT}
        steps = 2 if options.quick else 4
        return Setup(stage, batch, options.rank, options.precision, model, options.length, steps, **own)

    def cases(world: int) -> list[tuple[str, Setup]]:
        strong = [("strong", setup(stage, options.batch // world)) for stage in options.stages]
        weak = [("weak", setup(stage, options.per_rank)) for stage in options.stages]
        return strong + (weak if not options.quick else [])

    rows: list[dict[str, Any]] = []
    launched = "WORLD_SIZE" in os.environ
    if not launched and get_accelerator().device_name() != "cpu":
        parser.error("ranks on accelerators are a launcher's: torchrun --nproc_per_node N benchmarks/scaling.py ...")
    worlds = [int(os.environ["WORLD_SIZE"])] if launched else options.worlds
    if any(options.batch % world for world in worlds):
        parser.error(f"--batch {options.batch} is no multiple of each of {worlds} ranks")
    if launched:
        # Before anything is placed: a launcher that shows every GPU to every rank would else put all on the first.
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        deepspeed.init_distributed()
        (world,) = worlds
        for kind, case in cases(world):
            ranks: list[Any] = [None] * world
            dist.all_gather_object(ranks, measure(dist.get_rank(), world, case))
            rows.append(row_of(kind, world, case, ranks))
        if dist.get_rank() != 0:
            return rows
    else:
        for world in worlds:
            chosen = cases(world)
            for (kind, case), ranks in zip(chosen, spawned(world, [case for _, case in chosen]), strict=True):
                rows.append(row_of(kind, world, case, ranks))
    decide = ("model", "rank", "length", "precision", "batch", "per_rank")
    facts = {**provenance(), "settings": {name: getattr(options, name) for name in decide}}
    if launched:  # one world size a run
        new = {(row["scaling"], row["stage"], row["ranks"]) for row in rows}
        rows += [r for r in earlier(facts, options.output) if (r["scaling"], r["stage"], r["ranks"]) not in new]
    rows.sort(key=lambda row: (row["scaling"], row["stage"], row["ranks"]))
    rows = [line for kind in ("strong", "weak") for line in efficiency([r for r in rows if r["scaling"] == kind])]
    print(pandas.DataFrame(rows).drop(columns=NESTED).to_string(index=False))
    if not options.quick:
        write(rows, facts, options.output)
    return rows


if __name__ == "__main__":
    main()
