"""The flags of ``train.py``: every one of ``transformers.TrainingArguments``, and those below."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from transformers import HfArgumentParser, TrainingArguments

from ..zero.config import SettingsError


class Optimizer(str, Enum):
    """What trains: the adapters by LoFT, the same adapters by AdamW, or every weight by AdamW."""

    LOFT = "loft"
    LORA = "lora"
    FULL = "full"


# Used when --learning_rate is not given. The first two are the best of a sweep of release 0.1 on the default job, which
# stands in benchmarks/results/main_job.json; the third is a customary one.
LEARNING_RATES = {Optimizer.LOFT: 4e-4, Optimizer.LORA: 4e-3, Optimizer.FULL: 2e-5}

# Flags that --optimizer loft alone reads, and those that --optimizer full does not.
LOFT_FLAGS = ("offload_second_moment", "head_learning_rate")
ADAPTER_FLAGS = (
    *("target_modules", "target_parameters", "modules_to_save", "init_lora_weights", "use_rslora"),
    *("load_in_4bit", "load_in_8bit"),
)
# Flags that another one alone reads.
FLAGS_OF = {
    "load_in_4bit": ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"),
    "dataset_name": ("dataset_config_name", "dataset_split", "eval_split"),
}

# Used when neither --max_steps nor --num_train_epochs is given: a few minutes on two CPU cores.
DEFAULT_STEPS = 40


@dataclass
class LaunchArguments:
    """What to train, on what, and how."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A causal language model: a folder or a hub name. Default: SmolLM2-135M-Instruct."},
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Files to train on: .txt, or .jsonl with `text` or `messages`. Default: Shakespeare."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A hub data set, or a folder of one, with a column `text` or `messages`."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of --dataset_name."})
    dataset_split: str = field(
        default="train", metadata={"help": "The part of --dataset_name to train on, as in train[:10%%]."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "The part of --dataset_name to evaluate on. Default: the end of what is read."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read text while training, and never all of it. Without --eval_split its begin is held out."},
    )
    loss_on: str = field(
        default="assistant",
        metadata={
            "help": "Of `messages`, what is trained on: the tokens of the assistant, or those of all.",
            "choices": ["assistant", "all"],
        },
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "A file with a chat template to use in place of the tokenizer's."}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Fill sequences with several documents, none of which sees another: loft_ds[trl]."},
    )
    optimizer: Optimizer = field(
        default=Optimizer.LOFT,
        metadata={"help": "loft; lora: the same adapters under AdamW; full: all weights under AdamW."},
    )
    lora_rank: int = field(default=8, metadata={"help": "The adapters' rank."})
    lora_alpha: float = field(default=16.0, metadata={"help": "PEFT's alpha. LoFT's result does not depend on it."})
    init_lora_weights: str = field(
        default="true",
        metadata={
            "help": "How adapters begin: PEFT's true, gaussian, orthogonal, olora, pissa, pissa_niter_N; or gradients, "
            "with the directions of the first batches' gradient."
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "PEFT's rank-stabilised scale, for --optimizer lora."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get adapters. Default: all linear layers."}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of parameters that get adapters as well: experts', as in mlp.experts.gate_up_proj."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that train whole, beside the adapters, as in lm_head."}
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "The learning rate of what trains outside the adapters. Default: --learning_rate."},
    )
    offload_second_moment: bool = field(
        default=False,
        metadata={"help": "Keep LoFT's second moments in CPU memory; once a turn they pass through the GPU in chunks."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the frozen weights in 4 bits, by bitsandbytes. So is --load_in_8bit."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The frozen weights in 8 bits, by bitsandbytes."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Of --load_in_4bit.", "choices": ["nf4", "fp4"]})
    bnb_4bit_use_double_quant: bool = field(
        default=False, metadata={"help": "Of --load_in_4bit: quantise its scales as well."}
    )
    bnb_4bit_compute_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Of --load_in_4bit: the type of its products. Default: that of the other weights.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    block_size: int = field(
        default=128, metadata={"help": "Tokens in one training sequence; a longer conversation is cut at its end."}
    )
    eval_fraction: float = field(
        default=0.05, metadata={"help": "The part of the text, from its end, that is held out of training."}
    )
    max_eval_blocks: int = field(
        default=16, metadata={"help": "Evaluate on at most so many sequences, spread over the held-out text."}
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line without building ``TrainingArguments``, which would start torch.distributed.

    So that everything which needs no process group can be checked first. `build` makes the dataclasses.
    """
    parser = HfArgumentParser((LaunchArguments, TrainingArguments), allow_abbrev=False)
    parser.usage = "%(prog)s [--flag value ...]   (--help lists all flags)"
    # None tells "not given" from any value that a user may give.
    parser.set_defaults(
        output_dir=None,
        learning_rate=None,
        num_train_epochs=None,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        eval_on_start=True,
        log_on_each_node=False,  # one rank speaks for the job, not one a host
        remove_unused_columns=False,  # there are none; of packed rows the Trainer would take the documents' lengths
    )
    args = parser.parse_args(argv)
    args.optimizer = Optimizer(args.optimizer)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.optimizer]
    if args.max_steps <= 0 and args.num_train_epochs is None:
        args.max_steps = DEFAULT_STEPS
    if args.num_train_epochs is None:
        args.num_train_epochs = 3.0  # TrainingArguments' own default; max_steps overrides it
    if args.deepspeed is None and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        # `accelerate launch` with a DeepSpeed JSON: as if the flag named it.
        args.deepspeed = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if args.output_dir is None:
        settings = Path(args.deepspeed).stem if args.deepspeed else "plain"
        args.output_dir = str(Path("runs") / f"{args.optimizer.value}-{settings}")
    if get_accelerator().device_name() == "cpu":
        # Without it TrainingArguments counts one process, and DeepSpeed's batch size does not add up.
        args.use_cpu = True
    return args


def build(args: argparse.Namespace) -> tuple[LaunchArguments, TrainingArguments]:
    """The dataclasses of a parsed command line. This joins the process group and makes the DeepSpeed config known.

    Raises:
        SettingsError: Flags that do not go together.
    """
    try:
        launch_args, training_args = HfArgumentParser((LaunchArguments, TrainingArguments)).parse_dict(vars(args))
    except ValueError as error:  # TrainingArguments' word for it
        raise SettingsError(" ".join(str(error).split())) from error
    return launch_args, training_args


def world_size() -> int:
    """How many processes there are, before there is a process group."""
    return _from_launcher("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", default=1)


def local_world_size() -> int:
    """How many processes share this machine."""
    return _from_launcher("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", default=1)


def rank() -> int:
    """This process's number among all, before there is a process group."""
    return _from_launcher("RANK", "OMPI_COMM_WORLD_RANK", default=0)


def _from_launcher(*names: str, default: int) -> int:
    """What the launcher says: torchrun, DeepSpeed's and Open MPI's name their variables differently."""
    return int(next((os.environ[name] for name in names if os.environ.get(name)), default))
