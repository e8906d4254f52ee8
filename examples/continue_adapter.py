"""A second stage: goes on with an adapter that LoFT, or anybody else, has written. ZeRO 3 shards the base.

After ``python examples/trainer.py``, run
``deepspeed examples/continue_adapter.py --adapter runs/trainer --deepspeed ds_configs/zero3.json``.
"""

import deepspeed
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainingArguments,
)

from loft_ds import LoFTTrainer

parser = HfArgumentParser(TrainingArguments)
parser.add_argument("--adapter", default="runs/trainer")
parser.set_defaults(output_dir="runs/continued", learning_rate=1e-4, max_steps=60, logging_steps=5, report_to="none")
args, script = parser.parse_args_into_dataclasses()
if args.deepspeed:
    deepspeed.init_distributed()  # else, on CPUs, the base would be loaded as by one process

base = PeftConfig.from_pretrained(script.adapter).base_model_name_or_path
tokenizer = AutoTokenizer.from_pretrained(base)
data = [tokenizer(f"{a} plus {b} is {a + b}.") for a in range(2, 13) for b in range(2, 13)]

# Moments begin anew. To go on with the same stage and its moments: trainer.train(resume_from_checkpoint=True).
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, script.adapter, is_trainable=True)
trainer = LoFTTrainer(
    model=model,
    args=args,
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model()
trainer.save_state()
