"""h = silu(gate) * up of every row, with the adapter's share of gate and up added on the way, never stored."""

# Tensors carry their shape in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from river_kernels.gpu.configs import ACTIVATION_BYTES, RANK_STEP, Alignment, block_of
from river_kernels.gpu.dequantize import rounded
from river_kernels.gpu.launch import dot, launch
from river_kernels.gpu.rows import EACH, factor_of, load_factor, rank_at, tile_at
from river_kernels.gpu.tables import AdapterTable, B, scale_of
from river_kernels.gpu.tiles import Tiles


def activate(
    z_PF: torch.Tensor,
    v1: torch.Tensor,
    h_PI: torch.Tensor,
    table: AdapterTable,
    tiles: Tiles,
    *,
    alignment: Alignment,
    token: torch.Tensor | None,
) -> None:
    """Writes h of `z_PF` [P, 2I], which stays as the frozen experts made it.

    `v1` is `x A^T` of each row [P, rank_max], or of tokens [T, rank_max] with `token` int32 [P] of each row.
    """
    inner = h_PI.shape[1]
    block = block_of(inner, ACTIVATION_BYTES, z_PF.dtype)
    assert z_PF.is_contiguous()
    assert h_PI.is_contiguous()
    launch(
        expand_and_activate,
        (tiles.count, triton.cdiv(inner, block)),
        z_PF,
        v1,
        h_PI,
        v1 if token is None else token,
        table.rows,
        tiles.rows,
        tiles.count,
        table.slots,
        inner,
        v1.stride(0),
        warps=4,
        stages=1,
        ALIGNED=alignment.value,
        MAPPED=token is not None,
        ROWS=tiles.block,
        WIDTH=block,
        RANKS=RANK_STEP,
    )


@triton.jit
def expand_and_activate(
    z,  # [P, 2 * inner]
    v1,  # [., rank_max]
    h,  # [P, inner]
    token,  # int32 [P], if MAPPED
    table,
    tiles,
    tile_count,
    slots,
    inner,
    v1_stride,
    ALIGNED: tl.constexpr,
    MAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of rows and some of the inner width."""
    slot, expert, start, end = tile_at(tiles, tile_count, tl.program_id(0))
    if start >= end:
        return
    rows = start + tl.arange(0, ROWS)
    inside = rows < end
    sources = tl.load(token + rows, mask=inside, other=0) if MAPPED else rows
    places = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate_delta, up_delta = expanded_gate_up(
        v1, sources, inside, places, table, slots, slot, expert, inner, v1_stride,
        ALIGNED, ROWS, WIDTH, RANKS, UPCAST,
    )  # fmt: skip
    mask = inside[:, None] & (places[None, :] < inner)
    z += rows.to(tl.int64)[:, None] * (2 * inner) + places[None, :]
    gate = tl.load(z, mask=mask, other=0.0).to(tl.float32) + gate_delta
    up = tl.load(z + inner, mask=mask, other=0.0).to(tl.float32) + up_delta
    result = gate * tl.sigmoid(gate) * up
    h += rows.to(tl.int64)[:, None] * inner + places[None, :]
    tl.store(h, rounded(result, h, UPCAST), mask=mask)


@triton.jit
def expanded_gate_up(
    v1,
    sources,
    inside,
    places,
    table,
    slots,
    slot,
    expert,
    inner,
    v1_stride,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`scale * v1 B^T` of the gate and of the up at `places`, float32 [ROWS, WIDTH] each; anything behind the width."""
    rank = rank_at(table, slots, slot, ALIGNED)
    factor = factor_of(table, slots, slot, expert, 2 * inner, rank, v1, B, EACH, ALIGNED)
    v1 += sources.to(tl.int64)[:, None] * v1_stride
    gate = tl.zeros((ROWS, WIDTH), tl.float32)
    up = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        v1_tile = tl.load(
            v1 + ranks[None, :], mask=inside[:, None] & (ranks[None, :] < rank), other=0.0
        )
        gate_tile = load_factor(factor, 2 * inner, rank, places, ranks, B)
        up_tile = load_factor(factor, 2 * inner, rank, inner + places, ranks, B)
        gate = dot(v1_tile, tl.trans(gate_tile), gate, UPCAST)
        up = dot(v1_tile, tl.trans(up_tile), up, UPCAST)
    scale = scale_of(table, slots, slot)
    return gate * scale, up * scale
