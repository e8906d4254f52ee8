"""LoFT in TRL's SFTTrainer: conversations, with a loss on the answers alone.

Run ``python examples/trl_sft.py``, or
``deepspeed examples/trl_sft.py --deepspeed ds_configs/zero2.json``.
"""

from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from loft_ds import LoFTMixin


class LoFTSFTTrainer(LoFTMixin, SFTTrainer):
    """TRL's trainer with LoFT as its optimizer."""


parser = HfArgumentParser(SFTConfig)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.set_defaults(output_dir="runs/trl_sft", learning_rate=3e-4, max_steps=60, logging_steps=5, report_to="none")
args, script = parser.parse_args_into_dataclasses()

# A prompt and its completion: TRL lets only the completion count. Conversations of many turns are a column "messages",
# with assistant_only_loss=True.
data = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"{a} times {b}?"}],
            "completion": [{"role": "assistant", "content": f"It is {a * b}."}],
        }
        for a in range(2, 13)
        for b in range(2, 13)
    ]
)

trainer = LoFTSFTTrainer(
    model=script.model,
    args=args,
    train_dataset=data,
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
trainer.save_state()
