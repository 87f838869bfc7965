"""Into the columns of the adapters: x A^T, and dy B.

Programs that read the same rows follow each other, so that the second finds them in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from river_kernels.gpu.columns import (
    COLUMN_STEP,
    Columns,
    block_columns,
    column_rows,
    depth_of,
    first_column,
    first_rows,
)
from river_kernels.gpu.launch import dot, launch
from river_kernels.gpu.rows import tile_at
from river_kernels.gpu.tables import A, B
from river_kernels.gpu.tiles import Tiles

TOKENS = 64
"""Tokens that a program has; tiles are made with it."""

_WARPS = 4
_STAGES = 3


def project(
    x_TI: torch.Tensor,
    columns: Columns,
    tiles: Tiles,
    v_TC: torch.Tensor,
    widened_TJ: torch.Tensor | None = None,
) -> None:
    """`v_TC = scale * x A^T` by column, zero in the columns that a slot does not use.

    `widened_TJ` [T, in + pad] gets x and behind it v, for one product with a matrix that has B behind its own columns.
    """
    assert tiles.block == TOKENS
    inputs = x_TI.shape[1]
    copy = v_TC if widened_TJ is None else widened_TJ
    launch(
        project_tokens,
        (columns.width_max // COLUMN_STEP, tiles.count),
        x_TI,
        copy,
        v_TC,
        columns.table.rows,
        tiles.rows,
        tiles.count,
        columns.slots,
        inputs,
        copy.shape[1],
        x_TI.stride(0),
        copy.stride(0),
        v_TC.stride(0),
        warps=_WARPS,
        stages=_STAGES,
        BLOCKS=columns.blocks,
        ALIGNED=columns.alignment.a,
        COPY=widened_TJ is not None,
        TOKENS=TOKENS,
        COLUMNS=COLUMN_STEP,
        DEPTH=depth_of(x_TI),
    )


def project_back(dy_TO: torch.Tensor, columns: Columns, tiles: Tiles, dv_TC: torch.Tensor) -> None:
    """`dv_TC = dy B` by column, each block's columns from its own outputs; zero in columns that a slot does not use."""
    assert tiles.block == TOKENS
    launch(
        project_gradients,
        (-(-columns.table.rank_max // COLUMN_STEP), columns.blocks, tiles.count),
        dy_TO,
        dv_TC,
        columns.table.rows,
        tiles.rows,
        first_rows(columns.bounds, dy_TO.device),
        tiles.count,
        columns.slots,
        dy_TO.stride(0),
        dv_TC.stride(0),
        warps=_WARPS,
        stages=_STAGES,
        BLOCKS=columns.blocks,
        EVEN=columns.alignment.b,
        TOKENS=TOKENS,
        COLUMNS=COLUMN_STEP,
        DEPTH=depth_of(dy_TO),
    )


@triton.jit
def project_tokens(
    x,
    copy,
    v,
    table,
    tiles,
    tile_count,
    slots,
    inputs,
    copy_width,
    x_stride,
    copy_stride,
    v_stride,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    COPY: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of tokens and one group of columns; the first group copies x."""
    group, tile = tl.program_id(0), tl.program_id(1)
    slot, _expert, start, end = tile_at(tiles, tile_count, tile)
    used = first_column(table, slots, slot, BLOCKS, BLOCKS)
    if start >= end or group * COLUMNS >= used:
        return
    columns = group * COLUMNS + tl.arange(0, COLUMNS)
    a, _, scales = column_rows(table, slots, slot, columns, inputs, x, A, BLOCKS, ALIGNED)
    tokens = (start + tl.arange(0, TOKENS)).to(tl.int64)
    inside = tokens[:, None] < end
    is_used = columns[None, :] < used
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(0, inputs, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        x_tile = tl.load(
            x + tokens[:, None] * x_stride + depth[None, :],
            mask=inside & (depth[None, :] < inputs),
            other=0.0,
        )
        if COPY and group == 0:
            tl.store(
                copy + tokens[:, None] * copy_stride + depth[None, :],
                x_tile,
                mask=inside & (depth[None, :] < inputs),
            )
        a_tile = tl.load(
            a[None, :] + depth[:, None], mask=is_used & (depth[:, None] < inputs), other=0.0
        )
        sums = dot(x_tile, a_tile, sums, UPCAST)
    result = (sums * scales[None, :]).to(v.dtype.element_ty)
    tl.store(v + tokens[:, None] * v_stride + columns[None, :], result, mask=inside)
    if COPY:
        # A slot with more columns than the copy has room for is not multiplied there.
        places = inputs + columns[None, :]
        tl.store(
            copy + tokens[:, None] * copy_stride + places,
            result,
            mask=inside & (places < copy_width),
        )


@triton.jit
def project_gradients(
    dy,
    dv,
    table,
    tiles,
    bounds,
    tile_count,
    slots,
    dy_stride,
    dv_stride,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of tokens and one group of columns of one block."""
    group, block, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, _expert, start, end = tile_at(tiles, tile_count, tile)
    rank, first_own, b = block_columns(table, slots, slot, block, dy, B, BLOCKS, EVEN)
    if start >= end or group * COLUMNS >= rank:
        return
    ranks = group * COLUMNS + tl.arange(0, COLUMNS)
    is_used = ranks[None, :] < rank
    row, row_end = tl.load(bounds + block), tl.load(bounds + block + 1)
    tokens = (start + tl.arange(0, TOKENS)).to(tl.int64)
    inside = tokens[:, None] < end
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(row, row_end, DEPTH):
        outputs = first + tl.arange(0, DEPTH)
        dy_tile = tl.load(
            dy + tokens[:, None] * dy_stride + outputs[None, :],
            mask=inside & (outputs[None, :] < row_end),
            other=0.0,
        )
        b_tile = tl.load(
            b + (outputs[:, None] - row) * rank + ranks[None, :],
            mask=is_used & (outputs[:, None] < row_end),
            other=0.0,
        )
        sums = dot(dy_tile, b_tile, sums, UPCAST)
    columns = first_own + ranks
    tl.store(
        dv + tokens[:, None] * dv_stride + columns[None, :],
        sums.to(dv.dtype.element_ty),
        mask=inside & is_used,
    )
