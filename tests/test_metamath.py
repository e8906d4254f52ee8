"""PEFT's comparison gets LoFT as one more optimizer. Its own program needs a GPU, so a smaller one stands in for it."""

import json
import subprocess
import sys

import metamath
import pytest
from peft import PeftConfig

RUN = """
import json, sys
import torch
from utils import get_optimizer_and_scheduler
assert sys.argv[2].split("/")[:2] == ["experiments", "loft"], sys.argv
params = json.load(open(sys.argv[2] + "/training_params.json"))
assert hasattr(torch.optim, params["optimizer_type"])
seen = [get_optimizer_and_scheduler(None, optimizer_type=kind) for kind in ("lora-fa", "AdamW")]
from peft import LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
kwargs = {"max_steps": 20, "lr_scheduler_arg": "cosine", **params["optimizer_kwargs"]}
optimizer, schedule = get_optimizer_and_scheduler(model, optimizer_type=params["optimizer_type"], **kwargs)
rates = [schedule.get_last_lr()[0]]
for _ in range(20):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    rates.append(schedule.get_last_lr()[0])
print(json.dumps({"others": seen, "optimizer": type(optimizer).__name__, "rates": rates, **optimizer.defaults}))
"""
UTILS = """
WARMUP_STEP_RATIO = 0.1
def get_optimizer_and_scheduler(model, *, optimizer_type, **kwargs):
    return optimizer_type
"""
PUBLISHED = {
    "run_info": {
        "created_at": "2026-07-15T05:41:18+00:00",
        "experiment_name": "lora/llama-3.2-3B-rank32",
        "train_config": {"optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 1e-4}},
        "peft_config": {"r": 32},
    },
    "train_info": {
        "train_time": 120.0,
        "accelerator_memory_max": 5_000_000_000,
        "metrics": [{"valid accuracy": 0.3}, {"test accuracy": 0.4, "train loss": 0.6, "forgetting": 0.05}],
    },
}


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "peft" / metamath.FOLDER
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(RUN)
    (folder / "utils.py").write_text(UTILS)
    return tmp_path / "peft"


def test_an_experiment_is_what_pefts_program_reads(tmp_path):
    experiment = metamath.write_experiment(tmp_path, 8, 3e-4)
    config = PeftConfig.from_pretrained(experiment)
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 16, None)
    params = json.loads((experiment / "training_params.json").read_text())
    assert params["grad_norm_clip"] == 0, "it would clip the factors' gradients before LoFT clips"
    assert params["optimizer_kwargs"] == {"lr": 3e-4, "weight_decay": 0.1, "max_grad_norm": 1.0}


def test_loft_is_one_more_optimizer_by_name(checkout):
    experiment = metamath.write_experiment(checkout / metamath.FOLDER, 2, 1e-2)
    command = [sys.executable, metamath.__file__, str(checkout), "--experiment", str(experiment)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["others"] == ["lora-fa", "AdamW"]
    assert found["optimizer"] == "LoFTAdamW"
    assert (found["lr"], found["weight_decay"]) == (1e-2, 0.1)
    assert found["rates"][0] == 0
    assert found["rates"][2] == max(found["rates"]) == 1e-2, "a tenth of the steps is warm-up"
    assert found["rates"][-1] == pytest.approx(0, abs=1e-9)


def test_another_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule is cosine"):
        metamath.build_loft(None, 0.1, max_steps=10, lr_scheduler_arg=None)


def test_what_has_a_result_is_not_trained_again(checkout, capsys):
    folder = checkout / metamath.FOLDER
    for name, accuracy in (("lora/llama-3.2-3B-rank32", 0.4), ("loft/llama-3.2-3B-rank1-lr_0.0001", 0.5), ("oft/x", 1)):
        result = json.loads(json.dumps(PUBLISHED))
        result["run_info"]["experiment_name"] = name
        result["train_info"]["metrics"][-1]["test accuracy"] = accuracy
        (folder / "results").mkdir(exist_ok=True)
        (folder / "results" / f"{name.replace('/', '--')}.json").write_text(json.dumps(result))
    (folder / "run.py").write_text("raise SystemExit('trained again')")
    metamath.main([str(checkout), "--ranks", "1", "--rates", "1e-4"])
    _, _, first, second = capsys.readouterr().out.splitlines()
    assert first.split("|")[1].strip() == "loft/llama-3.2-3B-rank1-lr_0.0001"
    assert [cell.strip() for cell in second.split("|")[1:-1]] == [
        *("lora/llama-3.2-3B-rank32", "AdamW", "0.0001", "32", "0.4", "0.6", "0.05", "2", "5", "2026-07-15")
    ]
    with pytest.raises(subprocess.CalledProcessError):
        metamath.main([str(checkout), "--ranks", "1", "--rates", "2e-4"])


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        metamath.main([str(tmp_path)])
    assert "is no checkout of PEFT" in capsys.readouterr().err
