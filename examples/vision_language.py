"""LoFT on a model that sees: pictures and questions in the Trainer of transformers.

Run ``python examples/vision_language.py``, or
``deepspeed examples/vision_language.py --deepspeed ds_configs/zero2.json``.
"""

from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, TrainingArguments

from loft_ds import LoFTTrainer

parser = HfArgumentParser(TrainingArguments)
parser.add_argument("--model", default="HuggingFaceTB/SmolVLM-256M-Instruct")
parser.set_defaults(output_dir="runs/vision_language", learning_rate=3e-4, max_steps=60, logging_steps=5)
parser.set_defaults(report_to="none", remove_unused_columns=False)
args, script = parser.parse_args_into_dataclasses()

# Such pictures need no second look at their parts.
processor = AutoProcessor.from_pretrained(script.model, do_image_splitting=False)
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")
data = [{"picture": Image.new("RGB", (64, 64), colour), "answer": colour} for colour in COLOURS * 8]


def collate(rows):
    """A batch whose loss is that of all its text: neither of padding nor of what stands for a picture."""
    chats = [
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"It is {row['answer']}."}]},
        ]
        for row in rows
    ]
    texts = [processor.apply_chat_template(chat) for chat in chats]
    batch = processor(text=texts, images=[[row["picture"]] for row in rows], padding=True, return_tensors="pt")
    unseen = (batch["attention_mask"] == 0) | (batch["input_ids"] == processor.image_token_id)
    return {**batch, "labels": batch["input_ids"].masked_fill(unseen, -100)}


model = AutoModelForImageTextToText.from_pretrained(script.model)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer = LoFTTrainer(model=model, args=args, train_dataset=data, data_collator=collate)
trainer.train()
trainer.save_model()
trainer.save_state()
