"""Fine-tunes a causal language model with LoFT on the Hugging Face Trainer, with DeepSpeed or without.

Every flag of TrainingArguments works; ``arguments.py`` names the others.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import signal
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import datasets
import deepspeed
import deepspeed.comm.comm
import deepspeed.ops
import torch
import transformers
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.utils import logger as deepspeed_logger
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollator,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    TrainingArguments,
)

from ..adapters import find_trainable
from ..errors import CheckpointError
from ..hf import SaveOnSIGTERM
from ..quantised import keep_gradients
from ..ranks import first_rank
from ..start import start_from_gradients
from ..zero.config import SettingsError, read_deepspeed_json
from ..zero.unsupported import find_json_refusals
from .arguments import LaunchArguments, Optimizer, build, local_world_size, parse, rank, world_size
from .assets import MODEL_NAME, TEXT_NAME, default_model
from .checks import LaunchError, check_adapters, check_flags, find_mismatches
from .data import Encoder, read_documents, split
from .faults import Watch, bounded_joining
from .logs import LOG, LoggedTrainer
from .packing import CheckApart, Flatten, pack
from .report import write_report

# As a shell reports a process that SIGTERM ended: the job was stopped, is saved, and is to be started again.
STOPPED = 128 + signal.SIGTERM
START_BATCHES = 4


def discover_mpi_ranks() -> None:
    """Under Open MPI's ``mpirun`` and no other launcher, asks mpi4py which rank this is, as DeepSpeed would later.

    ``MASTER_ADDR`` and ``MASTER_PORT`` count where they are set; else it is the first address that the host of rank 0
    has, and DeepSpeed's port.

    Raises:
        LaunchError: If there is no mpi4py.
    """
    if "RANK" in os.environ or "OMPI_COMM_WORLD_LOCAL_SIZE" not in os.environ:
        return
    if importlib.util.find_spec("mpi4py") is None:
        raise LaunchError("under mpirun it needs mpi4py: pip install 'loft_ds[mpi]'")
    os.environ["LOCAL_SIZE"] = os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"]
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", TORCH_DISTRIBUTED_DEFAULT_PORT)
    deepspeed.comm.comm.mpi_discovery(int(port), verbose=False)
    os.environ["MASTER_ADDR"] = address or os.environ["MASTER_ADDR"]


def prepare_process() -> None:
    """Settles what is a process's own: threads, and who speaks."""
    if "OMP_NUM_THREADS" not in os.environ:  # with GPUs too: what is offloaded is computed on the CPU
        threads = max(1, len(os.sched_getaffinity(0)) // local_world_size())
        torch.set_num_threads(threads)
        # Where Accelerate looks, which otherwise sets a number of its own that ignores the other ranks.
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if not torch.accelerator.is_available():
        # Otherwise DeepSpeed compiles an extension for one to two minutes on the first run on a CPU; only
        # tensor-parallel layers ever call it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries, nothing a user can change
    deepspeed_logger.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    if rank() > 0:
        warnings.filterwarnings("ignore", category=UserWarning)  # rank 0 says the same
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        deepspeed_logger.setLevel(logging.ERROR)


def load_dtype(args: LaunchArguments, training_args: TrainingArguments) -> torch.dtype:
    """The type to load weights in: the half type where it is safe, since frozen weights need no more.

    Weights that train without DeepSpeed stay in float32, as autocast wants them; DeepSpeed keeps float32 masters.
    """
    if args.optimizer is Optimizer.FULL and training_args.deepspeed_plugin is None:
        return torch.float32
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32


def train(argv: list[str] | None = None) -> None:
    """Runs the job that a command line describes.

    Raises:
        SettingsError: If the command line, or a file that it names, is at fault.
        SystemExit: With the status ``STOPPED``, on all ranks, if SIGTERM reached one while it trained.
    """
    parsed = parse(argv)

    # First everything that can be wrong without a process group, then without the weights.
    check_flags(parsed)
    if parsed.deepspeed:
        checks = [partial(find_mismatches, args=parsed)]
        if parsed.optimizer is Optimizer.LOFT:
            checks.append(partial(find_json_refusals, auto_fp16=parsed.fp16 or parsed.fp16_full_eval))
        read_deepspeed_json(parsed.deepspeed, *checks)
    documents, held_out = read_documents(parsed)
    source = parsed.model_name_or_path or str(default_model())
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise LaunchError(f"--model_name_or_path {source}: {str(error).splitlines()[0]}") from error
    lora = None
    if parsed.optimizer is not Optimizer.FULL:
        lora = LoraConfig(
            r=parsed.lora_rank,
            lora_alpha=parsed.lora_alpha,
            target_modules=parsed.target_modules or "all-linear",
            target_parameters=parsed.target_parameters,
            modules_to_save=parsed.modules_to_save,
            init_lora_weights=parsed.init_lora_weights in ("true", "gradients") or parsed.init_lora_weights,
            use_rslora=parsed.use_rslora,
            task_type="CAUSAL_LM",
        )
        check_adapters(config, lora)
    training, held_out, apart = split(documents, held_out, Encoder(tokenizer, parsed), parsed)
    batch = parsed.per_device_eval_batch_size * world_size()
    if parsed.dataloader_drop_last and len(held_out) < batch:
        raise LaunchError(
            f"--dataloader_drop_last drops all {len(held_out)} held-out blocks, less than a batch of {batch}: "
            "leave it out, or lower --per_device_eval_batch_size"
        )
    collator: DataCollator | None = None  # blocks are of one length
    if parsed.packing:
        training, held_out, collator = pack(training, parsed.block_size), pack(held_out, parsed.block_size), Flatten()
    elif apart:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        collator = DataCollatorForSeq2Seq(tokenizer)

    if parsed.deepspeed and "RANK" not in os.environ:
        raise LaunchError("with --deepspeed start it by a launcher: deepspeed --num_accelerators 1 launch/train.py ...")

    if parsed.streaming:
        # Each rank reads all of it and keeps its own: rank 0 could not hand out batches of different lengths.
        parsed.accelerator_config = parsed.accelerator_config or {"dispatch_batches": False}
    # From here on the DeepSpeed settings are known to Transformers, which under stage 3 shards what it loads.
    with bounded_joining(parsed.ddp_timeout):
        args, training_args = build(parsed)
        if training_args.deepspeed_plugin is not None:  # of --deepspeed, or of `accelerate launch`
            # On a CPU the Trainer starts torch.distributed alone, and loading under stage 3 would count one process.
            deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=training_args.ddp_timeout))
    with Watch(training_args.output_dir, training_args.ddp_timeout) as watch:
        transformers.set_seed(training_args.seed)  # the same adapters on every rank
        model = load_model(source, lora, args, training_args)
        stop = SaveOnSIGTERM()
        trainer = LoggedTrainer(
            model=model,
            args=training_args,
            data_collator=collator,
            train_dataset=training,
            eval_dataset=held_out,
            processing_class=tokenizer,
            use_loft=args.optimizer is Optimizer.LOFT,
            loft_kwargs={"offload_second_moment": args.offload_second_moment},
            callbacks=[watch, stop, *([CheckApart()] if parsed.packing else [])],
        )
        if lora is not None and args.init_lora_weights == "gradients":
            begin_from_gradients(trainer)
        if args.head_learning_rate is not None:
            trainer.loft_kwargs["params"] = head_groups(trainer, args.head_learning_rate)
        resume = training_args.resume_from_checkpoint
        if resume in ("True", "true"):  # the last whole one, or none yet: the same command starts and restarts a job
            resume = trainer.last_checkpoint()
        trainer.train(resume_from_checkpoint=resume)
        if stop.sent_to is not None:
            leave_saved(trainer, stop.sent_to)
        # First: whatever happens later, the weights are there. What else there is to push comes at the end.
        trainer.save_model(_internal_call=True)
        trainer.evaluate()
        if first_rank():
            facts = describe(args, training_args, model) | used_deepspeed(trainer)
            facts |= {"train_blocks": None if args.streaming else len(training), "eval_blocks": len(held_out)}
            report(Path(training_args.output_dir), facts, trainer.state.log_history)
    if training_args.push_to_hub:
        trainer.push_to_hub()


def quantisation(args: LaunchArguments, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How bitsandbytes is to quantise the frozen weights; None where it is not asked to.

    Args:
        args: the flags.
        dtype: of the weights that stay as they are.
    """
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not args.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=args.bnb_4bit_compute_dtype or dtype,
    )


def load_model(
    source: str, lora: LoraConfig | None, args: LaunchArguments, training_args: TrainingArguments
) -> PreTrainedModel | PeftModel:
    """The model to train, with its adapters if it gets any."""
    dtype = load_dtype(args, training_args)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=quantisation(args, dtype))
    keep_gradients(model)
    model.config.use_cache = False
    if lora is not None:
        model = get_peft_model(model, lora)
        if training_args.gradient_checkpointing:
            model.enable_input_require_grads()
    return model


def begin_from_gradients(trainer: LoggedTrainer) -> None:
    """Gives the adapters the directions of the first batches' gradient."""
    device, model = trainer.args.device, trainer.model.to(trainer.args.device)
    size = trainer.args.per_device_train_batch_size
    rows = list(itertools.islice(trainer.train_dataset, START_BATCHES * size))

    def backward() -> None:
        for first in range(0, len(rows), size):
            batch = trainer.data_collator(rows[first : first + size])
            model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()

    start_from_gradients(model, backward)


def head_groups(trainer: LoggedTrainer, head_learning_rate: float) -> list[dict[str, Any]]:
    """The Trainer's two groups of parameters, cut into the adapters' and those with a learning rate of their own."""
    trainable = find_trainable(trainer.model)
    heads = trainable.others.keys() - trainable.untreated.keys()
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, p in trainable.parameters.items():
        groups.setdefault((name in heads, name in decayed), []).append(p)
    return [
        {
            "params": params,
            **({"lr": head_learning_rate} if in_head else {}),
            **({} if decays else {"weight_decay": 0.0}),
        }
        for (in_head, decays), params in groups.items()
    ]


def leave_saved(trainer: LoggedTrainer, sent_to: int) -> NoReturn:
    """Ends this process once all ranks have saved, after SIGTERM reached the rank ``sent_to``."""
    step = trainer.state.global_step
    if first_rank():
        print(
            f"SIGTERM reached rank {sent_to}: saved after step {step}. The same command with "
            "--resume_from_checkpoint True goes on from there.",
            flush=True,
        )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # some launchers end all ranks as soon as one has ended
    sys.exit(STOPPED)


def describe(
    args: LaunchArguments, training_args: TrainingArguments, model: PreTrainedModel | PeftModel
) -> dict[str, Any]:
    """What the run was, for ``metrics.json``."""
    adapted = args.optimizer is not Optimizer.FULL
    # Under stage 3 a parameter shows its own share only, and ds_numel the whole.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {
        "model": args.model_name_or_path or MODEL_NAME,
        "text": ", ".join(args.train_file or ()) or args.dataset_name or TEXT_NAME,
        "optimizer": args.optimizer.value,
        "world_size": training_args.world_size,
        "device": str(training_args.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "learning_rate": training_args.learning_rate,
        "head_learning_rate": args.head_learning_rate,
        "lora_rank": args.lora_rank if adapted else None,
        "lora_alpha": args.lora_alpha if adapted else None,
        "quantised": args.bnb_4bit_quant_type if args.load_in_4bit else "int8" if args.load_in_8bit else None,
        "block_size": args.block_size,
        "trainable_parameters": sum(size for size, trained in sizes if trained),
        "parameters": sum(size for size, _ in sizes),
    }


def used_deepspeed(trainer: LoggedTrainer) -> dict[str, str | int | None]:
    """Who said how DeepSpeed trains, and the ZeRO stage that came of it; None where it does not."""
    if not trainer.is_deepspeed_enabled:
        return {"deepspeed": None, "zero_stage": None}
    stage = int(trainer.model_wrapped.zero_optimization_stage())
    return {"deepspeed": trainer.args.deepspeed or "accelerate launch", "zero_stage": stage}


def report(folder: Path, facts: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Writes the report and says in one line how it went."""
    metrics = write_report(folder, facts, history)
    before, after = metrics["eval_loss_before"], metrics["eval_loss_after"]
    change = f"{before:.4f} -> {after:.4f}" if before is not None else f"{after:.4f}"
    print(f"Held-out loss {change} after {metrics['steps']} steps. Weights, {LOG}, metrics.json and loss.png: {folder}")


def main() -> None:
    """Runs the command line; each mistake of a user's is one line on stderr, and the exit status is not zero.

    Every rank finds the same mistakes and says the same lines: a launcher ends the others at the first one's exit, so
    that rank 0 alone might never get to speak.
    """
    try:
        discover_mpi_ranks()
        prepare_process()
        train()
    except (SettingsError, CheckpointError) as error:
        sys.exit("\n".join(f"train.py: error: {line}" for line in str(error).splitlines()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
