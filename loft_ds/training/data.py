"""Text to sequences of tokens, with a part held out: of plain text blocks, of conversations a row each."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from .arguments import LaunchArguments
from .assets import default_texts
from .checks import LaunchError

SUFFIXES = (".txt", ".jsonl")
IGNORED = -100  # a label that no loss counts
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # where a chat template says that the assistant speaks

Document = dict[str, Any]  # {"text": str} or {"messages": [...]}
Row = dict[str, Any]  # of lists of one length: input_ids, labels


def read_documents(args: LaunchArguments | argparse.Namespace) -> tuple[Iterable[Document], Iterable[Document] | None]:
    """The documents that the flags name, and those to evaluate on where they are named too.

    Lists, or with ``--streaming`` what reads them anew at each iteration.
    """
    if args.train_file and args.dataset_name:
        raise LaunchError("--train_file and --dataset_name name two sources of text; give one")
    held_out = None
    documents: Iterable[Document]
    if args.dataset_name:
        documents = _read_dataset(args, args.dataset_split)
        held_out = _read_dataset(args, args.eval_split) if args.eval_split else None
    elif args.train_file:
        documents = _Files([Path(name) for name in args.train_file])
    else:
        documents = [{"text": text} for text in default_texts()]
    if args.streaming:
        return documents, held_out
    return _filled(documents, args), None if held_out is None else _filled(held_out, args)


def _filled(documents: Iterable[Document], args: LaunchArguments | argparse.Namespace) -> list[Document]:
    found = [document for document in documents if _holds_text(document)]
    if not found:
        raise LaunchError(f"{args.dataset_name or ', '.join(args.train_file or ())} holds no text")
    return found


def _holds_text(document: Document) -> bool:
    return bool(document.get("messages") or (document.get("text") or "").strip())


class _Files:
    """The documents of files, read at each iteration; what is wrong with their names is said at once."""

    def __init__(self, paths: list[Path]) -> None:
        for path in paths:
            if not path.is_file():
                raise LaunchError(f"--train_file {path}: no such file")
            if path.suffix not in SUFFIXES:
                raise LaunchError(f"--train_file {path}: its name must end in one of {', '.join(SUFFIXES)}")
        self._paths = paths

    def __iter__(self) -> Iterator[Document]:
        for path in self._paths:
            try:
                if path.suffix == ".txt":
                    yield {"text": path.read_text(encoding="utf-8")}
                else:
                    yield from _json_lines(path)
            except UnicodeDecodeError as error:
                raise LaunchError(f"--train_file {path}: not UTF-8 text ({error})") from error


def _json_lines(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
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


def _read_dataset(args: LaunchArguments | argparse.Namespace, split: str) -> Iterable[Document]:
    name = args.dataset_name
    try:
        dataset = load_dataset(name, args.dataset_config_name, split=split, streaming=args.streaming)
    except Exception as error:  # the many ways to have no such data set, hub, configuration or split
        raise LaunchError(f"--dataset_name {name}: {str(error).splitlines()[0]}") from error
    names = dataset.column_names or list(next(iter(dataset), {}))
    columns = [column for column in ("messages", "text") if column in names]
    if not columns:
        raise LaunchError(f"--dataset_name {name}: no column `text` or `messages` among {names}")
    return dataset.select_columns(columns[:1])


def find_template(tokenizer: PreTrainedTokenizerBase, args: LaunchArguments | argparse.Namespace) -> str | None:
    """The chat template to train conversations by; None where the tokenizer has none.

    With ``--loss_on assistant`` it marks what the assistant says: the tokenizer's own where that does, else the one
    that TRL keeps for the same model, if TRL is installed.

    Raises:
        LaunchError: Nobody has one that does.
    """
    if args.chat_template:
        try:
            tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise LaunchError(f"--chat_template {args.chat_template}: {error.strerror}") from error
    if not tokenizer.chat_template:
        return None
    own: str = tokenizer.get_chat_template()
    if args.loss_on == "all" or GENERATION.search(own):
        return own
    known = ""
    try:
        from trl import get_training_chat_template

        return get_training_chat_template(tokenizer) or own
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        known = "; `pip install 'loft_ds[trl]'` brings those of many models"
    except ValueError:  # TRL's word for a template that it does not know
        pass
    raise LaunchError(
        "the chat template does not say where the assistant speaks ({% generation %}): name one that does by "
        f"--chat_template{known}; or train on all tokens of a conversation by --loss_on all"
    )


class Encoder:
    """Documents to tokens; conversations go through a chat template.

    Args:
        tokenizer: the model's.
        args: the flags.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: LaunchArguments | argparse.Namespace) -> None:
        self._tokenizer = tokenizer
        self._args = args
        self._template: str | None = None
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def __call__(self, document: Document) -> Row:
        """Tokens and labels of a document: ``IGNORED`` where nothing is to be learnt."""
        if not document.get("messages"):
            ids = self._tokenizer(document["text"], verbose=False)["input_ids"] + self._end
            return {"input_ids": ids, "labels": ids}
        self._template = self._template or find_template(self._tokenizer, self._args)
        if self._template is None:
            raise LaunchError(
                "the text holds `messages`, but the model's tokenizer has no chat template: name one by --chat_template"
            )
        marked = self._args.loss_on == "assistant"
        chat = self._tokenizer.apply_chat_template(
            document["messages"],
            chat_template=self._template,
            return_dict=True,
            return_assistant_tokens_mask=marked,
            tokenizer_kwargs={"verbose": False},
        )
        ids = chat["input_ids"]
        kept = chat["assistant_masks"] if marked else [1] * len(ids)
        return {"input_ids": ids, "labels": [i if keep else IGNORED for i, keep in zip(ids, kept, strict=True)]}


def sequences(documents: Iterable[Document], encode: Encoder, apart: bool, length: int) -> Iterator[Row]:
    """Sequences of at most ``length`` tokens.

    Args:
        documents: what they are made of, in order.
        encode: makes tokens of a document.
        apart: a document shares its sequences with no other. A conversation is then cut off at its end, text is cut
            into pieces, and what holds nothing to learn is left out. Else they are blocks of one long text.
        length: of a sequence.
    """
    pending: Row = {"input_ids": [], "labels": []}
    for document in documents:
        if not _holds_text(document):
            continue
        if document.get("messages") and not apart:
            raise LaunchError("`messages` after a first document of `text`: stream a file with one of them")
        row = encode(document)
        if not apart:
            row = {key: pending[key] + row[key] for key in row}
        total = len(row["input_ids"])
        full = total // length * length
        if document.get("messages"):
            if total > length:
                warnings.warn(f"conversations are cut off at --block_size {length}, and some are longer", stacklevel=1)
            end = length
        else:
            end = total if apart else full
        for at in range(0, end, length):
            piece = {key: values[at : at + length] for key, values in row.items()}
            if any(label != IGNORED for label in piece["labels"][1:]):  # the first is nobody's next token
                yield piece
        pending = {key: values[full:] for key, values in row.items()}


def split(
    documents: Iterable[Document],
    held_out: Iterable[Document] | None,
    encode: Encoder,
    args: LaunchArguments | argparse.Namespace,
) -> tuple[Dataset | IterableDataset, Dataset, bool]:
    """Sequences to train on, some to evaluate on, and whether each holds one document only.

    Held out is the end of the text, or what ``held_out`` names; of a stream, which has no known end, its begin.
    """
    first = documents[:1] if isinstance(documents, list) else list(itertools.islice(documents, 1))
    conversations = any(each.get("messages") for each in (documents if isinstance(documents, list) else first))
    apart = conversations or args.packing
    check_sizes(args)
    make = functools.partial(sequences, encode=encode, apart=apart, length=args.block_size)
    if not (apart or args.streaming or held_out is not None):
        tokens = [encode(document)["input_ids"] for document in documents]
        return *blocks(tokens, args.block_size, args.eval_fraction, args.max_eval_blocks), apart
    if args.streaming:
        training = IterableDataset.from_generator(make, gen_kwargs={"documents": documents})
        kept = list(itertools.islice(make(documents if held_out is None else held_out), args.max_eval_blocks))
        if held_out is None:
            training = training.skip(len(kept))
        if next(iter(training), None) is None:
            raise LaunchError(f"{args.dataset_name or args.train_file}: too little text to train on and to hold out")
        return training, Dataset.from_list(kept), apart
    found = list(make(documents))
    kept = [] if held_out is None else list(make(held_out))
    if held_out is None:
        cut = max(1, int(args.eval_fraction * len(found)))
        found, kept = found[:-cut], found[-cut:]
    if not found or not kept:
        raise LaunchError("fewer than one sequence to train on and one to hold out: give more text")
    return Dataset.from_list(found), Dataset.from_list([kept[at] for at in _spread(kept, args.max_eval_blocks)]), apart


def check_sizes(args: LaunchArguments | argparse.Namespace) -> None:
    """Refuses sizes that no sequences come of."""
    if not 0 < args.eval_fraction < 1:
        raise LaunchError(f"--eval_fraction {args.eval_fraction}: must lie between 0 and 1")
    if args.block_size < 2 or args.max_eval_blocks < 1:
        raise LaunchError("--block_size must be at least 2 and --max_eval_blocks at least 1")


def blocks(documents: list[list[int]], block_size: int, eval_fraction: float, max_eval_blocks: int) -> list[Dataset]:
    """Training and held-out blocks of ``block_size`` tokens; no token is in both, and no random choice is made.

    Held out are the last documents that together hold ``eval_fraction`` of all tokens. Where documents are too
    long for that (one book, say), the last part of the text is, wherever it begins.
    """
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
    return [_dataset(_pack(stream[:cut], block_size)), _dataset(held_out[_spread(held_out, max_eval_blocks)])]


def _spread(items: Sized, most: int) -> np.ndarray:
    """Where at most so many of the items lie, evenly from the first to the last."""
    return np.linspace(0, len(items) - 1, min(most, len(items))).astype(int)


def _pack(stream: np.ndarray, block_size: int) -> np.ndarray:
    return stream[: len(stream) // block_size * block_size].reshape(-1, block_size)


def _dataset(rows: np.ndarray) -> Dataset:
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")
