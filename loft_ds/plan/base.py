"""The frozen weights as they are stored: in one precision, or the linear layers' quantised by bitsandbytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from .division import FLOAT, Job
from .shapes import Layer, Shapes

# bitsandbytes/functional.py, quantize_4bit: two weights a byte, and a float32 scale a block of 64 of them. Quantised
# twice a scale is a byte, and of 256 of them there is a float32 one.
BLOCK, BLOCK_OF_SCALES = 64, 256


class Stored(NamedTuple):
    """A frozen parameter: how many there are of it, its elements, and the bytes of each."""

    copies: int
    numel: int
    width: int

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.copies * self.numel * self.width


def stored(shapes: Shapes, job: Job) -> Iterator[Stored]:
    """All frozen parameters."""
    plain = Counter(shapes.weights)
    for layer in quantised_layers(shapes, job):
        plain[layer.numel] -= 1
        yield Stored(1, -(-layer.numel // 2) if job.quantised.startswith("4bit") else layer.numel, 1)
    yield from (Stored(count, numel, job.precision) for numel, count in plain.items())


def scale_bytes(shapes: Shapes, job: Job) -> int:
    """Of what is kept beside the quantised weights, on every rank at every stage: it is in no parameter."""
    return sum(_scales(layer, job.quantised) for layer in quantised_layers(shapes, job))


def quantised_layers(shapes: Shapes, job: Job) -> list[Layer]:
    """The linear layers without the head. Experts that are one parameter are none."""
    return [layer for layer in shapes.layers if layer.experts == 1] if job.quantised else []


def _scales(layer: Layer, kind: str) -> int:
    if kind == "8bit":
        return FLOAT * layer.outputs
    blocks, code = -(-layer.numel // BLOCK), 16 * FLOAT
    if kind == "4bit":
        return FLOAT * blocks + code
    return blocks + FLOAT * -(-blocks // BLOCK_OF_SCALES) + FLOAT * 256 + FLOAT + code
