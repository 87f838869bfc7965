"""Out of the columns of the adapters: y + v B^T, B behind the frozen weights, and dx + dv A."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from river_kernels.gpu.columns import (
    COLUMN_STEP,
    ROW_STEP,
    Columns,
    block_columns,
    column_rows,
    depth_of,
    first_column,
    first_rows,
    row_tiles,
)
from river_kernels.gpu.launch import dot, launch
from river_kernels.gpu.project import TOKENS
from river_kernels.gpu.rows import tile_at
from river_kernels.gpu.tables import A, B
from river_kernels.gpu.tiles import Tiles

_RANKS = 16
"""Columns that an expansion adds at a time."""

_WRITTEN_ROWS = 32
"""Rows of the frozen matrix behind which a program writes."""

_WARPS = 8


def expand_add(y_TO: torch.Tensor, v_TC: torch.Tensor, columns: Columns, tiles: Tiles) -> None:
    """`y += v B^T`, each block's outputs from its own columns; `v` is scaled already."""
    assert tiles.block == TOKENS
    rows = row_tiles(columns.bounds, ROW_STEP, y_TO.device)
    launch(
        expand_outputs,
        (tiles.count, rows.shape[1]),
        y_TO,
        v_TC,
        columns.table.rows,
        tiles.rows,
        rows,
        first_rows(columns.bounds, y_TO.device),
        tiles.count,
        rows.shape[1],
        columns.slots,
        y_TO.stride(0),
        v_TC.stride(0),
        warps=_WARPS,
        BLOCKS=columns.blocks,
        EVEN=columns.alignment.b,
        TOKENS=TOKENS,
        OUTPUTS=ROW_STEP,
        RANKS=_RANKS,
    )


def write_tail(weight_OI: torch.Tensor, columns: Columns, slot: int) -> None:
    """Puts B of `slot` behind the columns of a weight that has room there, each block's in its rows; else zeros."""
    rows = row_tiles(columns.bounds, _WRITTEN_ROWS, weight_OI.device)
    launch(
        write_columns,
        (rows.shape[1], columns.widths[slot] // COLUMN_STEP),
        weight_OI,
        columns.table.rows,
        rows,
        first_rows(columns.bounds, weight_OI.device),
        rows.shape[1],
        columns.slots,
        slot,
        weight_OI.shape[1],
        weight_OI.stride(0),
        BLOCKS=columns.blocks,
        EVEN=columns.alignment.b,
        OUTPUTS=_WRITTEN_ROWS,
        COLUMNS=COLUMN_STEP,
    )


def finish_inputs(
    widened_TJ: torch.Tensor,
    dx_TI: torch.Tensor,
    dv_TC: torch.Tensor,
    columns: Columns,
    tiles: Tiles,
) -> None:
    """From [dx of the frozen weights | dy B]: `dx` with the adapters' share, and `dv_TC = scale * dy B`."""
    assert tiles.block == TOKENS
    inputs = dx_TI.shape[1]
    launch(
        expand_inputs,
        (tiles.count, -(-inputs // ROW_STEP)),
        widened_TJ,
        dx_TI,
        dv_TC,
        columns.table.rows,
        tiles.rows,
        tiles.count,
        columns.slots,
        inputs,
        widened_TJ.stride(0),
        dx_TI.stride(0),
        dv_TC.stride(0),
        warps=_WARPS,
        BLOCKS=columns.blocks,
        ALIGNED=columns.alignment.a,
        TOKENS=TOKENS,
        INPUTS=ROW_STEP,
        COLUMNS=depth_of(dv_TC),
    )


@triton.jit
def expand_outputs(
    y,
    v,
    table,
    tiles,
    row_tiles,
    bounds,
    tile_count,
    row_tile_count,
    slots,
    y_stride,
    v_stride,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of tokens and some outputs of one block."""
    tile, row_tile = tl.program_id(0), tl.program_id(1)
    slot, _expert, start, end = tile_at(tiles, tile_count, tile)
    block = tl.load(row_tiles + row_tile)
    rank, first_own, b = block_columns(table, slots, slot, block, v, B, BLOCKS, EVEN)
    if start >= end or rank == 0:
        return
    outputs = tl.load(row_tiles + row_tile_count + row_tile) + tl.arange(0, OUTPUTS)
    is_output = outputs[None, :] < tl.load(row_tiles + 2 * row_tile_count + row_tile)
    own_rows = outputs - tl.load(bounds + block)
    v += first_own
    tokens = (start + tl.arange(0, TOKENS)).to(tl.int64)
    inside = tokens[:, None] < end
    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        v_tile = tl.load(
            v + tokens[:, None] * v_stride + ranks[None, :],
            mask=inside & (ranks[None, :] < rank),
            other=0.0,
        )
        b_tile = tl.load(
            b + own_rows[None, :] * rank + ranks[:, None],
            mask=is_output & (ranks[:, None] < rank),
            other=0.0,
        )
        sums = dot(v_tile, b_tile, sums, UPCAST)
    y += tokens[:, None] * y_stride + outputs[None, :]
    before = tl.load(y, mask=inside & is_output, other=0.0).to(tl.float32)
    tl.store(y, (before + sums).to(y.dtype.element_ty), mask=inside & is_output)


@triton.jit
def write_columns(
    weight,
    table,
    row_tiles,
    bounds,
    row_tile_count,
    slots,
    slot,
    inputs,
    stride,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Some rows of one block and some columns behind them."""
    row_tile, group = tl.program_id(0), tl.program_id(1)
    block = tl.load(row_tiles + row_tile)
    rank, first_own, b = block_columns(table, slots, slot, block, weight, B, BLOCKS, EVEN)
    rows = (tl.load(row_tiles + row_tile_count + row_tile) + tl.arange(0, OUTPUTS)).to(tl.int64)
    is_row = rows[:, None] < tl.load(row_tiles + 2 * row_tile_count + row_tile)
    columns = group * COLUMNS + tl.arange(0, COLUMNS)
    ranks = columns - first_own
    is_own = (ranks[None, :] >= 0) & (ranks[None, :] < rank)
    own_rows = rows - tl.load(bounds + block)
    b_tile = tl.load(b + own_rows[:, None] * rank + ranks[None, :], mask=is_row & is_own, other=0.0)
    tl.store(weight + rows[:, None] * stride + inputs + columns[None, :], b_tile, mask=is_row)


@triton.jit
def expand_inputs(
    widened,
    dx,
    dv,
    table,
    tiles,
    tile_count,
    slots,
    inputs,
    widened_stride,
    dx_stride,
    dv_stride,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of tokens and some inputs; the first inputs' program writes dv."""
    tile, part = tl.program_id(0), tl.program_id(1)
    slot, _expert, start, end = tile_at(tiles, tile_count, tile)
    if start >= end:
        return
    used = first_column(table, slots, slot, BLOCKS, BLOCKS)
    tokens = (start + tl.arange(0, TOKENS)).to(tl.int64)
    inside = tokens[:, None] < end
    place = part * INPUTS + tl.arange(0, INPUTS)
    is_input = place[None, :] < inputs
    sums = tl.zeros((TOKENS, INPUTS), tl.float32)
    for first in range(0, used, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        is_used = columns < used
        a, _, scales = column_rows(table, slots, slot, columns, inputs, dv, A, BLOCKS, ALIGNED)
        raw = tl.load(
            widened + tokens[:, None] * widened_stride + inputs + columns[None, :],
            mask=inside & is_used[None, :],
            other=0.0,
        )
        dv_tile = (raw.to(tl.float32) * scales[None, :]).to(dv.dtype.element_ty)
        if part == 0:
            tl.store(dv + tokens[:, None] * dv_stride + columns[None, :], dv_tile, mask=inside)
        a_tile = tl.load(a[:, None] + place[None, :], mask=is_used[:, None] & is_input, other=0.0)
        sums = dot(dv_tile, a_tile, sums, UPCAST)
    frozen = tl.load(
        widened + tokens[:, None] * widened_stride + place[None, :],
        mask=inside & is_input,
        other=0.0,
    )
    tl.store(
        dx + tokens[:, None] * dx_stride + place[None, :],
        (frozen.to(tl.float32) + sums).to(dx.dtype.element_ty),
        mask=inside & is_input,
    )
