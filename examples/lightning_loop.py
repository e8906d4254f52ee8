"""LoFT in Lightning, in one process, with DDP, or on GPUs with its DeepSpeed strategy.

Run ``python examples/lightning_loop.py``, or
``torchrun --nproc_per_node 2 examples/lightning_loop.py --devices 2 --strategy ddp``.
"""

import argparse

from lightning.pytorch import LightningModule, Trainer, seed_everything
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from loft_ds import LoFTAdamW

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--learning_rate", type=float, default=3e-4)
parser.add_argument("--max_steps", type=int, default=60)
parser.add_argument("--output_dir", default="runs/lightning_loop")
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--strategy", default="auto", help="ddp, deepspeed_stage_1, deepspeed_stage_2")
script = parser.parse_args()


class Adapted(LightningModule):
    """A PEFT model that LoFT trains."""

    def __init__(self) -> None:
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(script.model)
        self.model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    def training_step(self, batch, number):
        loss = self.model(**batch).loss
        self.print(f"step {self.global_step + 1} loss {loss.item():.4f}", flush=True)
        return loss

    def configure_optimizers(self):
        # The norm is LoFT's own. Lightning's gradient_clip_val would first clip by that of the factors.
        return LoFTAdamW(self.model, lr=script.learning_rate, max_grad_norm=1.0)

    def on_train_end(self):
        self.trainer.optimizers = []  # Lightning would move LoFT's state to the CPU piece by piece, which raises


seed_everything(0)
tokenizer = AutoTokenizer.from_pretrained(script.model)
data = [tokenizer(f"{a} times {b} is {a * b}.") for a in range(2, 13) for b in range(2, 13)]
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=collator)

module = Adapted()
where = {"accelerator": script.accelerator, "devices": script.devices, "strategy": script.strategy}
trainer = Trainer(max_steps=script.max_steps, enable_checkpointing=False, logger=False, **where)
trainer.fit(module.train(), loader)
if trainer.is_global_zero:
    module.model.save_pretrained(script.output_dir)
