"""Merges an adapter into its base and writes a folder that transformers loads. It is PEFT's own way: nothing is LoFT's.

    python examples/merge.py --adapter runs/trainer --output_dir runs/merged

Out of a running job, from any ZeRO stage, loft_ds.export_adapter(engine, folder, merge=True) does it in one call.
"""

import argparse

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--adapter", default="runs/trainer")
parser.add_argument("--output_dir", default="runs/merged")
script = parser.parse_args()

model = AutoPeftModelForCausalLM.from_pretrained(script.adapter)
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
model.merge_and_unload().save_pretrained(script.output_dir)
tokenizer.save_pretrained(script.output_dir)
