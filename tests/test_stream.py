"""Second moments in CPU memory: streamed through the device they are to the bit what they are when they live there."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from models import odd_model, one_layer, train_alone, trained, two_groups
from sharded_run import train_sharded
from test_kernels import Allocations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import loft_ds
from loft_ds import Blocks, LoFTAdamW, kernels
from loft_ds.kernels import stream

# A handful of the odd model's rows (6 numbers), so that every one of its factors is cut.
SMALL = 100


@contextmanager
def chunks_of(size):
    """Chunks of so many bytes, in this process."""
    before, stream.CHUNK_BYTES = stream.CHUNK_BYTES, size
    try:
        yield
    finally:
        stream.CHUNK_BYTES = before


@pytest.mark.parametrize("size", [1, SMALL, 5_000, 1 << 20])
@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (77, 6), (333, 10)])
def test_parts_are_all_of_it_once(size, shape):
    packed = [torch.zeros(shape) for _ in range(5)]
    with chunks_of(size):
        parts = stream.parts(packed)
    for pairs, rows in parts:
        chunk = [each[rows] for each in packed[pairs]]
        assert all(t.is_contiguous() for t in chunk), "a copy of it is no single transfer"
        assert sum(t.nbytes for t in chunk) <= max(size, shape[1] * 4)
        for t in chunk:
            t += 1
    assert all(bool((t == 1).all()) for t in packed)


def pairs_alike(seed, count, size, rank, dtype):
    """Second moments of some pairs, and what an accumulation takes."""
    generator = torch.Generator().manual_seed(seed)
    packed = [torch.rand(size, rank * (rank + 1) // 2, generator=generator).to(dtype) for _ in range(count)]
    return packed, torch.randn(count, size, rank, generator=generator)


def accumulate(moments, batches):
    """One pass over all of them as the optimizer does it."""
    with moments:
        for packed, gradient in batches:
            for part, chunk in moments.chunks(packed):
                kernels.accumulate_second_moment_(chunk, gradient[part], 0.9, seed=3)


def streamed(batches):
    return kernels.Stream([(packed, torch.device("cpu")) for packed, _ in batches])


SHAPES = [(3, 40, 4), (1, 300, 3), (4, 7, 2), (2, 0, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [SMALL, 3_000, 1 << 20])
def test_streamed_is_resident(size, dtype):
    home, there = ([pairs_alike(i, *shape, dtype) for i, shape in enumerate(SHAPES)] for _ in range(2))
    with chunks_of(size):
        accumulate(kernels.Resident(), home)
        accumulate(streamed(there), there)
    for i, ((expected, _), (actual, _)) in enumerate(zip(home, there, strict=True)):
        before, _ = pairs_alike(i, *SHAPES[i], dtype)
        for a, e, b in zip(actual, expected, before, strict=True):
            assert torch.equal(a, e)
            assert not len(a) or not torch.equal(a, b)


def test_another_order_is_an_error():
    batches = [pairs_alike(i, *shape, torch.float32) for i, shape in enumerate(SHAPES)]
    with pytest.raises(RuntimeError, match="in another order than they are streamed in"):
        accumulate(streamed(batches[::-1]), batches)


# --- on a device whose streams run by themselves ---


class Clock:
    """A stream: it knows of each stream how much of it is done before what it does next."""

    def __init__(self, name, deaf=()):
        self.name, self.seen, self.deaf = name, Counter(), name in deaf

    def wait_event(self, event):
        if not self.deaf:
            self.seen |= event

    def record_event(self):
        return Counter(self.seen)


class Races(TorchDispatchMode):
    """Finds accesses to the same memory from two streams of which neither waits for the other.

    Stands in for the device's module. ``deaf`` streams, or the CPU as "host", do not hear what they are to wait for.
    """

    def __init__(self, deaf=()):
        super().__init__()
        self.found = set()
        self._accesses = {}
        self._streams = {name: Clock(name, deaf) for name in ("compute", "load", "store", "host")}
        self._current = self._streams["compute"]
        self.module = SimpleNamespace(
            current_stream=lambda device: self._current, stream=self._enter, Event=self._event
        )

    def sides(self, device):
        return self._streams["load"], self._streams["store"]

    @contextmanager
    def _enter(self, stream):
        before, self._current = self._current, stream
        yield
        self._current = before

    def _event(self):
        event, host = SimpleNamespace(), self._streams["host"]
        event.record = lambda stream: setattr(event, "seen", stream.record_event())
        event.synchronize = lambda: host.wait_event(event.seen)
        return event

    def read_by_the_cpu(self, tensors):
        for tensor in tensors:
            self._access(self._streams["host"], tensor, False)

    def _access(self, stream, tensor, writes):
        stream.seen |= self._streams["host"].seen  # whatever the CPU has waited for came before what it launches now
        stream.seen[stream.name] += 1
        storage, start = tensor.untyped_storage(), tensor.storage_offset() * tensor.itemsize
        stop = start + tensor.nbytes
        _, earlier = self._accesses.setdefault(storage._cdata, (storage, []))  # kept, so that no other gets its number
        for name, tick, wrote, first, last in earlier:
            if (wrote or writes) and stream.seen[name] < tick and first < stop and start < last:
                self.found.add((name, stream.name))
        earlier.append((stream.name, stream.seen[stream.name], writes, start, stop))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                for tensor in tree_iter(value):
                    if isinstance(tensor, Tensor):
                        writes = argument.alias_info is not None and argument.alias_info.is_write
                        self._access(self._current, tensor, writes)
        return func(*args, **(kwargs or {}))


def races(monkeypatch, deaf=()):
    """Two turns over all second moments, then the CPU reads them."""
    found = Races(deaf)
    monkeypatch.setattr(stream.torch, "get_device_module", lambda device: found.module)
    monkeypatch.setattr(stream, "_side_streams", found.sides)
    batches = [pairs_alike(i, *shape, torch.float32) for i, shape in enumerate(SHAPES)]
    with found, chunks_of(SMALL):
        for _ in range(2):
            accumulate(streamed(batches), batches)
        found.read_by_the_cpu(t for packed, _ in batches for t in packed)
    return found.found


def test_no_stream_overtakes_another(monkeypatch):
    assert not races(monkeypatch)


@pytest.mark.parametrize(
    ("deaf", "found"),
    [
        ("compute", ("load", "compute")),
        ("load", ("store", "load")),
        ("store", ("compute", "store")),
        ("host", ("store", "host")),
    ],
)
def test_every_wait_is_needed(monkeypatch, deaf, found):
    assert found in races(monkeypatch, (deaf,))


# --- the optimizer ---

VARIANTS = {
    "default": {},
    "bfloat16": {"second_moment_dtype": torch.bfloat16},
    "alternate": {"turns": "alternate"},
    "published": {"blocks": Blocks.published()},
    "factor": {"blocks": Blocks(projected_update=False)},
}


def train(steps, start=0, model=None, optimizer=None, **kwargs):
    model = odd_model() if model is None else model
    optimizer = optimizer or LoFTAdamW(model, lr=1e-2, params=two_groups(model), **kwargs)
    train_alone(model, optimizer, range(start, steps))
    return {name: p.detach().clone() for name, p in trained(model).items()}, optimizer


def assert_same(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def second_moments(optimizer):
    return {name: state["second_moment"] for name, state in optimizer.state.items() if "second_moment" in state}


@pytest.mark.parametrize("variant", VARIANTS)
def test_not_a_bit_changes(variant):
    with chunks_of(SMALL):
        resident, first = train(5, **VARIANTS[variant])
        offloaded, second = train(5, offload_second_moment=True, **VARIANTS[variant])
    assert_same(offloaded, resident)
    assert_same(second_moments(second), second_moments(first))
    whole, _ = train(5, **VARIANTS[variant])
    for name, value in whole.items():
        # Chunks of other sizes may be other matrix products: float32's unit roundoff over 5 steps. bfloat16's rounding
        # by chance then falls differently, by 2^-8 of a second moment.
        torch.testing.assert_close(offloaded[name], value, rtol=0, atol=1e-3 if variant == "bfloat16" else 1e-6)


def in_small_chunks(rank, world, *args, **kwargs):
    with chunks_of(SMALL):
        return train_sharded(rank, world, *args, **kwargs)


@pytest.mark.parametrize(("stage", "stored"), [(0, None), (1, None), (2, torch.bfloat16), (3, None)])
def test_not_a_bit_changes_on_any_stage(ranks, stage, stored):
    runs = [
        ranks(2)(in_small_chunks, stage, 4, offload_second_moment=offload, second_moment_dtype=stored, clip=0.2)
        for offload in (False, True)
    ]
    for resident, offloaded in zip(*runs, strict=True):
        assert_same(offloaded.params, resident.params)
        for name, state in resident.state.items():
            assert_same(offloaded.state[name], state)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("stored", [None, torch.bfloat16])
def test_checkpoints_do_not_tell(tmp_path, saved, stored):
    """Saved with offload it goes on without, and the other way round, to the last bit; in torch's form too."""
    with chunks_of(SMALL):
        uninterrupted, _ = train(7, second_moment_dtype=stored)
        first, optimizer = train(4, offload_second_moment=saved, second_moment_dtype=stored)
        loft_ds.save_checkpoint(optimizer, tmp_path)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        for native in (False, True):
            model = odd_model()
            resumed = LoFTAdamW(
                model, lr=1e-2, params=two_groups(model), offload_second_moment=not saved, second_moment_dtype=stored
            )
            if native:
                for name, p in trained(model).items():
                    p.data.copy_(first[name])
                resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
            else:
                loft_ds.load_checkpoint(resumed, tmp_path)
            assert_same(train(7, start=4, model=model, optimizer=resumed)[0], uninterrupted)


def test_two_chunks_are_all_that_it_takes():
    """Of a second moment of 8 MB (4000 rows at r = 31) a step has but two chunks on the device."""
    chunk, peaks = 1 << 19, {}
    for offload in (False, True):
        model, A, B, _ = one_layer(40, 4000, 31, dtype=torch.float32)
        optimizer = LoFTAdamW(model, offload_second_moment=offload)
        with chunks_of(chunk):
            for _ in range(4):
                A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
                with Allocations() as allocations:  # of the last step, in which A moves
                    optimizer.step()
        peaks[offload] = allocations.peak
        assert max(t.nbytes for t in second_moments(optimizer).values()) > 15 * chunk
    assert chunk < peaks[True] - peaks[False] <= 2 * chunk


def test_where_it_rests(monkeypatch):
    """On a machine without an accelerator it is plain memory; with one it is pinned, also after a load."""
    pinned = []
    monkeypatch.setattr(stream.torch, "zeros", lambda *shape, pin_memory, **_: pinned.append(pin_memory))
    stream.zeros_at_home((2, 3), torch.float32, torch.device("cuda", 0))
    stream.zeros_at_home((2, 3), torch.float32, torch.device("cpu"))
    assert pinned == [True, False]
    monkeypatch.undo()
    asked = []
    there = SimpleNamespace(cpu=lambda: there, is_pinned=lambda: False, pin_memory=lambda: asked.append("pin"))
    stream.at_home(there, torch.device("cuda", 0))
    assert asked == ["pin"]
    plain = torch.zeros(3)
    assert stream.at_home(plain, torch.device("cpu")) is plain


def test_only_matrices_are_offloaded():
    with pytest.raises(ValueError, match="offload_second_moment is for the matrix form"):
        LoFTAdamW(odd_model(), offload_second_moment=True, blocks=Blocks(second_moment="elementwise"))
