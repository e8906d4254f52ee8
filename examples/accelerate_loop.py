"""LoFT in a loop of your own on Accelerate.

Run ``python examples/accelerate_loop.py``, or
``accelerate launch --use_deepspeed --zero_stage 2 examples/accelerate_loop.py``.
"""

import argparse

from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, set_seed

from loft_ds import LoFTAdamW, export_adapter

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--learning_rate", type=float, default=3e-4)
parser.add_argument("--max_steps", type=int, default=60)
parser.add_argument("--output_dir", default="runs/accelerate_loop")
script = parser.parse_args()

# With a DeepSpeed JSON say "gradient_accumulation_steps": "auto" there: Accelerate takes a silent one for 1.
accelerator = Accelerator(gradient_accumulation_steps=2)
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(script.model)
data = [tokenizer(f"{a} times {b} is {a * b}.") for a in range(2, 13) for b in range(2, 13)]
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collator)

model = AutoModelForCausalLM.from_pretrained(script.model)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
# The norm is LoFT's own, so it is said here. accelerator.clip_grad_norm_ would first clip by that of the factors.
optimizer = LoFTAdamW(model, lr=script.learning_rate, max_grad_norm=1.0)
engine, prepared, loader = accelerator.prepare(model, optimizer, loader)

step, total = 0, 0.0
while step < script.max_steps:
    for batch in loader:
        with accelerator.accumulate(engine):
            loss = engine(**batch).loss
            accelerator.backward(loss)
            prepared.step()
            prepared.zero_grad()
        total += loss.item() / accelerator.gradient_accumulation_steps
        if not accelerator.sync_gradients:
            continue
        step += 1
        accelerator.print(f"step {step} loss {total:.4f} norm {optimizer.grad_norm:.4f}", flush=True)
        total = 0.0
        if step == script.max_steps:
            break

under_deepspeed = accelerator.distributed_type == "DEEPSPEED"
export_adapter(engine if under_deepspeed else optimizer, script.output_dir)
accelerator.end_training()
