"""From the width of the model to the ranks of the adapters: v = x A^T, or dy B, of tokens and of rows."""

# Tensors carry their shape in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from river_kernels.gpu.configs import (
    RANK_BLOCK,
    SHRINK_BYTES,
    SHRINK_STAGES,
    Alignment,
    block_of,
)
from river_kernels.gpu.dequantize import rounded
from river_kernels.gpu.launch import dot, launch
from river_kernels.gpu.rows import factor_of, load_factor, rank_at, tile_at
from river_kernels.gpu.tables import A, AdapterTable
from river_kernels.gpu.tiles import Tiles


def shrink(
    x_RW: torch.Tensor,
    v_NR: torch.Tensor,
    table: AdapterTable,
    tiles: Tiles,
    factor: tl.constexpr = A,
    *,
    shared: bool,
    alignment: Alignment,
    rows: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    rank_min: int = 1,
) -> None:
    """Writes `x A^T`, or with `factor` B `x B`, of every row of the tiles into `v_NR` [N, rank_max].

    `rows` int32 [N] says which row of x each row of v is of (else the same), and `weight` [N] multiplies. Columns that
    an adapter's rank does not reach are left alone, and so are adapters of ranks below `rank_min`.
    """
    width, rank_blocks = x_RW.shape[1], triton.cdiv(table.rank_max, RANK_BLOCK)
    assert x_RW.stride(1) == v_NR.stride(1) == 1
    launch(
        shrink_rows,
        (tiles.count * rank_blocks,),
        x_RW,
        v_NR,
        v_NR if rows is None else rows,
        v_NR if weight is None else weight,
        table.rows,
        tiles.rows,
        tiles.count,
        rank_blocks,
        table.slots,
        width,
        x_RW.stride(0),
        v_NR.stride(0),
        warps=4,
        stages=SHRINK_STAGES,
        WHICH=factor.value,
        SHARED=shared,
        ALIGNED=alignment.value,
        MAPPED=rows is not None,
        WEIGHTED=weight is not None,
        RANK_MIN=rank_min,
        ROWS=tiles.block,
        RANKS=RANK_BLOCK,
        DEPTH=block_of(width, SHRINK_BYTES, x_RW.dtype),
    )


@triton.jit
def shrink_rows(
    x,  # [R, width]
    v,  # [N, rank_max]
    row_map,  # int32 [N], if MAPPED
    weight,  # [N], if WEIGHTED
    table,
    tiles,
    tile_count,
    rank_blocks,
    slots,
    width,
    x_stride,
    v_stride,
    WHICH: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RANK_MIN: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of rows and one block of ranks; the blocks of a tile are beside each other, as they read the same x."""
    slot, expert, start, end = tile_at(tiles, tile_count, tl.program_id(0) // rank_blocks)
    rank = rank_at(table, slots, slot, ALIGNED)
    first_rank = tl.program_id(0) % rank_blocks * RANKS
    if start >= end or first_rank >= rank or rank < RANK_MIN:
        return
    factor = factor_of(table, slots, slot, expert, width, rank, x, WHICH, SHARED, ALIGNED)
    ranks = first_rank + tl.arange(0, RANKS)
    rows = start + tl.arange(0, ROWS)
    inside = rows < end
    sources = tl.load(row_map + rows, mask=inside, other=0) if MAPPED else rows
    x += sources.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((ROWS, RANKS), tl.float32)
    for first in range(0, width, DEPTH):
        places = first + tl.arange(0, DEPTH)
        x_tile = tl.load(
            x + places[None, :], mask=inside[:, None] & (places[None, :] < width), other=0.0
        )
        factor_tile = load_factor(factor, width, rank, places, ranks, WHICH)
        sums = dot(x_tile, factor_tile, sums, UPCAST)
    if WEIGHTED:
        sums *= tl.load(weight + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(
        v + rows.to(tl.int64)[:, None] * v_stride + ranks[None, :],
        rounded(sums, v, UPCAST),
        mask=inside[:, None] & (ranks[None, :] < rank),
    )
