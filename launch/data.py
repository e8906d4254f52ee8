"""Text to blocks of tokens, with a held-out end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from arguments import LaunchArguments
from assets import default_texts
from checks import LaunchError

SUFFIXES = (".txt", ".jsonl")


def read_documents(args: LaunchArguments | argparse.Namespace) -> list[dict[str, Any]]:
    """The documents that the flags name, each ``{"text": str}`` or ``{"messages": [...]}``."""
    if args.train_file and args.dataset_name:
        raise LaunchError("--train_file and --dataset_name name two sources of text; give one")
    documents: list[dict[str, Any]]
    if args.dataset_name:
        documents = _read_dataset(args.dataset_name, args.dataset_config_name)
    elif args.train_file:
        documents = _read_file(Path(args.train_file))
    else:
        documents = [{"text": text} for text in default_texts()]
    documents = [document for document in documents if document.get("messages") or (document.get("text") or "").strip()]
    if not documents:
        raise LaunchError(f"{args.dataset_name or args.train_file} holds no text")
    return documents


def _read_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise LaunchError(f"--train_file {path}: no such file")
    if path.suffix not in SUFFIXES:
        raise LaunchError(f"--train_file {path}: its name must end in one of {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LaunchError(f"--train_file {path}: not UTF-8 text ({error})") from error
    return [{"text": text}] if path.suffix == ".txt" else list(_json_lines(path, text))


def _json_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    # Not str.splitlines: JSON strings may hold the other characters that it breaks at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            raise LaunchError(f"{path}, line {number}: not JSON ({error})") from error
        has_text = isinstance(document, dict) and isinstance(document.get("text"), str)
        has_messages = isinstance(document, dict) and isinstance(document.get("messages"), list)
        if not (has_text or has_messages):
            raise LaunchError(f"{path}, line {number}: needs a string `text` or a list `messages`")
        yield document


def _read_dataset(name: str, config: str | None) -> list[dict[str, Any]]:
    try:
        dataset = load_dataset(name, config, split="train")
    except Exception as error:  # the many ways to have no such data set, hub or configuration
        raise LaunchError(f"--dataset_name {name}: {str(error).splitlines()[0]}") from error
    columns = [column for column in ("messages", "text") if column in dataset.column_names]
    if not columns:
        raise LaunchError(f"--dataset_name {name}: no column `text` or `messages` among {dataset.column_names}")
    return dataset.select_columns(columns[:1]).to_list()


def tokenize(documents: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each document; conversations go through the tokenizer's chat template."""
    if any("messages" in document for document in documents) and not tokenizer.chat_template:
        raise LaunchError("the text holds `messages`, but the model's tokenizer has no chat template")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = []
    for document in documents:
        if "messages" in document:
            chat = tokenizer.apply_chat_template(document["messages"], tokenize=False)
            tokens.append(tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"])
        else:
            tokens.append(tokenizer(document["text"], verbose=False)["input_ids"] + end)
    return tokens


def blocks(documents: list[list[int]], block_size: int, eval_fraction: float, max_eval_blocks: int) -> list[Dataset]:
    """Training and held-out blocks of ``block_size`` tokens; no token is in both, and no random choice is made.

    Held out are the last documents that together hold ``eval_fraction`` of all tokens. Where documents are too
    long for that (one book, say), the last part of the text is, wherever it begins.
    """
    if not 0 < eval_fraction < 1:
        raise LaunchError(f"--eval_fraction {eval_fraction}: must lie between 0 and 1")
    if block_size < 2 or max_eval_blocks < 1:
        raise LaunchError("--block_size must be at least 2 and --max_eval_blocks at least 1")
    stream = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
    count = len(stream) // block_size
    if count < 2:
        raise LaunchError(
            f"the text has {len(stream)} tokens, fewer than one block to train on and one to hold out; "
            f"give more text or a --block_size below {block_size}"
        )
    wanted = min(max(1, int(eval_fraction * count)), count - 1) * block_size
    starts = np.cumsum([0] + [len(document) for document in documents])[:-1]
    cut = int(starts[starts <= len(stream) - wanted][-1])
    if cut < block_size or len(stream) - cut > 2 * wanted:
        cut = len(stream) - wanted
    held_out = _pack(stream[cut:], block_size)
    chosen = np.linspace(0, len(held_out) - 1, min(max_eval_blocks, len(held_out))).astype(int)
    return [_dataset(_pack(stream[:cut], block_size)), _dataset(held_out[chosen])]


def _pack(stream: np.ndarray, block_size: int) -> np.ndarray:
    return stream[: len(stream) // block_size * block_size].reshape(-1, block_size)


def _dataset(rows: np.ndarray) -> Dataset:
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")
