"""Adds each row's adapter to what the frozen experts made of it: y += scale * v B^T, or dx += scale * dv A."""

# Tensors carry their shape in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from river_kernels.gpu.configs import EXPAND_WIDTH, RANK_STEP, Alignment
from river_kernels.gpu.dequantize import rounded
from river_kernels.gpu.launch import dot, launch
from river_kernels.gpu.rows import EACH, factor_of, load_factor, rank_at, tile_at
from river_kernels.gpu.tables import AdapterTable, scale_of
from river_kernels.gpu.tiles import Tiles


def expand_into_rows(
    y_PW: torch.Tensor,
    v_PR: torch.Tensor,
    table: AdapterTable,
    tiles: Tiles,
    factor: tl.constexpr,
    *,
    alignment: Alignment,
) -> None:
    """Adds `scale * v F` to every row, in place; F is the expert's own A, or its B transposed, as `factor` says."""
    width = y_PW.shape[1]
    assert y_PW.stride(1) == v_PR.stride(1) == 1
    launch(
        expand_rows,
        (tiles.count, triton.cdiv(width, EXPAND_WIDTH)),
        y_PW,
        v_PR,
        table.rows,
        tiles.rows,
        tiles.count,
        table.slots,
        width,
        y_PW.stride(0),
        v_PR.stride(0),
        warps=4,
        stages=1,
        WHICH=factor.value,
        ALIGNED=alignment.value,
        ROWS=tiles.block,
        WIDTH=EXPAND_WIDTH,
        RANKS=RANK_STEP,
    )


@triton.jit
def expand_rows(
    y,  # [P, width]
    v,  # [P, rank_max]
    table,
    tiles,
    tile_count,
    slots,
    width,
    y_stride,
    v_stride,
    WHICH: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of rows and some of the width."""
    slot, expert, start, end = tile_at(tiles, tile_count, tl.program_id(0))
    rank = rank_at(table, slots, slot, ALIGNED)
    if start >= end or rank == 0:
        return
    factor = factor_of(table, slots, slot, expert, width, rank, y, WHICH, EACH, ALIGNED)
    rows = start + tl.arange(0, ROWS)
    inside = rows < end
    places = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    v += rows.to(tl.int64)[:, None] * v_stride
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        v_tile = tl.load(
            v + ranks[None, :], mask=inside[:, None] & (ranks[None, :] < rank), other=0.0
        )
        factor_tile = load_factor(factor, width, rank, places, ranks, WHICH)
        sums = dot(v_tile, tl.trans(factor_tile), sums, UPCAST)
    mask = inside[:, None] & (places[None, :] < width)
    y += rows.to(tl.int64)[:, None] * y_stride + places[None, :]
    before = tl.load(y, mask=mask, other=0.0).to(tl.float32)
    tl.store(y, rounded(before + sums * scale_of(table, slots, slot), y, UPCAST), mask=mask)
