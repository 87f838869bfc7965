"""Rows back to tokens: the sum over the chosen experts, and with it what an adapter adds to tokens as a whole."""

# Tensors carry their shape in capitals.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from river_kernels.gpu.configs import (
    COMBINE_ROWS,
    COMBINE_WARPS,
    COMBINE_WIDTH,
    RANK_STEP,
    Alignment,
)
from river_kernels.gpu.dequantize import rounded
from river_kernels.gpu.launch import dot, launch
from river_kernels.gpu.route import RoutePlan
from river_kernels.gpu.rows import ALL, factor_of, load_factor, rank_at, tile_at
from river_kernels.gpu.tables import AdapterTable, scale_of
from river_kernels.gpu.tiles import token_tiles


@dataclass(frozen=True, slots=True)
class Expansion:
    """What adapters add to tokens: `scale * (sum over k of narrow) F`, F the A or the transposed B that experts share.

    `narrow` float32 [P, rank_max] are the rows; their sums by token are written to `summed` [T, rank_max].
    """

    narrow: torch.Tensor
    summed: torch.Tensor
    table: AdapterTable
    factor: tl.constexpr
    alignment: Alignment


def combine(
    y_PH: torch.Tensor,
    out_TH: torch.Tensor,
    plan: RoutePlan,
    *,
    weights_TK: torch.Tensor | None = None,
    expansion: Expansion | None = None,
) -> None:
    """Writes `sum over k of weight * y` of each token, in the order of k, and adds the expansion."""
    width, slots = out_TH.shape[1], plan.tiles.slots
    tiles = token_tiles(plan.segments, slots=slots, block=COMBINE_ROWS, device=y_PH.device)
    assert y_PH.is_contiguous()
    assert out_TH.is_contiguous()
    assert weights_TK is None or weights_TK.is_contiguous()
    launch(
        combine_rows,
        (tiles.count, triton.cdiv(width, COMBINE_WIDTH)),
        y_PH,
        out_TH,
        plan.inverse,
        plan.inverse if weights_TK is None else weights_TK,
        out_TH if expansion is None else expansion.narrow,
        out_TH if expansion is None else expansion.summed,
        plan.inverse if expansion is None else expansion.table.rows,
        tiles.rows,
        tiles.count,
        slots,
        width,
        0 if expansion is None else expansion.narrow.stride(0),
        0 if expansion is None else expansion.summed.stride(0),
        warps=COMBINE_WARPS,
        stages=1,
        WHICH=0 if expansion is None else expansion.factor.value,
        EXPANDS=expansion is not None,
        ALIGNED=0 if expansion is None else expansion.alignment.value,
        WEIGHTED=weights_TK is not None,
        CHOSEN=plan.chosen,
        ROWS=COMBINE_ROWS,
        WIDTH=COMBINE_WIDTH,
        RANKS=RANK_STEP,
    )


@triton.jit
def combine_rows(
    y,  # [P, width]
    out,  # [T, width]
    inverse,  # int32 [T * K]
    weights,  # [T * K], if WEIGHTED
    narrow,  # float32 [P, rank_max], if EXPANDS
    summed,  # [T, rank_max], if EXPANDS
    table,
    tiles,
    tile_count,
    slots,
    width,
    narrow_stride,
    summed_stride,
    WHICH: tl.constexpr,
    EXPANDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of tokens and some of the width; the first of the width writes the sums of the narrow rows."""
    slot, _, start, end = tile_at(tiles, tile_count, tl.program_id(0))
    part = tl.program_id(1)
    if start >= end:
        return
    tokens = start + tl.arange(0, ROWS)
    inside = tokens < end
    pairs = inverse + tokens * CHOSEN
    places = part * WIDTH + tl.arange(0, WIDTH)
    mask = inside[:, None] & (places[None, :] < width)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    if EXPANDS:
        rank = rank_at(table, slots, slot, ALIGNED)
        factor = factor_of(table, slots, slot, 0, width, rank, out, WHICH, ALL, ALIGNED)
        for first in range(0, rank, RANKS):
            ranks = first + tl.arange(0, RANKS)
            is_rank = inside[:, None] & (ranks[None, :] < rank)
            totals = tl.zeros((ROWS, RANKS), tl.float32)
            # Unrolled, as below, the loop over the chosen would take more registers than there are.
            for chosen in range(CHOSEN):
                row = tl.load(pairs + chosen, mask=inside, other=0).to(tl.int64)
                at = row[:, None] * narrow_stride + ranks[None, :]
                totals += tl.load(narrow + at, mask=is_rank, other=0.0)
            total = rounded(totals, summed, UPCAST)
            if part == 0:
                at = tokens.to(tl.int64)[:, None] * summed_stride + ranks[None, :]
                tl.store(summed + at, total, mask=is_rank)
            factor_tile = load_factor(factor, width, rank, places, ranks, WHICH)
            sums = dot(total, tl.trans(factor_tile), sums, UPCAST)
        sums *= scale_of(table, slots, slot)
    for chosen in tl.static_range(CHOSEN):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.load(pairs + chosen, mask=inside, other=0).to(tl.int64)
        values = tl.load(y + row[:, None] * width + places[None, :], mask=mask, other=0.0)
        if WEIGHTED:
            weight = tl.load(weights + tokens * CHOSEN + chosen, mask=inside, other=0.0)
            sums += values.to(tl.float32) * weight.to(tl.float32)[:, None]
        else:
            sums += values.to(tl.float32)
    at = tokens.to(tl.int64)[:, None] * width + places[None, :]
    tl.store(out + at, rounded(sums, out, UPCAST), mask=mask)
