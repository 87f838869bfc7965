"""Gradients of A and B of dense layers: products over all tokens of an adapter, in two stages of fixed order.

Tokens are cut into chunks from each segment's start. A segment of one chunk adds to its gradients at once; those of a
longer one wait beside each other and are added in their order by the second stage. Which tokens make a chunk, and so
the order of every sum, depends on the segment alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
from river_kernels.gpu.rows import tile_at
from river_kernels.gpu.tables import A_GRAD, B_GRAD, to_device
from river_kernels.segments import NO_ADAPTER, Segments

CHUNK_TOKENS = 1024

_STAGES = 3
_WARPS = {2: 8, 4: 4}
"""By bytes of an element."""

_ADDING_WARPS = 8


@dataclass(frozen=True, slots=True)
class Chunks:
    """`rows` int32 [4, N] as of `Tiles`, with where its sum waits in the place of the expert, -1 if it need not.

    `waits` int32 [3, M]: slot, first sum, end of those segments that have several; `sums` is how many wait in all.
    """

    rows: torch.Tensor
    waits: torch.Tensor
    sums: int


@lru_cache(maxsize=64)
def chunks_of(segments: Segments, slots: int, chunk_tokens: int, device: torch.device) -> Chunks:
    """The chunks of all segments that have an adapter; `slots` counts that of tokens without one."""
    rows: list[tuple[int, int, int, int]] = []
    waits: list[tuple[int, int, int]] = []
    sums = 0
    for segment in segments:
        if segment.slot == NO_ADAPTER:
            continue
        assert segment.slot < slots - 1
        starts = range(segment.start, segment.end, chunk_tokens)
        for start in starts:
            place = -1 if len(starts) == 1 else sums
            rows.append((segment.slot, place, start, min(start + chunk_tokens, segment.end)))
            sums += len(starts) > 1
        if len(starts) > 1:
            waits.append((segment.slot, sums - len(starts), sums))
    return Chunks(_table(rows, 4, device), _table(waits, 3, device), sums)


def _table(rows: list[tuple[int, ...]], width: int, device: torch.device) -> torch.Tensor:
    table = torch.tensor(rows, dtype=torch.int32).view(-1, width).T.contiguous()
    return to_device(table, device)


def add_input_gradients(
    dv_TC: torch.Tensor, x_TI: torch.Tensor, columns: Columns, chunks: Chunks
) -> None:
    """Adds `dv^T x` to the gradients of every A; `dv` is scaled already."""
    if not _is_wanted(columns, A_GRAD):
        return
    inputs, groups = x_TI.shape[1], columns.width_max // COLUMN_STEP
    parts = -(-inputs // ROW_STEP)
    waiting = x_TI.new_empty(chunks.sums, columns.width_max, inputs, dtype=torch.float32)
    launch(
        gram_inputs,
        (groups, parts, chunks.rows.shape[1]),
        dv_TC,
        x_TI,
        waiting,
        columns.table.rows,
        chunks.rows,
        chunks.rows.shape[1],
        columns.slots,
        columns.width_max,
        inputs,
        dv_TC.stride(0),
        x_TI.stride(0),
        warps=_WARPS[x_TI.element_size()],
        stages=_STAGES,
        BLOCKS=columns.blocks,
        ALIGNED=columns.alignment.a,
        TOKENS=depth_of(x_TI),
        COLUMNS=COLUMN_STEP,
        INPUTS=ROW_STEP,
    )
    launch(
        add_waiting_inputs,
        (groups, parts, chunks.waits.shape[1]),
        waiting,
        columns.table.rows,
        chunks.waits,
        chunks.waits.shape[1],
        columns.slots,
        columns.width_max,
        inputs,
        warps=_ADDING_WARPS,
        BLOCKS=columns.blocks,
        ALIGNED=columns.alignment.a,
        COLUMNS=COLUMN_STEP,
        INPUTS=ROW_STEP,
    )


def add_output_gradients(
    dy_TO: torch.Tensor, v_TC: torch.Tensor, columns: Columns, chunks: Chunks
) -> None:
    """Adds `dy^T v` to the gradients of every B; `v` is scaled already."""
    if not _is_wanted(columns, B_GRAD):
        return
    outputs, groups = dy_TO.shape[1], -(-columns.table.rank_max // COLUMN_STEP)
    rows = row_tiles(columns.bounds, ROW_STEP, dy_TO.device)
    bounds = first_rows(columns.bounds, dy_TO.device)
    width = groups * COLUMN_STEP
    waiting = dy_TO.new_empty(chunks.sums, outputs, width, dtype=torch.float32)
    launch(
        gram_outputs,
        (groups, rows.shape[1], chunks.rows.shape[1]),
        dy_TO,
        v_TC,
        waiting,
        columns.table.rows,
        chunks.rows,
        rows,
        bounds,
        chunks.rows.shape[1],
        rows.shape[1],
        columns.slots,
        outputs,
        width,
        dy_TO.stride(0),
        v_TC.stride(0),
        warps=_WARPS[dy_TO.element_size()],
        stages=_STAGES,
        BLOCKS=columns.blocks,
        EVEN=columns.alignment.b,
        TOKENS=depth_of(dy_TO),
        COLUMNS=COLUMN_STEP,
        OUTPUTS=ROW_STEP,
    )
    launch(
        add_waiting_outputs,
        (groups, rows.shape[1], chunks.waits.shape[1]),
        waiting,
        columns.table.rows,
        chunks.waits,
        rows,
        bounds,
        chunks.waits.shape[1],
        rows.shape[1],
        columns.slots,
        outputs,
        width,
        warps=_ADDING_WARPS,
        BLOCKS=columns.blocks,
        EVEN=columns.alignment.b,
        COLUMNS=COLUMN_STEP,
        OUTPUTS=ROW_STEP,
    )


def _is_wanted(columns: Columns, which: tl.constexpr) -> bool:
    name = "a_grad" if which == A_GRAD else "b_grad"
    return any(pair is not None and getattr(pair, name) is not None for pair in columns.table.pairs)


@triton.jit
def gram_inputs(
    dv,
    x,
    waiting,
    table,
    chunks,
    chunk_count,
    slots,
    width,
    inputs,
    dv_stride,
    x_stride,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A group of columns and some inputs, over one chunk of tokens."""
    group, part, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, waits_at, start, end = tile_at(chunks, chunk_count, chunk)
    used = first_column(table, slots, slot, BLOCKS, BLOCKS)
    if group * COLUMNS >= used:
        return
    columns = group * COLUMNS + tl.arange(0, COLUMNS)
    place = part * INPUTS + tl.arange(0, INPUTS)
    is_input = place[None, :] < inputs
    sums = tl.zeros((COLUMNS, INPUTS), tl.float32)
    for first in range(start, end, TOKENS):
        tokens = (first + tl.arange(0, TOKENS)).to(tl.int64)
        dv_tile = tl.load(
            dv + tokens[:, None] * dv_stride + columns[None, :],
            mask=(tokens[:, None] < end) & (columns[None, :] < used),
            other=0.0,
        )
        x_tile = tl.load(
            x + tokens[:, None] * x_stride + place[None, :],
            mask=(tokens[:, None] < end) & is_input,
            other=0.0,
        )
        sums = dot(tl.trans(dv_tile), x_tile, sums, UPCAST)
    if waits_at < 0:
        _add_to_rows(sums, waiting, table, slots, slot, columns, place, inputs, BLOCKS, ALIGNED)
    else:
        rows = waits_at.to(tl.int64) * width + columns
        tl.store(
            waiting + rows[:, None] * inputs + place[None, :],
            sums,
            mask=(columns[:, None] < used) & is_input,
        )


@triton.jit
def add_waiting_inputs(
    waiting,
    table,
    waits,
    wait_count,
    slots,
    width,
    inputs,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds up what one segment's chunks left for a group of columns and some inputs."""
    group, part, wait = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(waits + wait)
    used = first_column(table, slots, slot, BLOCKS, BLOCKS)
    if group * COLUMNS >= used:
        return
    columns = group * COLUMNS + tl.arange(0, COLUMNS)
    place = part * INPUTS + tl.arange(0, INPUTS)
    sums = tl.zeros((COLUMNS, INPUTS), tl.float32)
    for at in range(tl.load(waits + wait_count + wait), tl.load(waits + 2 * wait_count + wait)):
        rows = tl.cast(at, tl.int64) * width + columns
        sums += tl.load(
            waiting + rows[:, None] * inputs + place[None, :],
            mask=(columns[:, None] < used) & (place[None, :] < inputs),
            other=0.0,
        )
    _add_to_rows(sums, waiting, table, slots, slot, columns, place, inputs, BLOCKS, ALIGNED)


@triton.jit
def _add_to_rows(
    sums,
    waiting,
    table,
    slots,
    slot,
    columns,
    place,
    inputs,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    rows, exists, _ = column_rows(
        table, slots, slot, columns, inputs, waiting, A_GRAD, BLOCKS, ALIGNED
    )
    gradient = rows[:, None] + place[None, :]
    mask = exists[:, None] & (place[None, :] < inputs)
    tl.store(gradient, tl.load(gradient, mask=mask, other=0.0) + sums, mask=mask)


@triton.jit
def gram_outputs(
    dy,
    v,
    waiting,
    table,
    chunks,
    row_tiles,
    bounds,
    chunk_count,
    row_tile_count,
    slots,
    outputs,
    width,
    dy_stride,
    v_stride,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Some outputs of one block and a group of its columns, over one chunk of tokens."""
    group, row_tile, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, waits_at, start, end = tile_at(chunks, chunk_count, chunk)
    block = tl.load(row_tiles + row_tile)
    rank, first_own, gradient = block_columns(
        table, slots, slot, block, waiting, B_GRAD, BLOCKS, EVEN
    )
    if group * COLUMNS >= rank:
        return
    ranks = group * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.load(row_tiles + row_tile_count + row_tile) + tl.arange(0, OUTPUTS)
    row_end = tl.load(row_tiles + 2 * row_tile_count + row_tile)
    v += first_own
    sums = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    for first in range(start, end, TOKENS):
        tokens = (first + tl.arange(0, TOKENS)).to(tl.int64)
        dy_tile = tl.load(
            dy + tokens[:, None] * dy_stride + rows[None, :],
            mask=(tokens[:, None] < end) & (rows[None, :] < row_end),
            other=0.0,
        )
        v_tile = tl.load(
            v + tokens[:, None] * v_stride + ranks[None, :],
            mask=(tokens[:, None] < end) & (ranks[None, :] < rank),
            other=0.0,
        )
        sums = dot(tl.trans(dy_tile), v_tile, sums, UPCAST)
    if waits_at < 0:
        own_rows = rows - tl.load(bounds + block)
        mask = (rows[:, None] < row_end) & (ranks[None, :] < rank)
        _add_to_b(sums, gradient, own_rows, ranks, rank, mask)
    else:
        places = (waits_at.to(tl.int64) * outputs + rows) * width
        tl.store(
            waiting + places[:, None] + ranks[None, :],
            sums,
            mask=(rows[:, None] < row_end) & (ranks[None, :] < rank),
        )


@triton.jit
def add_waiting_outputs(
    waiting,
    table,
    waits,
    row_tiles,
    bounds,
    wait_count,
    row_tile_count,
    slots,
    outputs,
    width,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds up what one segment's chunks left for some outputs of one block and a group of its columns."""
    group, row_tile, wait = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(waits + wait)
    block = tl.load(row_tiles + row_tile)
    rank, _, gradient = block_columns(table, slots, slot, block, waiting, B_GRAD, BLOCKS, EVEN)
    if group * COLUMNS >= rank:
        return
    ranks = group * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.load(row_tiles + row_tile_count + row_tile) + tl.arange(0, OUTPUTS)
    row_end = tl.load(row_tiles + 2 * row_tile_count + row_tile)
    mask = (rows[:, None] < row_end) & (ranks[None, :] < rank)
    sums = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    for at in range(tl.load(waits + wait_count + wait), tl.load(waits + 2 * wait_count + wait)):
        places = (tl.cast(at, tl.int64) * outputs + rows) * width
        sums += tl.load(waiting + places[:, None] + ranks[None, :], mask=mask, other=0.0)
    own_rows = rows - tl.load(bounds + block)
    _add_to_b(sums, gradient, own_rows, ranks, rank, mask)


@triton.jit
def _add_to_b(sums, gradient, own_rows, ranks, rank, mask):
    if gradient.to(tl.int64) != 0:
        places = gradient + own_rows[:, None] * rank + ranks[None, :]
        tl.store(places, tl.load(places, mask=mask, other=0.0) + sums, mask=mask)
