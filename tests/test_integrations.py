"""LoFT through the hooks of programs that build their Trainer themselves: the same training as LoFTTrainer's, to a bit.

With the programs' own code, as far as it imports without all that they depend on. Each runs in a process of its own:
``python tests/test_integrations.py swift``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from launch_helpers import ROOT

PACKAGES = Path(sys.prefix) / "integrations"


@pytest.mark.parametrize("program", ["axolotl", "swift"])
def test_a_program_trains_as_lofttrainer_does(program):
    if not (PACKAGES / program).is_dir():
        pytest.skip(f"{program} is not in {PACKAGES}: pip install --no-deps --target it -r tests/integrations.txt")
    environment = os.environ | {"PYTHONPATH": str(PACKAGES)}
    command = [sys.executable, __file__, program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"optimizer": "LoFTAdamW", "difference": 0.0}


def axolotl_trainer(**kwargs: Any) -> Any:
    """A Trainer with axolotl's own ``create_optimizer``, and LoFT's plugin registered as its YAML has it registered."""
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
    manager.post_trainer_create(None, trainer)
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
    return trainer


def compare(program: str) -> dict[str, Any]:
    """How far a program's Trainer ends from LoFTTrainer, and what has trained."""
    import torch
    from models import trained
    from test_trainer import Regression, arguments, examples

    from loft_ds import LoFTTrainer

    ends = {}
    kinds = {"loft_ds": LoFTTrainer, program: {"axolotl": axolotl_trainer, "swift": swift_trainer}[program]}
    for name, kind in kinds.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = kind(model=Regression(), args=arguments(folder), train_dataset=examples())
            trainer.train()
        ends[name] = trained(trainer.model)
    difference = max((ends["loft_ds"][name] - p).abs().max().item() for name, p in ends[program].items())
    return {"optimizer": type(trainer.optimizer.optimizer).__name__, "difference": difference}


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1])))
