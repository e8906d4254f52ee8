"""Breaks loft_ds on purpose, one line at a time, and shows that a test notices each.

    python tests/mutations.py                    # all; ends with 1 if one survives
    python tests/mutations.py checkpoint exchange  # those of files with such a word in their path

Each break is made in a copy of the repository, in a process of its own. What is imported there is forked from this one,
which has everything but loft_ds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = (
    "loft_ds",
    "tests",
    "launch",
    "benchmarks",
    "ds_configs",
    "examples",
    "docs",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
)
LIMIT = 300  # seconds; ranks that wait for each other are given up after 60


@dataclass(frozen=True)
class Break:
    """A deliberate mistake.

    Attributes:
        file: of loft_ds.
        old: what stands there, once.
        new: what stands there instead.
        tests: pytest's arguments: the tests of which one is to fail.
    """

    file: str
    old: str
    new: str
    tests: str


BREAKS = [
    # The arithmetic.
    Break(
        "algebra.py",
        "left.double().mT @ right.double()",
        "(left.mT @ right).double()",
        "test_full_rank.py test_reference.py",
    ),
    Break("algebra.py", "ratio = beta1**2 / beta2 if", "ratio = beta1 / beta2 if", "test_algebra.py"),
    Break("algebra.py", "rotation.mT @ weights @ rotation", "rotation @ weights @ rotation.mT", "test_algebra.py"),
    Break(
        "algebra.py",
        "torch.maximum(squares, floor).pow(0.25)",
        "torch.maximum(squares, floor).sqrt()",
        "test_algebra.py",
    ),
    Break("algebra.py", "part.clamp_min(LEAST_WEIGHT * (1 - beta2))", "part", "test_algebra.py"),
    Break("algebra.py", "param.mul_(1 - lr * weight_decay)", "param.mul_(1 - weight_decay)", "test_optimizer.py"),
    Break(
        "step.py",
        "outside = step - torch.bmm(follow.rows.double(), inside @ inner).to(step)",
        "outside = step.clone()",
        "test_reference.py",
    ),
    Break("step.py", "move(follow, outside.mul_(shorter))", "move(follow, outside)", "test_step_length.py"),
    Break(
        "step.py",
        "    x.momentum = torch.bmm(x.momentum, of_momentum.to(x.momentum))\n",
        "",
        "test_reference.py",
    ),
    Break(
        "step.py",
        "    x.pending = [torch.bmm(gradient, of_second_moment.to(gradient)) for gradient in x.pending]\n",
        "",
        "test_reference.py",
    ),
    Break("step.py", "decay=lead.lr * lead.group", "decay=lead.group", "test_full_rank.py"),
    Break("runtime.py", "if not any(counts) and", "if False and", "test_edges_engine.py -k another_adapter"),
    Break("runtime.py", "if (of_a > 0) != (of_b > 0):", "if False:", "test_edges_engine.py -k frozen_by_half"),
    Break("runtime.py", "if layout.repeats_gradients and", "if False and", "test_edges_engine.py -k old_gradient"),
    Break("runtime.py", "not of_a and a in self._partook", "not of_a", "test_edges_engine.py -k old_gradient"),
    Break("runtime.py", "own - twice", "own + twice", "test_reference.py test_optimizer.py"),
    Break("runtime.py", "(norm + 1e-6)).clamp(max=1.0)", "(norm + 1e-6))", "test_reference.py test_optimizer.py"),
    Break(
        "runtime.py",
        "                stack.step = step\n            raise",
        "                pass\n            raise",
        "test_optimizer.py test_stacks.py",
    ),
    Break("runtime.py", "inner / sharers**0.5 if sharers > 1", "inner if sharers > 1", "test_sharded.py -k clipping"),
    Break(
        "runtime.py",
        "[f for lead in leads for f in (lead, lead.partner)] if self.blocks.balancing else leads + follows",
        "leads + follows",
        "test_sharded.py -k 'from_pefts_zero or (equals_one_process and alternate)'",
    ),
    Break("pairs.py", "(self.B, self.A) if self.step % 2", "(self.A, self.B) if self.step % 2", "test_reference.py"),
    Break(
        "pairs.py",
        "return cls(a, b, stacks[0].joint, stacks[0].step)",
        "return cls(a, b, stacks[0].joint, 0)",
        "test_stacks.py",
    ),
    Break(
        "pairs.py",
        'if state["start"] != rows.start or',
        "if",
        "test_optimizer.py test_edges_optimizer.py test_exchange.py",
    ),
    Break("blocks.py", "rank <= JOINT_RANK", "rank < JOINT_RANK", "test_optimizer.py test_reference.py"),
    Break("blocks.py", 'cls(turns="alternate", bias_calibration=False', 'cls(turns="alternate"', "test_optimizer.py"),
    Break(
        "factors.py",
        "(self.rank, self.experts)).movedim(2, 0)",
        "(self.experts, self.rank)).movedim(1, 0)",
        "test_experts.py",
    ),
    Break("reference.py", "own @ torch.linalg.pinv(own)  #", "own @ own.T  #", "test_reference.py"),
    Break("optimizer.py", "if given != wanted:", "if not given:", "test_optimizer.py"),
    Break(
        "optimizer.py",
        'variant["joint_rank"] = JOINT_RANK',
        'variant["joint_rank"] = 0',
        "test_checkpoint.py -k another_rule",
    ),
    Break(
        "state_dict.py",
        "        raise TypeError(\n            f\"LoFT's state is made",
        "        str(\n            f\"LoFT's state is made",
        "test_optimizer.py -k assigned",
    ),
    Break(
        "optimizer.py", "if not isinstance(model, nn.Module):", "if False:", "test_edges_engine.py -k deepspeed_builds"
    ),
    Break("state_dict.py", "if strange or any(", "if strange and any(", "test_optimizer.py test_edges_optimizer.py"),
    Break("adapters.py", "if rank > min(m, n):", "if rank > max(m, n):", "test_factors.py"),
    # The kernels.
    Break("kernels/tiled.py", "weights = 2 - (i == j).to(basis.dtype)", "weights = 0 * i + 1", "test_kernels.py"),
    Break("kernels/tiled.py", "beta2 if pending is None else beta2**2", "beta2", "test_kernels.py"),
    Break("kernels/storage.py", "(bits + (noise & 0xFFFF))", "(bits + 0x8000)", "test_kernels.py"),
    Break("kernels/stream.py", "            lane.compute.wait_event(chunk.loaded)\n", "", "test_stream.py"),
    Break(
        "kernels/stream.py",
        "most = CHUNK_BYTES // max(1, size * row_bytes)",
        "most = count",
        "test_stream.py test_kernels.py",
    ),
    Break(
        "kernels/fused.py",
        "tl.where(s == t, 1.0, 2.0)",
        "tl.where(s == t, 1.0, 1.0)",
        "test_kernels_fused.py -k projected_update",
    ),
    Break(
        "kernels/fused.py",
        "full += pending_weight *",
        "full += gradient_weight *",
        "test_kernels_fused.py -k accumulate",
    ),
    # Who holds what, and what travels.
    Break(
        "sharding/exchange.py",
        "(lines + unit * owned.edges[:-1]).clamp(min=begin)",
        "(lines + unit * owned.edges[:-1])",
        "test_exchange.py",
    ),
    Break(
        "sharding/exchange.py",
        "needing if p.owned.whole is None else needing[needing != p.owned.whole]",
        "needing",
        "test_exchange.py",
    ),
    Break(
        "sharding/exchange.py",
        "weights = [sum(f.numel * (f.rank + 5) for f in block)",
        "weights = [sum(f.count for f in block)",
        "test_exchange.py",
    ),
    Break(
        "sharding/layout.py", "if rows.data_ptr() != target.data_ptr():", "if not rows.numel():", "test_optimizer.py"
    ),
    Break(
        "sharding/layout.py",
        "if master.grad is None and partner.grad is None:",
        "if master.grad is None:",
        "test_optimizer.py test_edges_model.py",
    ),
    Break(
        "sharding/sharded.py",
        "return not bool(self.all_reduce(changed.ne(0).any().float()))",
        "return self._kept_for is not None",
        "test_sharded.py -k masters_that_another",
    ),
    Break(
        "sharding/sharded.py",
        "        if last is not None:\n            yield last()\n        last = wait",
        "        yield wait()",
        "test_sharded.py -k one_ahead",
    ),
    Break(
        "sharding/sharded.py",
        "        self._publish()\n        self._arrived",
        "        self._arrived",
        "test_sharded.py -k 'two_groups and (offload_3 or published)'",
    ),
    # DeepSpeed.
    Break("zero/attachment.py", "elif self._clipping.said:", "elif not self._clipping:", "test_loud.py -k clipping"),
    Break(
        "zero/clipping.py",
        "            wrapper.clip_grad = 0.0\n",
        "            pass\n",
        "test_sharded.py -k 'clipping and one_group'",
    ),
    Break("zero/engine.py", "if row is not None and any(", "if row is None and any(", "test_loud.py -k swapped"),
    Break(
        "zero/stages.py",
        "            whole[0].all_gather(whole)\n",
        "            pass\n",
        "test_sharded.py -k masters_that",
    ),
    Break("zero/stages.py", "wrapper.invalidate_secondary_tensor()", "pass", "test_edges_engine.py -k copies_within"),
    Break("zero/stages.py", "if left_out := [", "if False and [", "test_edges_engine.py -k another_adapter"),
    Break("zero/engine.py", "if gc.get_freeze_count() and", "if False and", "test_edges_engine.py -k gc_has_frozen"),
    Break("zero/attachment.py", "p.dtype.itemsize == 2", "p.dtype.itemsize == 3", "test_edges_optimizer.py -k 16_bits"),
    Break(
        "zero/attachment.py",
        "            self._arrivals[number] += 1\n",
        "            pass\n",
        "test_sharded.py -k loss",
    ),
    Break(
        "zero/unsupported.py",
        '_master_weights_and_grads") is True',
        '_master_weights_and_grads") is None',
        "test_unsupported.py",
    ),
    Break(
        "zero/unsupported.py",
        "bool(config.bfloat16_config.bf16_master_weights_and_grads) or",
        "False or",
        "test_unsupported.py",
    ),
    Break(
        "zero/stages.py",
        "parts[rank].data.copy_(flat.data)",
        "pass",
        "test_sharded.py -k 'two_groups and (offload_2 or published or joint_2)'",
    ),
    Break("zero/config.py", "_MISTYPED = 0.8", "_MISTYPED = 2.0", "test_launch.py -k bad_setting"),
    Break(
        "zero/unsupported.py", "return engine.zenflow_config() is not None", "return False", "test_loud.py -k ZenFlow"
    ),
    Break("zero/offload.py", "ours = {Kind.optim_states} | ", "ours = set() | ", "test_edges_engine.py"),
    # What is on the disk.
    Break(
        "checkpoint/files.py",
        "    source.rename(target)\n",
        "    (shutil.copytree if source.is_dir() else shutil.move)(source, target)\n",
        "test_checkpoint.py -k any_moment",
    ),
    Break(
        "checkpoint/files.py",
        "            target.rename(aside(target))\n",
        "            shutil.rmtree(target)\n",
        "test_checkpoint.py -k any_moment",
    ),
    Break(
        "checkpoint/save.py",
        '            replace(beside, final)\n            write_text(directory / "latest.partial", tag)\n'
        '            replace(directory / "latest.partial", directory / "latest")\n',
        '            write_text(directory / "latest.partial", tag)\n'
        '            replace(directory / "latest.partial", directory / "latest")\n            replace(beside, final)\n',
        "test_checkpoint.py -k any_moment",
    ),
    Break(
        "checkpoint/save.py",
        "if buffers := _buffers(optimizer.model):",
        "if buffers := {}:",
        "test_checkpoint.py -k 'buffers'",
    ),
    Break("checkpoint/save.py", ")) > 1:", ")) > 9:", "test_edges_engine.py -k different_tags"),
    Break("checkpoint/load.py", "if digest(file) != expected:", "if not expected:", "test_checkpoint.py -k 'damage'"),
    Break(
        "checkpoint/load.py",
        "        group.update({key:",
        "        dict(group).update({key:",
        "test_checkpoint.py test_optimizer.py test_trainer.py test_edges_trainer.py",
    ),
    Break("checkpoint/load.py", "    layout.refresh()\n", "", "test_checkpoint.py -k 'bitwise and bf16'"),
    Break(
        "checkpoint/manifest.py",
        'if manifest["variant"].get(key) != value:',
        "if key is None:",
        "test_checkpoint.py -k 'strangers or another_rule'",
    ),
    Break(
        "checkpoint/engine.py",
        "        setattr(engine, key, value)\n",
        "        pass\n",
        "test_checkpoint.py -k 'bitwise and 2-fp32'",
    ),
    Break("ranks.py", "Error(messages[0])", 'Error("")', "test_checkpoint.py -k every_rank"),
    Break(
        "export.py", "        engine.empty_partition_cache()  #", "        pass  #", "test_trainer.py -k right_after"
    ),
    Break("export.py", "holders[id(p)] > 1", "holders[id(p)] > 2", "test_edges_model.py test_checkpoint.py"),
    # The Trainer, quantised bases, the plan, the doctor.
    Break(
        "hf.py",
        "    except (OSError, ValueError):\n        return False",
        "    except (OSError, ValueError):\n        return True",
        "test_trainer.py -k 'ordinary_resume_is_bitwise and None'",
    ),
    Break("hf.py", 'not in decayed], "weight_decay": 0.0}', "not in decayed]}", "test_trainer.py -k by_hand"),
    Break(
        "hf.py",
        "control.should_save = control.should_training_stop = True",
        "control.should_training_stop = True",
        "test_trainer.py -k sigterm",
    ),
    Break(
        "quantised.py", "is_traceable_wrapper_subclass(p))", "p is None)", "test_quantised.py -k 'refused and under'"
    ),
    Break(
        "hf.py", '"weight_decay": args.weight_decay', '"weight_decay": 0.0', "test_trainer.py -k 'not under_deepspeed'"
    ),
    Break(
        "hf.py",
        "self._said, args.max_grad_norm = args.max_grad_norm, 0.0",
        "self._said = args.max_grad_norm",
        "test_trainer_ways.py",
    ),
    Break("hf.py", "_check_search(self, self.loft_kwargs)", "pass", "test_trainer_ways.py -k search"),
    Break("optimizer.py", "RUNNING = 6 ", "RUNNING = 600 ", "test_accelerate.py"),
    Break(
        "step.py",
        "precision if t > EXACT_STEPS else",
        "precision if t > 0 else",
        "test_optimizer.py -k full_precision",
    ),
    Break("kernels/compiled.py", "1 - beta2,\n", "1 - beta2**2,\n", "test_kernels.py -k test_accumulate"),
    Break("kernels/compiled.cpp", "t + 1 < count ? load", "t + 2 < count ? load", "test_kernels.py -k less_precise"),
    Break(
        "kernels/compiled.cpp", "std::min(row + i, last - 1)", "std::min(row + i, last - 2)", "test_kernels.py -k cut"
    ),
    Break("kernels/compiled.cpp", "larger(low, sums[i][j] * w)", "sums[i][j] * w", "test_kernels.py -k test_bound"),
    Break("kernels/compiled.cpp", "bits + (noise & 0xFFFF)", "bits", "test_kernels.py -k bits"),
    Break(
        "optimizer.py",
        '"denominator_precision": self.denominator_precision,',
        "",
        "test_edges_optimizer.py -k all_settings",
    ),
    Break("optimizer.py", "min(odd, even) > self.MOVED", "max(ours) > min(ours)", "test_accelerate.py -k stands_still"),
    Break("hf.py", "trainer.args = copy.copy(trainer.args)", "pass", "test_trainer_ways.py -k fails"),
    Break(
        "start.py", "following = slice(min(r, most - r), min(2 * r, most))", "following = slice(0, r)", "test_start.py"
    ),
    Break("start.py", "dist.broadcast(factor.param.data, 0)", "pass", "test_start.py -k alike"),
    Break("start.py", "gradient.T if a.layer.fan_in_fan_out else gradient", "gradient", "test_start.py -k round"),
    Break("hf.py", "self.state.global_step < self.state.max_steps", "True", "test_trainer.py -k finished_run"),
    Break("hf.py", "launched > args.world_size == 1", "False", "test_edges_trainer.py -k alone"),
    Break("hf.py", "with together():  # next", "if True:  # next", "test_trainer.py -k whole_once"),
    Break(
        "pairs.py", ".mT.clone(memory_format=torch.contiguous_format)", ".mT.contiguous()", "test_stacks.py -k launches"
    ),
    Break("training/faults.py", "    timer.start()\n", "", "test_faults.py -k do_not_meet"),
    Break(
        "training/train.py",
        "if parsed.dataloader_drop_last and",
        "if False and",
        "test_launch.py -k nothing_to_evaluate",
    ),
    Break(
        "kernels/compiled.cpp",
        "smaller(broadcast(FLT_MAX), larger(broadcast(FLT_MIN), x))",
        "larger(broadcast(FLT_MIN), x)",
        "test_kernels.py -k overflows",
    ),
    Break("kernels/compiled.cpp", "again ? from[a * l + l - 1] : 0.0f", "0.0f", "test_kernels.py -k overflows"),
    Break("quantised.py", "layer.support_avx512bf16_for_cpu = False", "pass", "test_optimizer.py -k packed"),
    Break(
        "plan/memory.py",
        "FLOAT * (2 * sum(sides) + max(sides))",
        "FLOAT * 2 * sum(sides)",
        "test_plan.py -k as_large_as",
    ),
    Break("plan/traffic.py", "2 * (n - 1) / n)", "(n - 1) / n)", "test_plan.py -k 'measure and 3-2-bf16-False'"),
    Break("plan/division.py", "(4 if self.joint else 5)", "5", "test_plan.py -k as_large_as"),
    Break("doctor/checks.py", "needed > USABLE * has", "needed > has", "test_doctor.py -k memory_is"),
    Break(
        "doctor/findings.py",
        'return Finding(check, "; ".join([usual, *differing]), not others)',
        "return Finding(check, usual, not others)",
        "test_doctor.py -k two_kinds",
    ),
    Break(
        "doctor/meeting.py",
        '20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000',
        "20000",
        "test_doctor.py -k where_to_meet",
    ),
    Break("kernels/reference.py", "correction2.sqrt().unsqueeze", "correction2.unsqueeze", "test_kernels.py"),
    Break(
        "doctor/facts.py",
        "(Path(options.output_dir))).free",
        "(Path(options.output_dir))).total",
        "test_doctor.py -k illness",
    ),
    Break("doctor/job.py", "given[1] * given[2] * world", "given[1] * given[2]", "test_doctor.py -k batch_size"),
    Break("doctor/step.py", "if not value <= TOLERANCE", "if value < 0", "test_doctor.py -k learning_rate"),
    Break("doctor/command.py", "return int(any(", "return int(all(", "test_doctor.py -k illness"),
    Break(
        "plan/base.py",
        "BLOCK, BLOCK_OF_SCALES = 64, 256",
        "BLOCK, BLOCK_OF_SCALES = 128, 256",
        "test_plan.py -k smaller",
    ),
    Break("plan/traffic.py", "bytes_ * (1 + again)", "elements * (1 + again)", "test_plan.py -k travels_as_bytes"),
    Break("plan/base.py", "-(-layer.numel // 2) if", "layer.numel if", "test_plan.py -k quantised_base_is_smaller"),
    Break("plan/plan.py", "(6 * weights", "(2 * weights", "test_plan.py -k seconds_of"),
    Break("plan/shapes.py", 'if kind == "qwen2"', 'if kind == "qwen"', "test_plan.py -k builtin"),
    Break("plan/__main__.py", '3 if "param" in offload', '2 if "param" in offload', "test_plan.py -k mistakes"),
]


def run_tests(folder: Path, tests: list[str]) -> None:
    """In a process of its own: ends with pytest's status."""
    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)  # for processes that it starts
    with (folder / "output").open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        import pytest

        sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def fate(mistake: Break) -> tuple[str, str]:
    """What becomes of a mistake, and what pytest last said."""
    with tempfile.TemporaryDirectory(prefix="loft-break-") as name:
        folder = Path(name)
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile
            copy(ROOT / part, folder / part)
        file = folder / "loft_ds" / mistake.file
        text = file.read_text()
        assert text.count(mistake.old) == 1, f"{mistake.file}: {text.count(mistake.old)} times {mistake.old!r}"
        file.write_text(text.replace(mistake.old, mistake.new))
        words = shlex.split(mistake.tests)
        tests = [f"tests/{word}" if word.endswith(".py") else word for word in words]
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests))
        process.start()
        process.join(LIMIT)
        ended = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        said = [line for line in (folder / "output").read_text().splitlines() if line]
        last = next((line for line in said if line.startswith(("FAILED", "ERROR"))), said[-1] if said else "")
        return {1: "caught", 0: "SURVIVES", None: "caught by the time-out"}.get(ended, f"ERROR {ended}"), last[:150]


def main(words: list[str]) -> int:
    chosen = [mistake for mistake in BREAKS if not words or any(word in mistake.file for word in words)]
    import_everything()
    left = 0
    for mistake in chosen:
        since = time.monotonic()
        verdict, said = fate(mistake)
        left += not verdict.startswith("caught")
        first = mistake.new.strip().splitlines()[:1] or ["(left out)"]
        print(
            f"{verdict:9} {time.monotonic() - since:5.0f} s  {mistake.file}: {first[0][:60]}\n{'':20}{said}", flush=True
        )
    print(f"{len(chosen) - left} of {len(chosen)} breaks are caught, over {len({m.file for m in chosen})} files")
    return int(left > 0)


def import_everything() -> None:
    """All that the tests import and that is not mutated, as tests/conftest.py would have it."""
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    os.environ.update(HF_HUB_OFFLINE="1")
    import deepspeed
    import peft
    import pytest
    import torch
    import transformers

    torch.set_num_threads(1)
    assert "loft_ds" not in sys.modules, (deepspeed, peft, pytest, transformers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
