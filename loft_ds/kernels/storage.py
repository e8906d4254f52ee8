"""How the second moment is kept between steps: in the arithmetic's own dtype, or in bfloat16 to halve it.

The kernels read and write it tile by tile, so a float32 copy of all of it never exists.

bfloat16 has 8 significant bits and a step with beta2 = 0.999 changes an entry by 0.1%: rounded to the nearest, the
second moment would never move again. So it is rounded stochastically, up with the probability that keeps the
expected value exact. The random bits are a hash of the value itself and of a seed, not of a generator: the result is
the same on every device and however the rows are split over ranks, and nobody's random state is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Multipliers of the 32-bit hash "lowbias32", https://nullprogram.com/blog/2018/07/31/, as signed integers.
HASH_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
# Odd and irregular, so that consecutive seeds give unrelated bits.
SEED_MULTIPLIER = 0x9E3779B9


def seed_word(seed: int) -> int:
    """``seed`` spread over 32 bits, as a signed integer."""
    word = seed * SEED_MULTIPLIER & 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def round_stochastically(values: Tensor, seed: int) -> Tensor:
    """``values`` (float32) in bfloat16, each rounded up or down with an expected value of itself."""
    bits = values.contiguous().view(torch.int32)
    noise = bits ^ seed_word(seed)
    # Shifts of a signed integer repeat its sign; the masks make them shifts of an unsigned one.
    noise ^= (noise >> 16) & 0xFFFF
    noise *= HASH_MULTIPLIERS[0]
    noise ^= (noise >> 15) & 0x1FFFF
    noise *= HASH_MULTIPLIERS[1]
    noise ^= (noise >> 16) & 0xFFFF
    # A carry out of the 16 bits that bfloat16 lacks is one unit in its last place. Infinities and NaN must not carry.
    rounded = (bits + (noise & 0xFFFF)) & -0x10000
    return torch.where(values.isfinite(), rounded.view(torch.float32), values).to(torch.bfloat16)


def read_rows(packed: Sequence[Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of b second moments (b, rows, p) in ``dtype``: a view of a single one stored in it, a copy elsewhere."""
    parts = [each[rows] for each in packed]
    return (parts[0][None] if len(parts) == 1 else torch.stack(parts)).to(dtype)


def write_rows_(packed: Sequence[Tensor], rows: slice, values: Tensor, seed: int) -> None:
    """Put rows (b, rows, p) back. ``values`` may be the view that :func:`read_rows` gave."""
    parts = [each[rows] for each in packed]
    if values.dtype != parts[0].dtype:
        values = round_stochastically(values.float(), seed)
    if values.data_ptr() != parts[0].data_ptr():
        torch._foreach_copy_(parts, list(values.unbind()))
