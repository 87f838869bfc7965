"""Shapes of tiles.

They follow from the model's widths and its precision, never from what else is in the batch: an adapter gets the same
bits in any company, and a program is compiled once for all batches and ranks. What the batch decides is how many
programs there are, and whether threads may move 16 bytes at once, which moves the same numbers.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import triton

from river_kernels.gpu.tables import AdapterTable
from river_kernels.segments import LoraPair

RANK_BLOCK = 32
"""Ranks that a program computes; larger adapters take several programs."""

RANK_STEP = 16
"""Ranks that an expansion sums at a time: what one matrix instruction takes."""

ROUTE_ROWS = 32
"""Rows of a tile of one expert and adapter. Fewer would read the factors more often where groups are long, more would
be empty where they are short; with many adapters a group has 4 to 64 rows."""

TOKEN_ROWS = 64
"""Tokens of a tile of kernels that shrink tokens: one warp group's matrix instruction."""

COMBINE_ROWS = 32
COMBINE_WIDTH = 128
COMBINE_WARPS = 8

GRAM_ROWS = 32
GRAM_WIDTH = 128
GRAM_WARPS = 8
GRAM_CHUNK = 1024
"""Tokens that one program of a segment's gram sums."""

SHRINK_BYTES = 256
"""Of each row, at a time."""

ACTIVATION_BYTES = 256
BACKWARD_BYTES = 128

SHRINK_STAGES = 3
GRAM_STAGES = 3
EXPAND_WIDTH = 128

ALIGNED_BYTES = 16
ALIGNED_RANKS = 8
_WIDTH_MIN = 16


def block_of(width: int, bytes_max: int, dtype: torch.dtype) -> int:
    """How much of `width` a program has at a time, a power of two."""
    return min(bytes_max // dtype.itemsize, max(_WIDTH_MIN, triton.next_power_of_2(width)))


class Alignment(IntEnum):
    """What allows threads to move 16 bytes of factors, their gradients and rank-sized rows at once."""

    NOTHING = 0
    ADDRESSES = 1
    ADDRESSES_AND_RANKS = 2


def alignment_of(*tables: AdapterTable) -> Alignment:
    """What all adapters allow."""
    pairs = [pair for table in tables for pair in table.pairs if pair is not None]
    if not all(map(_has_aligned_addresses, pairs)):
        return Alignment.NOTHING
    if any(pair.rank % ALIGNED_RANKS for pair in pairs):
        return Alignment.ADDRESSES
    return Alignment.ADDRESSES_AND_RANKS


def _has_aligned_addresses(pair: LoraPair) -> bool:
    return are_aligned(pair.a, pair.b, pair.a_grad, pair.b_grad)


def are_aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether those that there are begin where 16 bytes can be moved at once."""
    return all(tensor is None or _start(tensor) % ALIGNED_BYTES == 0 for tensor in tensors)


def _start(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.itemsize if tensor.is_meta else tensor.data_ptr()
