"""What kernels over tiles of rows have in common: where a tile lies, and how a factor of an adapter is read."""

from __future__ import annotations

import triton
import triton.language as tl

from river_kernels.gpu.tables import A, gradient_of, weights_of

# Whether a factor is stored once for each expert or once for all.
EACH: tl.constexpr = tl.constexpr(False)
ALL: tl.constexpr = tl.constexpr(True)


@triton.jit
def tile_at(tiles, tile_count, tile):
    """Slot, expert, first row and end of a tile, see `Tiles`."""
    slot = tl.load(tiles + tile)
    expert = tl.load(tiles + tile_count + tile)
    start = tl.load(tiles + 2 * tile_count + tile)
    end = tl.load(tiles + 3 * tile_count + tile)
    return slot, expert, start, end


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
    if ALIGNED:
        factor = tl.multiple_of(factor, 16)
    if not SHARED:
        size = width.to(tl.int64) * _rank_step(rank, ALIGNED)
        factor += expert * size
    return factor


@triton.jit
def load_factor(factor, width, rank, places, ranks, WHICH: tl.constexpr, ALIGNED: tl.constexpr):
    """[places, ranks] of a factor, zero where it has none; `places` and `ranks` are vectors of indices."""
    offsets = _offsets(width, rank, places, ranks, WHICH, ALIGNED)
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
    if ALIGNED:
        gradient = tl.multiple_of(gradient, 16)
    if not SHARED:
        gradient += expert * (width.to(tl.int64) * _rank_step(rank, ALIGNED))
    gradient += _offsets(width, rank, places, ranks, WHICH, ALIGNED)
    mask = (places[:, None] < width) & (ranks[None, :] < rank)
    tl.store(gradient, tl.load(gradient, mask=mask, other=0.0) + sums, mask=mask)


@triton.jit
def _offsets(width, rank, places, ranks, WHICH: tl.constexpr, ALIGNED: tl.constexpr):
    if WHICH == A:
        return ranks[None, :] * width + places[:, None]
    return places[:, None] * _rank_step(rank, ALIGNED) + ranks[None, :]


@triton.jit
def _rank_step(rank, ALIGNED: tl.constexpr):
    """The rank; where threads may move 16 bytes at once, the compiler learns of it."""
    return tl.multiple_of(rank, 8) if ALIGNED else rank
