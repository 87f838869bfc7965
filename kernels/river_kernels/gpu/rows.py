"""What kernels over tiles of rows have in common: where a tile lies, and how a factor of an adapter is read."""

from __future__ import annotations

import triton
import triton.language as tl

from river_kernels.gpu.configs import Alignment
from river_kernels.gpu.tables import A, gradient_of, rank_of, weights_of

# Whether a factor is stored once for each expert or once for all.
EACH: tl.constexpr = tl.constexpr(False)
ALL: tl.constexpr = tl.constexpr(True)

_NOTHING: tl.constexpr = tl.constexpr(Alignment.NOTHING.value)
_ADDRESSES_AND_RANKS: tl.constexpr = tl.constexpr(Alignment.ADDRESSES_AND_RANKS.value)


@triton.jit
def tile_at(tiles, tile_count, tile):
    """Slot, expert, first row and end of a tile, see `Tiles`."""
    slot = tl.load(tiles + tile)
    expert = tl.load(tiles + tile_count + tile)
    start = tl.load(tiles + 2 * tile_count + tile)
    end = tl.load(tiles + 3 * tile_count + tile)
    return slot, expert, start, end


@triton.jit
def rank_at(table, slots, slot, ALIGNED: tl.constexpr):
    """The rank of an adapter; where all are multiples of eight the compiler sees that it is."""
    rank = rank_of(table, slots, slot)
    return rank // 8 * 8 if ALIGNED == _ADDRESSES_AND_RANKS else rank


@triton.jit
def factor_of(
    table,
    slots,
    slot,
    expert,
    width,
    rank,
    like,
    WHICH: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A pointer to A [r, width] or B [width, r] of an adapter and expert; all experts have one if it is `SHARED`."""
    factor = weights_of(table, slots, slot, WHICH, like)
    if ALIGNED != _NOTHING:
        factor = tl.multiple_of(factor, 16)
    if not SHARED:
        factor += expert * (width.to(tl.int64) * rank)
    return factor


@triton.jit
def load_factor(factor, width, rank, places, ranks, WHICH: tl.constexpr):
    """[places, ranks] of a factor, zero where it has none; `places` and `ranks` are vectors of indices."""
    offsets = _offsets(width, rank, places, ranks, WHICH)
    mask = (places[:, None] < width) & (ranks[None, :] < rank)
    return tl.load(factor + offsets, mask=mask, other=0.0)


@triton.jit
def add_to_gradient(
    sums,
    table,
    slots,
    slot,
    expert,
    width,
    rank,
    places,
    ranks,
    WHICH: tl.constexpr,
    GRADIENT: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Adds `sums` [places, ranks] to the gradient of a factor, which is there."""
    gradient = gradient_of(table, slots, slot, GRADIENT)
    if ALIGNED != _NOTHING:
        gradient = tl.multiple_of(gradient, 16)
    if not SHARED:
        gradient += expert * (width.to(tl.int64) * rank)
    gradient += _offsets(width, rank, places, ranks, WHICH)
    mask = (places[:, None] < width) & (ranks[None, :] < rank)
    tl.store(gradient, tl.load(gradient, mask=mask, other=0.0) + sums, mask=mask)


@triton.jit
def _offsets(width, rank, places, ranks, WHICH: tl.constexpr):
    if WHICH == A:
        return ranks[None, :] * width + places[:, None]
    return places[:, None] * rank + ranks[None, :]
