"""The two passes over the second moment in plain torch: packed, tiled, for any device.

With the upper triangle of ``P_i`` as a vector and the off-diagonal products of ``q_j`` doubled, the
denominators ``V_ij = q_j P_i q_j.T`` are one matrix product, ``V = packed @ khatri_rao(Q)``: half the
arithmetic of the published form and none of its (k, r, l) temporary. Rows and columns are taken in tiles, so
that the extra memory never exceeds :data:`WORKSPACE_BYTES` and a tile is still in cache when it is divided.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..algebra import products_in
from .reference import Quotient
from .storage import read_rows, write_rows_

# Upper limit of the extra memory of one call besides its result, whatever the shapes; tests hold it.
WORKSPACE_BYTES = 64 << 20

# Tiles of V: README.md says why these. The inner loop runs over rows, so that the matrix products see
# tall tiles while the Khatri-Rao rows, which are built once a column tile, stay where they are.
TILE_ROWS, TILE_COLUMNS = 2048, 512


@functools.lru_cache(maxsize=64)
def _triangle(rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column (p,) of every entry of a packed triangle."""
    i, j = torch.triu_indices(rank, rank, device=device)
    return i, j


@functools.lru_cache(maxsize=64)
def _square(rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each entry of the square lies in the packed triangle (r * r,), and the other way round (p,)."""
    i, j = _triangle(rank, device)
    packed_of = torch.empty(rank, rank, dtype=torch.long, device=device)
    packed_of[i, j] = packed_of[j, i] = torch.arange(i.numel(), device=device)
    return packed_of.flatten(), i * rank + j


def _slices(size: int, most: int) -> list[slice]:
    """``range(size)`` in as few slices of at most ``most`` as possible, all about equally long."""
    step = math.ceil(size / max(1, math.ceil(size / most))) or 1
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _length(part: slice) -> int:
    return part.stop - part.start


def khatri_rao(basis: Tensor) -> Tensor:
    """All ``q_js * q_jt``, s <= t, doubled off the diagonal, (b, p, l): ``packed`` times them is ``V``."""
    i, j = _triangle(basis.shape[-1], basis.device)
    weights = 2 - (i == j).to(basis.dtype)
    transposed = basis.mT.contiguous()
    return transposed[:, i].mul_(transposed[:, j]).mul_(weights[:, None])


def _update_tiles(
    momentum: Tensor,
    packed: Sequence[Tensor],
    keys: Tensor,
    quotient: Quotient,
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Yields pairs, rows, columns and that tile of what the values of :meth:`Quotient.keys_and_values` are to be
    multiplied with; valid until the next.

    Args:
        momentum: of b pairs alike, (b, k, r).
        packed: their second moments, b of (k, r(r+1)/2).
        keys: (b, l, r).
        quotient: its eps and its bound.
    """
    count, size, rank = momentum.shape
    width, dtype = keys.shape[1], momentum.dtype
    column_bytes = rank * (rank + 1) // 2 * momentum.element_size()
    # At most half of the workspace for Khatri-Rao products, which while they are built exist twice, and a quarter for
    # the tile of P that is copied where P is stored in another dtype or several pairs are taken together.
    most_rows = min(TILE_ROWS, max(1, WORKSPACE_BYTES // 4 // column_bytes))
    row_tiles = _slices(size, TILE_ROWS if packed[0].dtype == dtype else most_rows)
    most_columns = min(TILE_COLUMNS, max(1, WORKSPACE_BYTES // 4 // column_bytes))
    most_pairs = max(1, WORKSPACE_BYTES // 4 // column_bytes // most_columns)
    batches = _slices(count, min(most_pairs, max(1, most_rows // max(1, size))))
    column_tiles = _slices(width, most_columns)
    tile = math.prod(max(map(_length, parts), default=0) for parts in (batches, row_tiles, column_tiles))
    second_buffer, first_buffer = momentum.new_empty(2, tile)
    one = momentum.new_ones(())
    tiny = torch.finfo(dtype).tiny

    for pairs, columns in itertools.product(batches, column_tiles):
        products, directions = khatri_rao(keys[pairs, columns]), keys[pairs, columns].mT
        for rows in row_tiles:
            shape = _length(pairs), _length(rows), _length(columns)
            second = second_buffer[: math.prod(shape)].view(shape)
            first = first_buffer[: math.prod(shape)].view(shape)
            with nullcontext() if quotient.precision == "ieee" else products_in(quotient.precision):
                torch.bmm(read_rows(packed[pairs], rows, dtype), products, out=second)
            torch.bmm(momentum[pairs, rows], directions, out=first)
            # With w = 1 / sqrt(V): M / (sqrt(V) + eps) = M w / (1 + eps w) and |M| <= bound sqrt(V) is |M w| <= bound.
            # Fewer and cheaper passes than the definition; V = 0 ends in w so large that the quotient is 0.
            inverse_root = second.clamp_min_(tiny).rsqrt_()
            first.mul_(inverse_root)
            if quotient.bound != math.inf:
                first.clamp_(-quotient.bound, quotient.bound)
            torch.add(one, inverse_root, alpha=quotient.eps, out=inverse_root)
            yield pairs, rows, columns, first.div_(inverse_root)
        del products  # before the next ones are built


def normalized_update(
    momentum: Tensor,
    packed: Sequence[Tensor],
    basis: Tensor,
    quotient: Quotient,
) -> Tensor:
    """AdamW's step ``U`` (b, k, l) on the full matrices. See :func:`reference.normalized_update`."""
    update = momentum.new_empty(*momentum.shape[:2], basis.shape[1])
    keys, _ = quotient.keys_and_values(basis)
    for pairs, rows, columns, tile in _update_tiles(momentum, packed, keys, quotient):
        update[pairs, rows, columns] = tile
    return update.mul_((quotient.correction2.sqrt() / quotient.correction1).unsqueeze(1))


def projected_update(
    momentum: Tensor,
    packed: Sequence[Tensor],
    basis: Tensor,
    quotient: Quotient,
) -> Tensor:
    """``U @ basis`` (b, k, r) without ``U``. See :func:`reference.projected_update`.

    Args:
        momentum: of b pairs alike, (b, k, r).
        packed: their second moments, b of (k, r(r+1)/2), which need not lie together.
        basis: (b, l, r).
        quotient: this step's corrections, eps and bound.
    """
    projected = torch.zeros_like(momentum, memory_format=torch.contiguous_format)
    keys, values = quotient.keys_and_values(basis)
    for pairs, rows, columns, tile in _update_tiles(momentum, packed, keys, quotient):
        projected[pairs, rows].baddbmm_(tile, values[pairs, columns])
    return projected


def accumulate_second_moment_(
    packed: Sequence[Tensor],
    gradient: Tensor,
    beta2: float,
    *,
    pending: Tensor | None = None,
    rotation: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One pass over the second moments, in place. See :func:`reference.accumulate_second_moment_`.

    Both outer products are added at the end, in the same coordinates.

    Args:
        packed: second moments of b pairs alike, b of (k, r(r+1)/2), of the gradient's dtype or bfloat16 (see
            :mod:`.storage`).
        gradient: (b, k, r).
        beta2: decay.
        pending: (b, k, r), in this step's coordinates as the gradient is.
        rotation: (b, r, r).
        seed: chooses the stochastic rounding of a bfloat16 ``packed``; the step number is a good one.
    """
    (count, size, rank), dtype = gradient.shape, gradient.dtype
    packed_of, square_of = _square(rank, gradient.device)
    decay = beta2 if pending is None else beta2**2
    # Three buffers: near the cache of a CPU, and with few launches elsewhere.
    share = 16 if gradient.device.type == "cpu" else 2
    most_rows = min(TILE_ROWS, max(1, WORKSPACE_BYTES // share // (3 * rank**2 * gradient.element_size())))
    row_tiles = _slices(size, most_rows)
    batches = _slices(count, max(1, most_rows // max(1, size)))
    longest = math.prod(max(map(_length, parts), default=0) for parts in (batches, row_tiles))
    buffers = gradient.new_empty(3, longest, rank, rank)
    for pairs, rows in itertools.product(batches, row_tiles):
        shape = _length(pairs), _length(rows)
        square, half, result = buffers[:, : math.prod(shape)]
        vectors = [math.sqrt(1 - beta2) * gradient[pairs, rows]]
        if pending is not None:
            vectors.append(math.sqrt(beta2 * (1 - beta2)) * pending[pairs, rows])
        recent = torch.stack(vectors, dim=2).flatten(0, 1)
        torch.bmm(recent.mT, recent, out=result)
        tile = read_rows(packed[pairs], rows, dtype)
        if rotation is None:
            tile = tile.mul_(decay).add_(result.flatten(1)[:, square_of].view_as(tile))
        else:
            torch.index_select(tile.flatten(0, 1), 1, packed_of, out=square.flatten(1))
            wide = shape[0], shape[1] * rank, rank
            torch.bmm(square.view(wide), rotation[pairs], out=half.view(wide))
            # One product a pair: a common one would need the transposed tile, or a copy of R for each row.
            for turn, right, sums in zip(rotation[pairs], half.chunk(shape[0]), result.chunk(shape[0]), strict=True):
                sums.baddbmm_(turn.T.expand_as(right), right, alpha=decay)
            tile = result.flatten(1).index_select(1, square_of).view_as(tile)
        write_rows_(packed[pairs], rows, tile, seed)
