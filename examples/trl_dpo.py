"""LoFT in TRL's DPOTrainer. The reference is the model without its adapter.

Run ``python examples/trl_dpo.py``, or
``deepspeed examples/trl_dpo.py --deepspeed ds_configs/zero2.json``.
"""

from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from loft_ds import LoFTMixin


class LoFTDPOTrainer(LoFTMixin, DPOTrainer):
    """TRL's trainer with LoFT as its optimizer."""


parser = HfArgumentParser(DPOConfig)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.set_defaults(output_dir="runs/trl_dpo", learning_rate=1e-4, max_steps=60, logging_steps=5, report_to="none")
args, script = parser.parse_args_into_dataclasses()

data = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"{a} times {b}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {a * b}."}],
            "rejected": [{"role": "assistant", "content": f"It is {a + b}."}],
        }
        for a in range(3, 13)
        for b in range(3, 13)
    ]
)

trainer = LoFTDPOTrainer(
    model=script.model,
    args=args,
    train_dataset=data,
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
trainer.save_state()
