"""LoFT through the hooks of programs that build their trainer themselves: the same training as without them, to a bit.

With the programs' own code, as far as it imports without all that they depend on. Each runs in a process of its own:
``python tests/test_integrations.py swift``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from launch_helpers import ROOT, make_model

PACKAGES = Path(sys.prefix) / "integrations"


@pytest.mark.rehearse
@pytest.mark.parametrize("program", ["axolotl", "llamafactory", "llamafactory.v1", "swift", "swift.pipelines"])
def test_a_program_trains_as_loft_does_without_it(program):
    if not (PACKAGES / program.replace(".", "/")).is_dir():
        pytest.skip(f"{program} is not in {PACKAGES}: pip install --no-deps --target it -r tests/integrations.txt")
    # LLaMA-Factory 0.9.5 would refuse Transformers newer than 5.6.
    environment = os.environ | {"PYTHONPATH": str(PACKAGES), "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1"}
    command = [sys.executable, __file__, program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"optimizer": "LoFTAdamW", "difference": 0.0}


def test_llamafactory_with_an_optimizer_of_its_own_raises(tmp_path):
    import torch
    from test_trainer import Regression, arguments, examples
    from transformers import Trainer

    from loft_ds.integrations.llamafactory import LoFTCallback

    class OwnTrainer(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters())
            return self.optimizer

    trainer = OwnTrainer(Regression(), arguments(tmp_path), train_dataset=examples(), callbacks=[LoFTCallback()])
    with pytest.raises(RuntimeError, match="SGD would train, and not LoFT: leave use_galore"):
        trainer.train()


def axolotl_trainer(**kwargs: Any) -> Any:
    """A Trainer with axolotl's own ``create_optimizer``, and LoFT's plugin registered as its YAML has it registered."""
    import torch
    from axolotl.integrations.base import PluginManager
    from transformers import Trainer

    # By its path: the package around it imports compilers.
    file = PACKAGES / "axolotl" / "core" / "trainers" / "mixins" / "optimizer.py"
    spec = importlib.util.spec_from_file_location("axolotl_optimizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class AxolotlTrainer(module.OptimizerMixin, Trainer):
        """As axolotl's, by its optimizer."""

    trainer = AxolotlTrainer(**kwargs)
    for unset in ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups"):
        setattr(trainer.args, unset, None)  # fields of axolotl's own arguments
    manager = PluginManager.get_instance()
    manager.register("loft_ds.integrations.axolotl.LoFTPlugin")
    with pytest.raises(ValueError, match="LoFT would drop loraplus_lr_ratio, relora: "):
        manager.post_trainer_create({"loraplus_lr_ratio": 16, "relora": True}, trainer)
    manager.post_trainer_create({}, trainer)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters())  # so it is with an optimizer in the DeepSpeed JSON
    with pytest.raises(RuntimeError, match="SGD would train, and not LoFT: "):
        trainer.train()
    trainer.optimizer = None
    return trainer


def swift_trainer(**kwargs: Any) -> Any:
    """A Trainer with ms-swift's own ``create_optimizer``, and LoFT's plugin loaded as ``--external_plugins`` does."""
    from swift.optimizers import optimizers_map
    from swift.trainers.mixin import SwiftMixin
    from swift.utils import import_external_file
    from transformers import Trainer

    class SwiftTrainer(Trainer):
        """As ms-swift's, by its optimizer."""

        create_optimizer = SwiftMixin.create_optimizer
        _disable_foreach_for_deepspeed = SwiftMixin._disable_foreach_for_deepspeed

    plugin = [sys.executable, "-m", "loft_ds.integrations.swift"]
    import_external_file(subprocess.run(plugin, capture_output=True, text=True, check=True).stdout.strip())
    kwargs["args"].max_epochs = None  # a field of ms-swift's own arguments
    trainer = SwiftTrainer(**kwargs)
    trainer.optimizer_callback = optimizers_map["loft"](trainer.args, trainer)
    trainer.args.vit_lr = 1e-4
    with pytest.raises(ValueError, match="LoFT would drop --vit_lr: "):
        trainer.create_optimizer()
    trainer.args.vit_lr = None
    return trainer


def llamafactory_trainer(**kwargs: Any) -> Any:
    """LLaMA-Factory's own Trainer for fine-tuning, with the callback that its ``run_exp`` is handed."""
    # It imports torchaudio, for sounds. The newest, 2.11.1, does not load beside the torch that the tests run with.
    sys.modules["torchaudio"] = importlib.util.module_from_spec(ModuleSpec("torchaudio", None))
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    from loft_ds.integrations.llamafactory import LoFTCallback

    for unset in ("fp8", "generation_config", "predict_with_generate"):
        setattr(kwargs["args"], unset, None)  # fields of LLaMA-Factory's own arguments
    chosen = {"finetuning_args": FinetuningArguments(), "processor": None, "tokenizer": None}
    return CustomSeq2SeqTrainer(callbacks=[LoFTCallback()], **chosen, **kwargs)


def compare_v1() -> dict[str, Any]:
    """How far a whole job of LLaMA-Factory's new trainer ends from LoFT that is built by hand in that trainer."""
    from llamafactory.v1.accelerator.interface import DistributedInterface
    from llamafactory.v1.config import get_args
    from llamafactory.v1.core.data_engine import DataEngine
    from llamafactory.v1.core.model_engine import ModelEngine
    from llamafactory.v1.trainers.sft_trainer import SFTTrainer
    from safetensors.torch import load_file

    from loft_ds import LoFTAdamW
    from loft_ds.integrations import llamafactory

    clip = 0.01

    class ByHand(SFTTrainer):
        """Nothing clips but LoFT."""

        def _init_optimizer(self) -> None:
            self.args.max_grad_norm = math.inf
            self.optimizer = LoFTAdamW(self.model, lr=1e-2, weight_decay=0.1, max_grad_norm=clip)

    with tempfile.TemporaryDirectory() as folder:
        data, yaml = Path(folder, "data.jsonl"), Path(folder, "config.yaml")
        data.write_text("\n".join(json.dumps({"messages": conversation(i)}) for i in range(8)))
        config = {
            "model": str(make_model(Path(folder, "model"))),
            "train_dataset": str(data),
            "peft_config": {"name": "lora", "r": 3, "lora_dropout": 0.0},
            "max_steps": 4,
            "micro_batch_size": 2,
            "batching_workers": 0,
        }
        model_args, data_args, args, _ = get_args({**config, "output_dir": f"{folder}/by hand"})
        DistributedInterface(args.dist_config)
        engine = ModelEngine(model_args, is_train=True)
        trainer = ByHand(args, engine.model, engine.renderer, DataEngine(data_args.train_dataset))
        trainer.fit()
        assert trainer.optimizer.grad_norm > clip
        trainer.save_model()

        chosen = {"optim_config": {"name": "loft", "weight_decay": 0.1}, "learning_rate": 1e-2, "max_grad_norm": clip}
        yaml.write_text(json.dumps({**config, **chosen, "output_dir": f"{folder}/job"}))  # JSON is YAML
        os.environ["USE_V1"], sys.argv[1:] = "1", [str(yaml)]
        llamafactory.main()
        by_hand, job = (load_file(Path(folder, name, "adapter_model.safetensors")) for name in ("by hand", "job"))
    assert all(p.any() for name, p in job.items() if "lora_B" in name)  # zero at the start
    difference = max((by_hand[name] - p).abs().max().item() for name, p in job.items())
    return {"optimizer": type(trainer.optimizer).__name__, "difference": difference}


def compare_sft() -> dict[str, Any]:
    """How far a whole job of ms-swift, and one that goes on after a checkpoint, end from LoFT that is built by hand."""
    from safetensors.torch import load_file
    from swift.optimizers import OptimizerCallback, optimizers_map
    from swift.pipelines import sft_main

    from loft_ds import LoFTAdamW

    clip, built = 0.01, []

    class ByHand(OptimizerCallback):
        """Nothing clips but LoFT."""

        def create_optimizer(self, model: Any = None) -> LoFTAdamW:
            self.trainer.args.max_grad_norm = 0.0
            built.append(
                LoFTAdamW(self.trainer.model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=clip)
            )
            return built[0]

    optimizers_map["by hand"] = ByHand
    plugin = [sys.executable, "-m", "loft_ds.integrations.swift"]
    loft = ["--external_plugins", subprocess.run(plugin, capture_output=True, text=True, check=True).stdout.strip()]
    loft += ["--optimizer", "loft", "--learning_rate", "1e-2"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        pairs = [{"user": f"{i} * {i}", "assistant": f"{i * i}"} for i in range(8)]
        rows = [{"messages": [{"role": who, "content": said} for who, said in pair.items()]} for pair in pairs]
        data.write_text("\n".join(map(json.dumps, rows)))
        flags = ["--model", str(make_model(Path(folder, "model"))), "--model_type", "llama", "--template", "default"]
        flags += ["--dataset", str(data), "--tuner_type", "lora", "--target_modules", "all-linear", "--lora_rank", "3"]
        flags += ["--lora_dropout", "0", "--max_grad_norm", str(clip), "--max_steps", "4", "--save_steps", "2"]
        flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--add_version", "false"]
        flags += ["--dataloader_num_workers", "0"]  # one waits for 5 seconds when it ends
        flags += ["--max_length", "128"]  # a longer row is left out, and the model itself has 64
        flags += ["--use_hf", "true", "--check_model", "false"]  # or it asks the model hub
        jobs = {
            "by hand": ["--optimizer", "by hand"],
            "job": loft,
            "resumed": [*loft, "--resume_from_checkpoint", f"{folder}/job/checkpoint-2"],
        }
        ends = {}
        for name, more in jobs.items():
            sft_main([*flags, *more, "--output_dir", f"{folder}/{name}"])
            ends[name] = load_file(Path(folder, name, "checkpoint-4", "adapter_model.safetensors"))
        with pytest.raises(ValueError, match="LoFT would drop --lorap_lr_ratio: "):
            sft_main([*flags, *loft, "--lorap_lr_ratio", "16", "--output_dir", f"{folder}/LoRA+"])
    assert built[0].grad_norm > clip
    assert all(p.any() for name, p in ends["job"].items() if "lora_B" in name)  # zero at the start
    pairs = [(ends["by hand"][name], ends[job][name]) for job in ("job", "resumed") for name in ends["by hand"]]
    return {"optimizer": type(built[0]).__name__, "difference": max((a - b).abs().max().item() for a, b in pairs)}


def conversation(i: int) -> list[dict[str, Any]]:
    """A sample as LLaMA-Factory's new trainer wants it."""
    said = {"user": f"{i} * {i}", "assistant": f"{i * i}"}
    return [
        {"role": who, "content": [{"type": "text", "value": text}], "loss_weight": float(who == "assistant")}
        for who, text in said.items()
    ]


def compare(program: str) -> dict[str, Any]:
    """How far a program's Trainer ends from LoFTTrainer, and what has trained."""
    import torch
    from models import trained
    from test_trainer import Regression, arguments, examples

    from loft_ds import LoFTTrainer

    ends = {}
    trainers = {"axolotl": axolotl_trainer, "llamafactory": llamafactory_trainer, "swift": swift_trainer}
    kinds = {"loft_ds": LoFTTrainer, program: trainers[program]}
    for name, kind in kinds.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = kind(model=Regression(), args=arguments(folder), train_dataset=examples())
            trainer.train()
        ends[name] = trained(trainer.model)
    difference = max((ends["loft_ds"][name] - p).abs().max().item() for name, p in ends[program].items())
    return {"optimizer": type(trainer.optimizer.optimizer).__name__, "difference": difference}


if __name__ == "__main__":
    whole_jobs = {"llamafactory.v1": compare_v1, "swift.pipelines": compare_sft}
    print(json.dumps(whole_jobs[sys.argv[1]]() if sys.argv[1] in whole_jobs else compare(sys.argv[1])))
