"""The two passes over the second moment on CUDA, in Triton: nothing but (k, r) and (l, r) data leaves the chip.

:func:`projected_update` has the structure of flash attention. A program owns a tile of rows ``[P_i, M_i]``, the
queries, and streams over the rows ``q_j`` of the basis: from them it builds a tile of Khatri-Rao products, the keys,
block by block along the packed triangle, accumulates ``V`` and ``M``, divides, and multiplies back with ``q_j``, the
values. Bias corrections ride on keys and values (:meth:`reference.Quotient.keys_and_values`). An elementwise function
stands where attention has its softmax, so no running maximum is needed. The pairs of a batch are the heads: one launch
for all. Their second moments are found through a table of addresses, where they are.

float32 only; products are 3xTF32 on tensor cores (single TF32 keeps 10 bits, which is too few). The choice
of the autotuner changes which program does a row, never the order of a sum: results do not depend on it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiled
from .reference import Precision, Quotient
from .storage import HASH_MULTIPLIERS, seed_word

# A program rotates one row's (r, r) matrix in registers; plain torch takes over where it does not fit.
LARGEST_ACCUMULATED_RANK = 64

_MULTIPLIER_1, _MULTIPLIER_2 = (tl.constexpr(m) for m in HASH_MULTIPLIERS)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

_CONFIGS = [
    triton.Config({"ROWS": 64}, num_warps=4, num_stages=2),
    triton.Config({"ROWS": 64}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 128}, num_warps=8, num_stages=2),
    triton.Config({"ROWS": 128}, num_warps=8, num_stages=3),
    triton.Config({"ROWS": 32}, num_warps=4, num_stages=2),  # for devices with little shared memory
]
if os.environ.get("TRITON_INTERPRET") == "1":
    _CONFIGS = [triton.Config({"ROWS": 16})]  # nothing to measure; small, so that tests cross tile borders


@triton.jit
def _packed_of(table, pair, stored: tl.constexpr, aligned: tl.constexpr):  # type: ignore[no-untyped-def]
    """The second moments of one pair of the batch."""
    packed = tl.load(table + pair).to(tl.pointer_type(stored))
    if aligned:
        packed = tl.multiple_of(packed, 16)
    return packed


def _alike(configs: list[Any], *_: Any, **__: Any) -> list[Any]:
    """The choices that round alike: from a Hopper on one unit multiplies 64 rows and more, and another one fewer."""
    one_unit = torch.version.hip is not None or torch.cuda.get_device_capability() < (9, 0)
    return [c for c in configs if c.kwargs["ROWS"] >= 64 or one_unit]


@triton.autotune(
    _CONFIGS, key=["RANK", "stored", "DENOMINATORS", "size"], prune_configs_by={"early_config_prune": _alike}
)
@triton.jit(do_not_specialize=["size"])
def _projected_update_kernel(  # type: ignore[no-untyped-def]
    momentum,  # (b, k, RANK), contiguous
    table,  # int64 (b,): where each pair's packed (k, RANK (RANK + 1) / 2) lies, contiguous
    keys_t,  # (b, RANK, l), contiguous
    values,  # (b, l, RANK), contiguous
    triangle,  # int32 (2, RANK (RANK + 1) / 2): row and column of every packed entry
    out,  # (splits, b, k, RANK), contiguous
    k,
    width,  # l, how many rows the basis has
    columns_a_split,
    size,  # of the work, in powers of two: the autotuner's choice is not that for the first shape met
    eps,
    bound,
    stored: tl.constexpr,
    aligned: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    DENOMINATORS: tl.constexpr,
):
    """``out[split, pair, rows] = quotient[rows, columns of the split] @ values[columns of the split]``."""
    LENGTH: tl.constexpr = RANK * (RANK + 1) // 2
    pair = tl.program_id(2).to(tl.int64)
    packed = _packed_of(table, pair, stored, aligned)
    momentum += pair * k * RANK
    keys_t += pair * width * RANK
    values += pair * width * RANK
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    in_rows = rows[:, None] < k
    # 64 bits: k * r (r + 1) / 2 passes 2**31 for one layer of a large model at r = 128.
    wide_rows = rows.to(tl.int64)[:, None]
    features = tl.arange(0, PADDED)
    in_rank = features < RANK
    block = tl.arange(0, BLOCK)

    total = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    stop = tl.minimum((split + 1) * columns_a_split, width)
    for start in range(split * columns_a_split, stop, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        in_columns = columns < stop
        second = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for offset in range(0, LENGTH, BLOCK):
            entries = offset + block
            in_length = entries < LENGTH
            s = tl.load(triangle + entries, mask=in_length, other=0)
            t = tl.load(triangle + LENGTH + entries, mask=in_length, other=0)
            loaded = in_length[:, None] & in_columns[None, :]
            q_s = tl.load(keys_t + s[:, None] * width + columns[None, :], mask=loaded, other=0.0)
            q_t = tl.load(keys_t + t[:, None] * width + columns[None, :], mask=loaded, other=0.0)
            products = q_s * q_t * tl.where(s == t, 1.0, 2.0)[:, None]
            p = tl.load(packed + wide_rows * LENGTH + entries[None, :], mask=in_rows & in_length[None, :], other=0.0)
            if DENOMINATORS == "bf16":
                second = tl.dot(p.to(tl.bfloat16), products.to(tl.bfloat16), acc=second)
            elif DENOMINATORS == "rounded":
                p, products = p.to(tl.bfloat16).to(tl.float32), products.to(tl.bfloat16).to(tl.float32)
                second = tl.dot(p, products, acc=second, input_precision="ieee")
            else:
                second = tl.dot(p.to(tl.float32), products, acc=second, input_precision=DENOMINATORS)
        # M's rows would fit in registers, but not beside the sums: they are read again, as P's are.
        first = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for offset in range(0, PADDED, PART):
            part = offset + tl.arange(0, PART)
            in_part = part < RANK
            m = tl.load(momentum + wide_rows * RANK + part[None, :], mask=in_rows & in_part[None, :], other=0.0)
            loaded = in_part[:, None] & in_columns[None, :]
            q = tl.load(keys_t + part[:, None] * width + columns[None, :], mask=loaded, other=0.0)
            first = tl.dot(m, q, acc=first, input_precision=PRECISION)
        # See tiled._update_tiles for the form of the quotient. Padded columns have first = 0, so the quotient is 0.
        inverse_root = tl.rsqrt(tl.maximum(second, _TINY, propagate_nan=tl.PropagateNan.ALL))
        quotient = tl.maximum(first * inverse_root, -bound, propagate_nan=tl.PropagateNan.ALL)
        quotient = tl.minimum(quotient, bound, propagate_nan=tl.PropagateNan.ALL)
        quotient = quotient / (1.0 + eps * inverse_root)
        loaded = in_columns[:, None] & in_rank[None, :]
        v = tl.load(values + columns[:, None] * RANK + features[None, :], mask=loaded, other=0.0)
        total = tl.dot(quotient, v, acc=total, input_precision=PRECISION)
    target = out + ((split * tl.num_programs(2) + pair) * k + wide_rows) * RANK + features[None, :]
    tl.store(target, total, mask=in_rows & in_rank[None, :])


@triton.jit
def _round_stochastically(values, seed):  # type: ignore[no-untyped-def]
    """:func:`storage.round_stochastically`, the same bits."""
    bits = values.to(tl.int32, bitcast=True)
    noise = bits ^ seed
    noise ^= (noise >> 16) & 0xFFFF
    noise *= _MULTIPLIER_1
    noise ^= (noise >> 15) & 0x1FFFF
    noise *= _MULTIPLIER_2
    noise ^= (noise >> 16) & 0xFFFF
    rounded = ((bits + (noise & 0xFFFF)) & -0x10000).to(tl.float32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, values).to(tl.bfloat16)


# A seed is divisible by 16 now and then, and a kernel of its own for that would be compiled in the middle of a run.
@triton.jit(do_not_specialize=["seed"])
def _accumulate_kernel(  # type: ignore[no-untyped-def]
    table,  # int64 (b,): where each pair's packed (k, RANK (RANK + 1) / 2) lies, contiguous
    gradient,  # (b, k, RANK), contiguous
    pending,  # (b, k, RANK), contiguous
    rotation,  # (b, RANK, RANK), contiguous
    k,
    decay,
    gradient_weight,
    pending_weight,
    seed,
    HAS_PENDING: tl.constexpr,
    HAS_ROTATION: tl.constexpr,
    stored: tl.constexpr,
    aligned: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row: unpack, rotate, decay, add the outer products, pack."""
    LENGTH: tl.constexpr = RANK * (RANK + 1) // 2
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    packed = _packed_of(table, pair, stored, aligned)
    gradient += pair * k * RANK
    pending += pair * k * RANK
    rotation += pair * RANK * RANK
    features = tl.arange(0, PADDED)
    in_rank = features < RANK
    i, j = features[:, None], features[None, :]
    inside = (i < RANK) & (j < RANK)
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    place = packed + row * LENGTH + low * RANK - low * (low - 1) // 2 + high - low
    full = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ROTATION:
        r = tl.load(rotation + i * RANK + j, mask=inside, other=0.0)
        full = tl.dot(full, r, input_precision=PRECISION)
        full = tl.dot(tl.trans(r), full, input_precision=PRECISION)
    g = tl.load(gradient + row * RANK + features, mask=in_rank, other=0.0)
    full = decay * full + gradient_weight * g[:, None] * g[None, :]
    if HAS_PENDING:
        h = tl.load(pending + row * RANK + features, mask=in_rank, other=0.0)
        full += pending_weight * h[:, None] * h[None, :]
    # The load reads every entry off the diagonal twice, from threads that may not be the one that writes it.
    tl.debug_barrier()
    if stored == tl.bfloat16:
        tl.store(place, _round_stochastically(full, seed), mask=inside & (i <= j))
    else:
        tl.store(place, full, mask=inside & (i <= j))


@functools.cache
def _precision(device: torch.device, least: Precision = "ieee") -> str:
    """How ``tl.dot`` multiplies float32: on tensor cores where they can do 3xTF32, or what less is allowed."""
    if device.type == "cpu":  # the interpreter, which has no TF32 and multiplies the bits of bfloat16 as integers
        return "rounded" if least == "bf16" else "ieee"
    tensor_cores = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return {"ieee": "tf32x3"}.get(least, least) if tensor_cores else "ieee"


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=64)
def _triangle(rank: int, device: torch.device) -> Tensor:
    return torch.triu_indices(rank, rank, dtype=torch.int32, device=device)


def _padded(rank: int) -> int:
    """``tl.dot`` takes powers of two from 16 on."""
    return max(16, triton.next_power_of_2(rank))


def _stored(packed: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Contiguous second moments, the table of their addresses, and what the kernels are compiled for."""
    laid = [each.contiguous() for each in packed]
    places = [each.data_ptr() for each in laid]
    constants = {
        "stored": tl.float32 if laid[0].dtype == torch.float32 else tl.bfloat16,
        "aligned": all(place % 16 == 0 for place in places),
    }
    # Waiting for the device here would leave it without work between any two launches.
    return laid, torch.tensor(places, dtype=torch.int64).to(laid[0].device, non_blocking=True), constants


def supports(momentum: Tensor, packed: Tensor) -> bool:
    """Whether these kernels take tensors of these dtypes."""
    return momentum.dtype == torch.float32 and packed.dtype in (torch.float32, torch.bfloat16)


def projected_update(
    momentum: Tensor,
    packed: Sequence[Tensor],
    basis: Tensor,
    quotient: Quotient,
) -> Tensor:
    """``U @ basis`` (b, k, r) without ``U``. See :func:`tiled.projected_update`."""
    (count, k, rank), width = momentum.shape, basis.shape[1]
    if not k or not width:
        return momentum.new_zeros(count, k, rank)
    columns = 64 if rank <= 64 else 32  # as wide as the sums fit in registers on sm_90
    # Few rows leave processors idle: then several programs share a tile of rows, each with a part of the columns.
    # Partial sums are added in a fixed order, so that a run can be repeated bit by bit.
    wanted = triton.cdiv(2 * _processors(momentum.device), count * triton.cdiv(k, 64))
    columns_a_split = triton.cdiv(triton.cdiv(width, columns), wanted) * columns
    splits = triton.cdiv(width, columns_a_split)
    out = momentum.new_empty(splits, count, k, rank)
    keys, values = quotient.keys_and_values(basis.contiguous())
    _alive, table, constants = _stored(packed)
    with torch.cuda.device_of(momentum):  # Triton launches on the current device, whatever its arguments' is
        _projected_update_kernel[lambda meta: (triton.cdiv(k, meta["ROWS"]), splits, count)](
            momentum.contiguous(),
            table,
            keys.mT.contiguous(),
            values,
            _triangle(rank, momentum.device),
            out,
            k,
            width,
            columns_a_split,
            (count * k * width).bit_length(),
            quotient.eps,
            quotient.bound,
            **constants,
            RANK=rank,
            PADDED=_padded(rank),
            COLUMNS=columns,
            BLOCK=32,
            PART=min(32, _padded(rank)),
            PRECISION=_precision(momentum.device),
            DENOMINATORS=_precision(momentum.device, quotient.precision),
        )
    return out[0] if splits == 1 else out.sum(0)


def accumulate_second_moment_(
    packed: Sequence[Tensor],
    gradient: Tensor,
    beta2: float,
    *,
    pending: Tensor | None = None,
    rotation: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One pass over the second moments, in place. See :func:`tiled.accumulate_second_moment_`."""
    count, k, rank = gradient.shape
    if not k:
        return
    if rank > LARGEST_ACCUMULATED_RANK:
        tiled.accumulate_second_moment_(packed, gradient, beta2, pending=pending, rotation=rotation, seed=seed)
        return
    gradient = gradient.contiguous()
    pending = None if pending is None else pending.contiguous()
    laid, table, constants = _stored(packed)
    with torch.cuda.device_of(gradient):
        _accumulate_kernel[(k, count)](
            table,
            gradient,
            gradient if pending is None else pending,
            gradient if rotation is None else rotation.contiguous(),
            k,
            beta2 if pending is None else beta2**2,
            1 - beta2,
            beta2 * (1 - beta2),
            seed_word(seed),
            HAS_PENDING=pending is not None,
            HAS_ROTATION=rotation is not None,
            **constants,
            RANK=rank,
            PADDED=_padded(rank),
            PRECISION=_precision(gradient.device),
            num_warps=4 if rank > 32 else 1,
        )
    for target, source in zip(packed, laid, strict=True):
        if target is not source:
            target.copy_(source)
