"""Gradients of the factors: sums over rows of a model-wide vector times a rank-wide one.

Of factors that each expert has for itself, one program sums over one group, expert and adapter, in the order of its
rows. Factors that experts share, and those of dense layers, have as many rows as an adapter has tokens: these are cut
into chunks that begin at the adapter's first token, and the sums of the chunks are added in their order by a second
launch. Which rows follow each other in a sum depends on the adapter's rows alone.
"""

# Tensors carry their shape in capitals.

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from river_kernels.gpu.configs import (
    GRAM_CHUNK,
    GRAM_ROWS,
    GRAM_STAGES,
    GRAM_WARPS,
    GRAM_WIDTH,
    RANK_BLOCK,
    Alignment,
)
from river_kernels.gpu.dequantize import rounded
from river_kernels.gpu.launch import dot, launch
from river_kernels.gpu.rows import ALL, EACH, add_to_gradient, rank_at, tile_at
from river_kernels.gpu.tables import A_GRAD, B_GRAD, A, AdapterTable, scale_of, to_device
from river_kernels.gpu.tiles import Tiles, token_tiles
from river_kernels.segments import Segments


def group_gram(
    wide_NW: torch.Tensor,
    narrow_NR: torch.Tensor,
    table: AdapterTable,
    groups: Tiles,
    factor: tl.constexpr,
    *,
    alignment: Alignment,
    wide_rows: torch.Tensor | None = None,
    narrow_rows: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> None:
    """Adds `scale * sum over rows of weight * wide narrow^T` to each group's gradient of A or B, `factor`.

    `wide_rows` and `narrow_rows` int32 [N] say which row of each a group's row is of (else the same), `weight` [N]
    multiplies.
    """
    _launch_gram(
        wide_NW, narrow_NR, narrow_NR, table, groups, factor,
        alignment=alignment, wide_rows=wide_rows, narrow_rows=narrow_rows, weight=weight, partial=False,
    )  # fmt: skip


def segment_gram(
    wide_TW: torch.Tensor,
    narrow_TR: torch.Tensor,
    table: AdapterTable,
    segments: Segments,
    factor: tl.constexpr,
    *,
    alignment: Alignment,
) -> None:
    """Adds `scale * sum over tokens of wide narrow^T` to each adapter's gradient of a factor it has once."""
    device, width = wide_TW.device, wide_TW.shape[1]
    chunks = token_tiles(segments, slots=table.slots, block=GRAM_CHUNK, device=device)
    spans = _chunk_spans(segments, table.slots, device)
    rank_blocks = triton.cdiv(table.rank_max, RANK_BLOCK)
    sums = wide_TW.new_empty(chunks.count, width, rank_blocks * RANK_BLOCK, dtype=torch.float32)
    _launch_gram(wide_TW, narrow_TR, sums, table, chunks, factor, alignment=alignment, partial=True)
    launch(
        add_chunks,
        (spans.count * rank_blocks, triton.cdiv(width, GRAM_WIDTH)),
        sums,
        table.rows,
        spans.rows,
        spans.count,
        table.slots,
        width,
        rank_blocks,
        warps=GRAM_WARPS,
        stages=2,
        WHICH=factor.value,
        GRADIENT=_gradient(factor).value,
        ALIGNED=alignment.value,
        WIDTH=GRAM_WIDTH,
        RANKS=RANK_BLOCK,
    )


def _launch_gram(
    wide_NW: torch.Tensor,
    narrow_NR: torch.Tensor,
    sums: torch.Tensor,
    table: AdapterTable,
    groups: Tiles,
    factor: tl.constexpr,
    *,
    alignment: Alignment,
    partial: bool,
    wide_rows: torch.Tensor | None = None,
    narrow_rows: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> None:
    width, rank_blocks = wide_NW.shape[1], triton.cdiv(table.rank_max, RANK_BLOCK)
    assert wide_NW.stride(1) == narrow_NR.stride(1) == 1
    launch(
        gram_rows,
        (groups.count * rank_blocks, triton.cdiv(width, GRAM_WIDTH)),
        wide_NW,
        narrow_NR,
        sums,
        narrow_NR if wide_rows is None else wide_rows,
        narrow_NR if narrow_rows is None else narrow_rows,
        narrow_NR if weight is None else weight,
        table.rows,
        groups.rows,
        groups.count,
        table.slots,
        width,
        rank_blocks,
        wide_NW.stride(0),
        narrow_NR.stride(0),
        warps=GRAM_WARPS,
        stages=GRAM_STAGES,
        WHICH=factor.value,
        GRADIENT=_gradient(factor).value,
        ALIGNED=alignment.value,
        PARTIAL=partial,
        WIDE_MAPPED=wide_rows is not None,
        NARROW_MAPPED=narrow_rows is not None,
        WEIGHTED=weight is not None,
        ROWS=GRAM_ROWS,
        WIDTH=GRAM_WIDTH,
        RANKS=RANK_BLOCK,
    )


def _gradient(factor: tl.constexpr) -> tl.constexpr:
    return A_GRAD if factor == A else B_GRAD


@lru_cache(maxsize=64)
def _chunk_spans(segments: Segments, slots: int, device: torch.device) -> Tiles:
    """For each segment its slot, 0, and the first and the end of its chunks."""
    spans: list[tuple[int, int, int, int]] = []
    first = 0
    for segment in segments:
        end = first - (segment.start - segment.end) // GRAM_CHUNK
        spans.append((segment.slot % slots, 0, first, end))
        first = end
    rows = torch.tensor(spans, dtype=torch.int32).view(-1, 4).T.contiguous()
    return Tiles(to_device(rows, device), first, slots)


@triton.jit
def gram_rows(
    wide,  # [., width]
    narrow,  # [., rank_max]
    sums_out,  # float32 [groups, width, rank_blocks * RANKS], if PARTIAL
    wide_map,  # int32 [N], if WIDE_MAPPED
    narrow_map,  # int32 [N], if NARROW_MAPPED
    weight,  # [N], if WEIGHTED
    table,
    groups,
    group_count,
    slots,
    width,
    rank_blocks,
    wide_stride,
    narrow_stride,
    WHICH: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PARTIAL: tl.constexpr,
    WIDE_MAPPED: tl.constexpr,
    NARROW_MAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Some places and ranks of one group's gradient; or, if PARTIAL, of one chunk's share of it, not yet scaled."""
    group = tl.program_id(0) // rank_blocks
    slot, expert, start, end = tile_at(groups, group_count, group)
    rank = rank_at(table, slots, slot, ALIGNED)
    first_rank = tl.program_id(0) % rank_blocks * RANKS
    if start >= end or first_rank >= rank or tl.load(table + GRADIENT * slots + slot) == 0:
        return
    places = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    ranks = first_rank + tl.arange(0, RANKS)
    is_place, is_rank = places[None, :] < width, ranks[None, :] < rank
    sums = tl.zeros((WIDTH, RANKS), tl.float32)
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < end
        wide_rows = tl.load(wide_map + rows, mask=inside, other=0) if WIDE_MAPPED else rows
        narrow_rows = tl.load(narrow_map + rows, mask=inside, other=0) if NARROW_MAPPED else rows
        wide_tile = tl.load(
            wide + wide_rows.to(tl.int64)[:, None] * wide_stride + places[None, :],
            mask=inside[:, None] & is_place,
            other=0.0,
        )
        narrow_tile = tl.load(
            narrow + narrow_rows.to(tl.int64)[:, None] * narrow_stride + ranks[None, :],
            mask=inside[:, None] & is_rank,
            other=0.0,
        )
        if WEIGHTED:
            factor = tl.load(weight + rows, mask=inside, other=0.0).to(tl.float32)
            narrow_tile = rounded(narrow_tile.to(tl.float32) * factor[:, None], wide, UPCAST)
        sums = dot(tl.trans(wide_tile), narrow_tile, sums, UPCAST)
    if PARTIAL:
        at = (group.to(tl.int64) * width + places)[:, None] * (rank_blocks * RANKS) + ranks[None, :]
        tl.store(sums_out + at, sums, mask=places[:, None] < width)
    else:
        sums *= scale_of(table, slots, slot)
        add_to_gradient(
            sums, table, slots, slot, expert, width, rank, places, ranks,
            WHICH, GRADIENT, EACH, ALIGNED,
        )  # fmt: skip


@triton.jit
def add_chunks(
    sums_in,  # float32 [chunks, width, rank_blocks * RANKS]
    table,
    spans,
    span_count,
    slots,
    width,
    rank_blocks,
    WHICH: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Some places and ranks of one adapter's gradient, from the sums of its chunks."""
    slot, _, start, end = tile_at(spans, span_count, tl.program_id(0) // rank_blocks)
    rank = rank_at(table, slots, slot, ALIGNED)
    first_rank = tl.program_id(0) % rank_blocks * RANKS
    if start >= end or first_rank >= rank or tl.load(table + GRADIENT * slots + slot) == 0:
        return
    places = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    ranks = first_rank + tl.arange(0, RANKS)
    sums = tl.zeros((WIDTH, RANKS), tl.float32)
    for chunk in range(start, end):
        at = (tl.cast(chunk, tl.int64) * width + places)[:, None] * (rank_blocks * RANKS) + ranks[
            None, :
        ]
        sums += tl.load(sums_in + at, mask=places[:, None] < width, other=0.0)
    sums *= scale_of(table, slots, slot)
    add_to_gradient(
        sums, table, slots, slot, 0, width, rank, places, ranks,
        WHICH, GRADIENT, ALL, ALIGNED,
    )  # fmt: skip
