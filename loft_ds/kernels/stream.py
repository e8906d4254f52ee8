"""Second moments that live in CPU memory and pass through the device a chunk at a time.

They are LoFT's largest state and are touched once a turn: load, accumulate, project, store. Rows are independent given
the other factor, so any part of them can be on the device alone. Two chunks are: while the device computes on one, the
other goes and the next comes, each direction on a stream of its own.

The very same code runs without an accelerator, where ``torch.cpu``'s streams do nothing and a copy is a copy.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Upper limit of a chunk, of which two are on the device; a row that is larger is a chunk of its own.
CHUNK_BYTES = 64 << 20
# As torch aligns what it allocates: some CPUs round a matrix product by where its operands begin.
_ALIGNMENT = 64
_ROWS = 32  # so many rows are a multiple of it in float32 and in bfloat16: a GPU loads 16 bytes at once

Part = tuple[slice, slice]


def parts(packed: Sequence[Tensor]) -> list[Part]:
    """Where to cut the second moments of b pairs alike, b of (k, p), into chunks of at most ``CHUNK_BYTES``.

    Between pairs where one of them fits, within them where none does.

    Returns:
        Slices of the pairs and of their rows, in order.
    """
    count, (size, width) = len(packed), packed[0].shape
    row_bytes = width * packed[0].element_size()
    if size * row_bytes <= CHUNK_BYTES:
        most = CHUNK_BYTES // max(1, size * row_bytes)
        return [(slice(i, min(i + most, count)), slice(0, size)) for i in range(0, count, most)]
    most = max(1, CHUNK_BYTES // row_bytes)
    most -= most % _ROWS if most > _ROWS else 0
    rows = [slice(start, min(start + most, size)) for start in range(0, size, most)]
    return [(slice(i, i + 1), each) for i in range(count) for each in rows]


def _within(packed: Sequence[Tensor], part: Part) -> list[Tensor]:
    pairs, rows = part
    return [each[rows] for each in packed[pairs]]


def at_home(state: Tensor, device: torch.device) -> Tensor:
    """State where it rests: in CPU memory, pinned where ``device``, which works on it, is an accelerator.

    The tensor itself if it is there already.
    """
    state = state.cpu()
    return state if device.type == "cpu" or state.is_pinned() else state.pin_memory()


def zeros_at_home(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for second moments that begin."""
    return torch.zeros(*shape, dtype=dtype, pin_memory=device.type != "cpu")


@functools.cache
def _side_streams(device: torch.device) -> tuple[Any, Any]:
    """The streams that load and store, of which every accelerator's bus can do both at once."""
    module = torch.get_device_module(device)
    return module.Stream(device), module.Stream(device)


class Resident:
    """Second moments on the device that works on them: the chunks are views.

    They are those of a :class:`Stream`, so that offloading changes no bit: a matrix product may round by its shape.
    """

    def chunks(self, packed: Sequence[Tensor]) -> Iterator[tuple[Part, list[Tensor]]]:
        """Each part of the second moments of some pairs alike, to be changed in place."""
        for part in parts(packed):
            yield part, _within(packed, part)

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@dataclass
class _Lane:
    """One device's two buffers and three streams; ``free`` says from when on each buffer may be written to."""

    module: ModuleType
    load: Any
    store: Any
    compute: Any
    free: deque[tuple[Tensor, Any]]


@dataclass
class _Chunk:
    """A part on the device, from the event ``loaded`` on."""

    part: Part
    home: list[Tensor]
    buffer: Tensor
    loaded: Any


class Stream:
    """Brings second moments to the device chunk by chunk, and takes back what became of them.

    They lie in CPU memory as :func:`at_home` has them. Leaving the context waits until all are back: from then on the
    CPU may read them.

    Args:
        order: the second moments of pairs alike, as :meth:`chunks` will be asked for them one after the other, and the
            device that works on them. The first chunk of one is loaded while the last of the one before is worked on.
    """

    def __init__(self, order: Sequence[tuple[Sequence[Tensor], torch.device]]) -> None:
        self._queue = deque((part, _within(packed, part), device) for packed, device in order for part in parts(packed))
        self._loaded: deque[_Chunk] = deque()
        self._lanes: dict[torch.device, _Lane] = {}
        for device in {device for *_, device in self._queue}:
            module, (load, store) = torch.get_device_module(device), _side_streams(device)
            compute = module.current_stream(device)
            size = max(_size(home) for _, home, there in self._queue if there == device)
            buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
            free = deque((buffer, compute.record_event()) for buffer in buffers)
            self._lanes[device] = _Lane(module, load, store, compute, free)

    def __enter__(self) -> Stream:
        self._prefetch()
        return self

    def __exit__(self, *exception: object) -> None:
        for lane in self._lanes.values():
            for side in (lane.load, lane.store):
                done = lane.module.Event()
                done.record(side)
                done.synchronize()
        self._loaded.clear()
        self._lanes.clear()  # and with them the memory

    def _prefetch(self) -> None:
        if not self._queue:
            return
        part, home, device = self._queue.popleft()
        lane = self._lanes[device]
        buffer, free = lane.free.popleft()
        lane.load.wait_event(free)
        with lane.module.stream(lane.load):
            for there, here in zip(home, _views(buffer, home), strict=True):
                here.copy_(there, non_blocking=True)
        self._loaded.append(_Chunk(part, home, buffer, lane.load.record_event()))

    def chunks(self, packed: Sequence[Tensor]) -> Iterator[tuple[Part, list[Tensor]]]:
        """Each part of the second moments of some pairs alike, to be changed in place before the next.

        Raises:
            RuntimeError: they are not the next in order.
        """
        for part in parts(packed):
            self._prefetch()
            chunk = self._loaded.popleft() if self._loaded else None
            if chunk is None or [t.data_ptr() for t in chunk.home] != [t.data_ptr() for t in _within(packed, part)]:
                raise RuntimeError("second moments are asked for in another order than they are streamed in")
            lane = self._lanes[chunk.buffer.device]
            views = _views(chunk.buffer, chunk.home)
            lane.compute.wait_event(chunk.loaded)
            yield part, views
            lane.store.wait_event(lane.compute.record_event())
            with lane.module.stream(lane.store):
                for there, here in zip(chunk.home, views, strict=True):
                    there.copy_(here, non_blocking=True)
            lane.free.append((chunk.buffer, lane.store.record_event()))


def _size(home: Sequence[Tensor]) -> int:
    """Bytes that :func:`_views` needs at most."""
    return sum(t.nbytes + _ALIGNMENT for t in home)


def _views(buffer: Tensor, home: Sequence[Tensor]) -> list[Tensor]:
    """A buffer of bytes as tensors like those at home, each aligned as it is there."""
    views, place = [], 0
    for t in home:
        place += (t.data_ptr() - place) % _ALIGNMENT
        views.append(buffer[place : place + t.nbytes].view(t.dtype).view(t.shape))
        place += t.nbytes
    return views
