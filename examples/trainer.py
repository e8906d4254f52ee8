"""LoFT in the Trainer of transformers.

Run ``python examples/trainer.py``, or
``deepspeed examples/trainer.py --deepspeed ds_configs/zero2.json``.
"""

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainingArguments,
)

from loft_ds import LoFTTrainer

parser = HfArgumentParser(TrainingArguments)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.set_defaults(output_dir="runs/trainer", learning_rate=3e-4, max_steps=60, logging_steps=5, report_to="none")
args, script = parser.parse_args_into_dataclasses()

tokenizer = AutoTokenizer.from_pretrained(script.model)
data = [tokenizer(f"{a} times {b} is {a * b}.") for a in range(2, 13) for b in range(2, 13)]

model = AutoModelForCausalLM.from_pretrained(script.model)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer = LoFTTrainer(
    model=model,
    args=args,
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model()
trainer.save_state()
