"""LoFT on a base of 4 bits, in the Trainer. It needs bitsandbytes: pip install 'loft_ds[quantised]'.

Run ``python examples/qlora.py``, or
``deepspeed examples/qlora.py --deepspeed ds_configs/zero2.json``.
"""

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainingArguments,
)

from loft_ds import LoFTTrainer

parser = HfArgumentParser(TrainingArguments)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.set_defaults(output_dir="runs/qlora", learning_rate=3e-4, max_steps=60, logging_steps=5, report_to="none")
args, script = parser.parse_args_into_dataclasses()

tokenizer = AutoTokenizer.from_pretrained(script.model)
data = [tokenizer(f"{a} times {b} is {a * b}.") for a in range(2, 13) for b in range(2, 13)]

four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(script.model, quantization_config=four_bits)
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
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
