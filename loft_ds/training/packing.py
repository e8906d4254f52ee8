"""Several documents in one sequence, none of which sees another."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollatorWithFlattening,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .checks import LaunchError

PROBE = 8  # tokens of each of two documents


def pack(dataset: Dataset | IterableDataset, length: int) -> Dataset | IterableDataset:
    """Fills sequences of at most ``length`` tokens with whole rows, and notes how long each is: ``seq_lengths``."""
    from trl import pack_dataset

    return pack_dataset(dataset, length, "bfd")


class Flatten(DataCollatorWithFlattening):
    """A batch of packed sequences as one, with positions that begin anew at each document, and no attention mask.

    From such positions Transformers makes a mask of blocks for eager, SDPA and flex attention. Flash attention reads
    the documents' ends that come with them.
    """

    def __init__(self) -> None:
        super().__init__(return_flash_attn_kwargs=True, return_seq_idx=True)

    def __call__(self, features: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        documents = []
        for feature in features:
            lengths = [int(n) for n in feature["seq_lengths"]]
            parts = [torch.as_tensor(feature[key]).split(lengths) for key in ("input_ids", "labels")]
            documents += [{"input_ids": i.tolist(), "labels": k.tolist()} for i, k in zip(*parts, strict=True)]
        flat: dict[str, Any] = super().__call__(documents, *args, **kwargs)
        return flat


class CheckApart(TrainerCallback):
    """Refuses a model in which a document sees the one before it in its sequence, before the first step.

    Not every model's attention heeds positions that begin anew. So each is asked: the second document must come out the
    same, whichever the first is.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        tokens = torch.arange(3 * PROBE, device=args.device) % model.config.get_text_config().vocab_size
        first, other, second = tokens.split(PROBE)
        collate = Flatten()
        seen = []
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for before in (first, other):
                ids = torch.cat([before, second])
                flat = collate([{"input_ids": ids, "labels": ids, "seq_lengths": [PROBE, PROBE]}])
                flat = {key: value.to(args.device) if torch.is_tensor(value) else value for key, value in flat.items()}
                seen.append(model(**flat).logits[0, PROBE:])
        model.train(was_training)
        one, two = seen
        # Sums in another order, as a mixture of experts makes them, are some units in the last place.
        if (one - two).abs().max() > 4 * torch.finfo(one.dtype).eps * one.abs().max():
            raise LaunchError(
                f"--packing: in a model of type {model.config.model_type} under {model.config._attn_implementation} "
                "attention a document sees the one before it; leave --packing out"
            )
