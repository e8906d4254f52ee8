"""The two passes over the second moment in plain torch: packed, tiled, for any device.

With the upper triangle of ``P_i`` as a vector and the off-diagonal products of ``q_j`` doubled, the
denominators ``V_ij = q_j P_i q_j.T`` are one matrix product, ``V = packed @ khatri_rao(Q)``: half the
arithmetic of the published form and none of its (k, r, l) temporary. Rows and columns are taken in tiles, so
that the extra memory never exceeds :data:`WORKSPACE_BYTES` and a tile is still in cache when it is divided.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import Quotient
from .storage import read_rows, write_rows_

# Upper limit of the extra memory of one call besides its result, whatever the shapes; tests measure it.
WORKSPACE_BYTES = 64 << 20

# Tiles of V, measured on two cores (README.md). The inner loop runs over rows, so that the matrix products see
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


def khatri_rao(basis: Tensor, scale: float = 1.0) -> Tensor:
    """All ``q_js * q_jt``, s <= t, doubled off the diagonal, (p, l): ``packed`` times them is ``V``, here scaled."""
    i, j = _triangle(basis.shape[1], basis.device)
    weights = scale * (2 - (i == j).to(basis.dtype))
    transposed = basis.T.contiguous()
    return transposed[i].mul_(transposed[j]).mul_(weights[:, None])


def _update_tiles(
    momentum: Tensor,
    packed: Tensor,
    basis: Tensor,
    quotient: Quotient,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields rows, columns and that tile of ``U`` (see :func:`reference.normalized_update`); valid until the next."""
    column_bytes = packed.shape[1] * momentum.element_size()
    # At most half of the workspace for Khatri-Rao products, which while they are built exist twice, and a quarter for
    # the tile of P that is converted where P is stored in another dtype.
    column_tiles = _slices(basis.shape[0], min(TILE_COLUMNS, max(1, WORKSPACE_BYTES // 4 // column_bytes)))
    most_rows = TILE_ROWS if packed.dtype == momentum.dtype else max(1, WORKSPACE_BYTES // 4 // column_bytes)
    row_tiles = _slices(momentum.shape[0], min(TILE_ROWS, most_rows))
    tile = max(map(_length, row_tiles), default=0) * max(map(_length, column_tiles), default=0)
    second_buffer, first_buffer = momentum.new_empty(2, tile)
    one = momentum.new_ones(())
    tiny = torch.finfo(momentum.dtype).tiny
    limit = quotient.bound * math.sqrt(quotient.correction2) / quotient.correction1

    for columns in column_tiles:
        products = khatri_rao(basis[columns], 1 / quotient.correction2)
        directions = basis[columns].T / quotient.correction1
        for rows in row_tiles:
            shape = _length(rows), _length(columns)
            second = second_buffer[: shape[0] * shape[1]].view(shape)
            first = first_buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(read_rows(packed, rows, momentum.dtype), products, out=second)
            torch.mm(momentum[rows], directions, out=first)
            # With w = 1 / sqrt(V): M / (sqrt(V) + eps) = M w / (1 + eps w) and |M| <= bound sqrt(V) is |M w| <= bound.
            # Fewer and cheaper passes than the definition; V = 0 ends in w so large that the quotient is 0.
            inverse_root = second.clamp_min_(tiny).rsqrt_()
            first.mul_(inverse_root)
            if limit != math.inf:
                first.clamp_(-limit, limit)
            torch.add(one, inverse_root, alpha=quotient.eps, out=inverse_root)
            yield rows, columns, first.div_(inverse_root)
        del products  # before the next ones are built


def normalized_update(
    momentum: Tensor,
    packed: Tensor,
    basis: Tensor,
    quotient: Quotient,
) -> Tensor:
    """AdamW's step ``U`` (k, l) on the full matrix. See :func:`reference.normalized_update`."""
    update = momentum.new_empty(momentum.shape[0], basis.shape[0])
    for rows, columns, tile in _update_tiles(momentum, packed, basis, quotient):
        update[rows, columns] = tile
    return update


def projected_update(
    momentum: Tensor,
    packed: Tensor,
    basis: Tensor,
    quotient: Quotient,
) -> Tensor:
    """``U @ basis`` (k, r) without ``U``. See :func:`reference.projected_update`."""
    projected = torch.zeros_like(momentum, memory_format=torch.contiguous_format)
    for rows, columns, tile in _update_tiles(momentum, packed, basis, quotient):
        projected[rows].addmm_(tile, basis[columns])
    return projected


def accumulate_second_moment_(
    packed: Tensor,
    gradient: Tensor,
    beta2: float,
    *,
    pending: Tensor | None = None,
    rotation: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One pass over the second moments, in place. See :func:`reference.accumulate_second_moment_`.

    The resting step's gradient is rotated instead of its outer product: ``R.T h h.T R = (h R) (h R).T``, so both
    outer products are added at the end, in the same coordinates.

    Args:
        packed: second moments (k, r(r+1)/2), of the gradient's dtype or bfloat16 (see :mod:`.storage`).
        gradient: (k, r).
        beta2: decay.
        pending: (k, r).
        rotation: (r, r).
        seed: chooses the stochastic rounding of a bfloat16 ``packed``; the step number is a good one.
    """
    (k, rank), dtype = gradient.shape, gradient.dtype
    packed_of, square_of = _square(rank, gradient.device)
    decay = beta2 if pending is None else beta2**2
    # Three buffers: near the cache of a CPU, and with few launches elsewhere.
    share = 16 if gradient.device.type == "cpu" else 2
    most_rows = WORKSPACE_BYTES // share // (3 * rank**2 * gradient.element_size())
    row_tiles = _slices(k, min(TILE_ROWS, max(1, most_rows)))
    buffers = gradient.new_empty(3, max(map(_length, row_tiles), default=0), rank, rank)
    for rows in row_tiles:
        square, half, result = buffers[:, : _length(rows)]
        vectors = [math.sqrt(1 - beta2) * gradient[rows]]
        if pending is not None:
            turned = pending[rows] if rotation is None else pending[rows] @ rotation
            vectors.append(math.sqrt(beta2 * (1 - beta2)) * turned)
        recent = torch.stack(vectors, dim=1)
        torch.bmm(recent.mT, recent, out=result)
        tile = read_rows(packed, rows, dtype)
        if rotation is None:
            tile = tile.mul_(decay).add_(result.flatten(1)[:, square_of])
        else:
            torch.index_select(tile, 1, packed_of, out=square.flatten(1))
            torch.mm(square.flatten(0, 1), rotation, out=half.flatten(0, 1))
            result.baddbmm_(rotation.T.expand_as(result), half, alpha=decay)
            tile = result.flatten(1).index_select(1, square_of)
        write_rows_(packed, rows, tile, seed)
