"""A job that is killed in mid-run and goes on with another number of ranks, through the real launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_helpers import CONFIGS, ROOT, free_port, losses, make_model, write_text

STEPS, SAVE = 40, 5


def command(folder, model, text, ranks, *flags):
    """The main job on so many ranks, with the same four blocks in every step; None for no launcher."""
    launcher = [sys.executable]
    if ranks:
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
        launcher += ["--master_port", str(free_port())]
        flags = (*flags, "--deepspeed", str(CONFIGS / "zero2.json"))
    each = {"per_device_train_batch_size": 4 // (ranks or 1), "max_steps": STEPS, "block_size": 32, "lora_rank": 4}
    words = [word for name, value in each.items() for word in (f"--{name}", str(value))]
    return [
        *launcher,
        *("launch/train.py", "--model_name_or_path", str(model), "--train_file", str(text)),
        *("--output_dir", str(folder), "--learning_rate", "5e-3", "--disable_tqdm", "True", "--report_to", "none"),
        *("--save_strategy", "steps", "--save_steps", str(SAVE), *words, *flags),
    ]


@pytest.mark.rehearse
def test_killed_and_restarted_on_another_number_of_ranks(tmp_path):
    model, text = make_model(tmp_path / "model"), write_text(tmp_path / "text.txt")
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    subprocess.run(command(tmp_path / "whole", model, text, None), check=True, **quiet)

    cut = tmp_path / "cut"
    job = subprocess.Popen(command(cut, model, text, 2), start_new_session=True, **quiet)
    deadline = time.monotonic() + 120
    while not (cut / f"checkpoint-{2 * SAVE}" / "trainer_state.json").exists():
        assert job.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint after two minutes"
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not (cut / "metrics.json").exists(), "the job was over before it was killed"

    again = command(cut, model, text, 1, "--resume_from_checkpoint", "True")
    subprocess.run(again, check=True, **quiet)
    curve, uninterrupted = losses(cut), losses(tmp_path / "whole")
    assert list(curve) == list(uninterrupted) == list(range(1, STEPS + 1))
    # float32; two ranks sum a batch in another order than one does, and 40 steps carry that on.
    assert list(curve.values()) == pytest.approx(list(uninterrupted.values()), rel=1e-3)
    assert uninterrupted[STEPS] < 0.96 * uninterrupted[1], "the curve is flat, so it could not tell"
