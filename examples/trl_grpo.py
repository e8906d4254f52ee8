"""LoFT in TRL's GRPOTrainer, with a reward that is a function.

Run ``python examples/trl_grpo.py``, or
``deepspeed examples/trl_grpo.py --deepspeed ds_configs/zero2.json``.
"""

from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from loft_ds import LoFTMixin


class LoFTGRPOTrainer(LoFTMixin, GRPOTrainer):
    """TRL's trainer with LoFT as its optimizer."""


def reward_digits(completions, **kwargs):
    """The share of an answer that is digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in texts]


parser = HfArgumentParser(GRPOConfig)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.set_defaults(output_dir="runs/trl_grpo", learning_rate=1e-4, max_steps=60, logging_steps=5, report_to="none")
parser.set_defaults(max_completion_length=16)
args, script = parser.parse_args_into_dataclasses()

data = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"{a} times {b}?"}]} for a in range(2, 13) for b in range(2, 13)]
)

trainer = LoFTGRPOTrainer(
    model=script.model,
    reward_funcs=reward_digits,
    args=args,
    train_dataset=data,
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
trainer.save_state()
