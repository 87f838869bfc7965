"""What several layers that read the same x have as adapters, as columns side by side.

    slot 0   | q: rank 8 | k: rank 8 | v: rank 8 | 0 0 … |   a column is one row of an A and one column of a B
    slot 1   | q: rank 3 | (nothing) | v: rank 3 | 0 0 … |   24 and 6 of 64 columns are in use

Layers are blocks of rows of one frozen matrix. The columns of a slot lie without gaps, and where they end depends on
that slot alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from river_kernels.gpu.configs import ALIGNED_BYTES, ALIGNED_RANKS, are_aligned
from river_kernels.gpu.tables import (
    AdapterTable,
    adapter_table,
    check_precision,
    rank_of,
    scale_of,
    to_device,
)
from river_kernels.segments import NO_ADAPTER, Pairs

COLUMN_STEP = 64
"""Columns of a slot are rounded up to this, which is how many of them a program has at a time."""

ROW_STEP = 128
"""Rows of the frozen matrix, all of one block, that a program has at a time."""

_DEPTHS = {2: 64, 4: 16}


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where a thread can load 16 bytes at once, which the compiler cannot see of what is found by address."""

    a: bool
    """Every row of every A, and of its gradient."""
    b: bool
    """Every row of every B, whose ranks are multiples of eight."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The adapters of all blocks.

    `table` has those of the first block, then those of the second, and so on: [6, blocks * slots]. `slots` counts the
    slots of one block, that of tokens without an adapter included. `bounds` are the blocks' first rows and the last
    one's end; `widths` the columns of every slot, rounded up.
    """

    table: AdapterTable
    slots: int
    bounds: tuple[int, ...]
    widths: tuple[int, ...]
    alignment: Alignment

    @property
    def blocks(self) -> int:
        return len(self.bounds) - 1

    def width_of(self, slot: int) -> int:
        """The columns of `slot`, rounded up; 0 of NO_ADAPTER."""
        return 0 if slot == NO_ADAPTER else self.widths[slot]

    @property
    def width_max(self) -> int:
        return max(self.widths)


def columns_of(blocks: Sequence[Pairs], bounds: Sequence[int], x: torch.Tensor) -> Columns:
    """The columns of `blocks`, whose pairs have the precision of `x` and lie on its device."""
    slots = len(blocks[0]) + 1
    assert all(len(pairs) == slots - 1 for pairs in blocks), "blocks have the same slots"
    for pairs in blocks:
        check_precision(pairs, x)
        for pair in pairs:
            assert pair is None or pair.a.shape == (pair.rank, x.shape[1])
    in_order = [pair for pairs in blocks for pair in (*pairs, None)]
    ranks = [0 if pair is None else pair.rank for pair in in_order]
    widths = tuple(
        -(-sum(ranks[slot::slots]) // COLUMN_STEP) * COLUMN_STEP for slot in range(slots)
    )
    # The table appends the slot of tokens without an adapter itself; that of the last block is it.
    table = adapter_table(in_order[:-1], x.device)
    pairs = [pair for pair in in_order if pair is not None]
    row_bytes = x.shape[1] * x.element_size()
    alignment = Alignment(
        a=row_bytes % ALIGNED_BYTES == 0 and all(are_aligned(p.a, p.a_grad) for p in pairs),
        b=all(p.rank % ALIGNED_RANKS == 0 and are_aligned(p.b, p.b_grad) for p in pairs),
    )
    return Columns(table, slots, tuple(bounds), widths, alignment)


def depth_of(factor: torch.Tensor) -> int:
    """How long a sum of products a program takes at a time; float32 has no matrix instructions, and fewer registers."""
    return _DEPTHS[factor.element_size()]


@lru_cache(maxsize=256)
def row_tiles(bounds: tuple[int, ...], step: int, device: torch.device) -> torch.Tensor:
    """Blocks of at most `step` rows, none across two layers: int32 [3, N] of layer, first row, end."""
    tiles = [
        (block, start, min(start + step, end))
        for block, (begin, end) in enumerate(itertools.pairwise(bounds))
        for start in range(begin, end, step)
    ]
    table = torch.tensor(tiles, dtype=torch.int32).view(-1, 3).T.contiguous()
    return to_device(table, device)


@lru_cache(maxsize=256)
def first_rows(bounds: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`bounds` on the device, int32."""
    return to_device(torch.tensor(bounds, dtype=torch.int32), device)


@triton.jit
def rank_at(table, slots, slot, block, BLOCKS: tl.constexpr):
    """The rank of `slot` at `block`."""
    return rank_of(table, BLOCKS * slots, block * slots + slot)


@triton.jit
def scale_at(table, slots, slot, block, BLOCKS: tl.constexpr):
    """What the update of `slot` at `block` is multiplied by."""
    return scale_of(table, BLOCKS * slots, block * slots + slot)


@triton.jit
def address_at(table, slots, slot, block, WHICH: tl.constexpr, BLOCKS: tl.constexpr):
    """The address of a factor or a gradient of `slot` at `block`."""
    return tl.load(table + WHICH * BLOCKS * slots + block * slots + slot)


@triton.jit
def first_column(table, slots, slot, block, BLOCKS: tl.constexpr):
    """Where the columns of `block` begin; with `block` = BLOCKS, how many there are."""
    first = 0
    for other in tl.static_range(BLOCKS):  # pyright: ignore[reportGeneralTypeIssues]
        first += tl.where(other < block, rank_at(table, slots, slot, other, BLOCKS), 0)
    return first


@triton.jit
def column_rows(
    table,
    slots,
    slot,
    columns,
    inputs,
    like,
    WHICH: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A pointer to the row of A, or of its gradient, that each of `columns` is; whether there is one; and its scale.

    Elements are of the type that `like` points to.
    """
    rows = tl.zeros_like(columns).to(tl.int64)
    scales = tl.zeros_like(columns).to(tl.float32)
    element: tl.constexpr = like.dtype.element_ty.primitive_bitwidth // 8
    first = 0
    for block in tl.static_range(BLOCKS):  # pyright: ignore[reportGeneralTypeIssues]
        rank = rank_at(table, slots, slot, block, BLOCKS)
        address = address_at(table, slots, slot, block, WHICH, BLOCKS)
        inside = (columns >= first) & (columns < first + rank)
        here = address + (columns - first).to(tl.int64) * (inputs * element)
        rows = tl.where(inside & (address != 0), here, rows)
        scales = tl.where(inside, scale_at(table, slots, slot, block, BLOCKS), scales)
        first += rank
    pointers = rows.to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [16])
    return pointers, rows != 0, scales


@triton.jit
def block_columns(
    table, slots, slot, block, like, WHICH: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr
):
    """Of `slot` at `block`: the rank, the first column, and a pointer to B or its gradient, null if there is none."""
    rank = rank_at(table, slots, slot, block, BLOCKS)
    first = first_column(table, slots, slot, block, BLOCKS)
    address = address_at(table, slots, slot, block, WHICH, BLOCKS)
    pointer = address.to(tl.pointer_type(like.dtype.element_ty))
    if EVEN:
        rank = tl.multiple_of(rank, 8)
        first = tl.multiple_of(first, 8)
        pointer = tl.multiple_of(pointer, 16)
    return rank, first, pointer
