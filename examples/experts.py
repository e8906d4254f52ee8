"""LoFT on the experts of a mixture, which transformers keeps in one parameter of three dimensions.

Run ``python examples/experts.py --model Qwen/Qwen1.5-MoE-A2.7B``, or
``deepspeed examples/experts.py --deepspeed ds_configs/zero3.json``.
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
parser.add_argument("--model", default="Qwen/Qwen1.5-MoE-A2.7B")
parser.set_defaults(output_dir="runs/experts", learning_rate=3e-4, max_steps=60, logging_steps=5, report_to="none")
args, script = parser.parse_args_into_dataclasses()

tokenizer = AutoTokenizer.from_pretrained(script.model)
data = [tokenizer(f"{a} times {b} is {a * b}.") for a in range(2, 13) for b in range(2, 13)]

model = AutoModelForCausalLM.from_pretrained(script.model)
# Each expert is a pair of its own, of this rank.
lora = LoraConfig(
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, lora)
trainer = LoFTTrainer(
    model=model,
    args=args,
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model()
trainer.save_state()
