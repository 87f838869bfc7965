"""Blocks of rows that one program computes: all of one adapter, and in a mixture of one expert.

A tile begins where its adapter's rows begin, never across two, so that what an adapter gets does not depend on who lies
before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from river_kernels.gpu.tables import to_device
from river_kernels.segments import NO_ADAPTER, Segments


@dataclass(frozen=True, slots=True)
class Tiles:
    """`rows` int32 [4, N]: slot, expert, first row, end of each tile, of at most `block` rows; N is known to the host.

    Tiles at the end may be empty. Tokens without an adapter have the last slot of `slots`, as in `AdapterTable`.
    """

    rows: torch.Tensor
    block: int
    slots: int

    @property
    def count(self) -> int:
        return self.rows.shape[1]


def check_slots(segments: Segments) -> None:
    """Asserts that no adapter has two segments: a gradient is written by whoever has the adapter's tokens."""
    named = [segment.slot for segment in segments if segment.slot != NO_ADAPTER]
    assert len(set(named)) == len(named), "a slot has one segment"


def token_tiles(segments: Segments, *, slots: int, block: int, device: torch.device) -> Tiles:
    """Tiles of tokens; `slots` as in `AdapterTable`, one more than there are adapters."""
    return Tiles(_token_tiles(segments, slots, block, device), block, slots)


def token_slots(segments: Segments, *, slots: int, device: torch.device) -> torch.Tensor:
    """The slot of every token, int32 [T]."""
    return _token_slots(segments, slots, device)


@lru_cache(maxsize=64)
def _token_tiles(segments: Segments, slots: int, block: int, device: torch.device) -> torch.Tensor:
    tiles = [
        (_slot(segment.slot, slots), 0, start, min(start + block, segment.end))
        for segment in segments
        for start in range(segment.start, segment.end, block)
    ]
    table = torch.tensor(tiles, dtype=torch.int32).view(-1, 4).T.contiguous()
    return to_device(table, device)


@lru_cache(maxsize=64)
def _token_slots(segments: Segments, slots: int, device: torch.device) -> torch.Tensor:
    of_segment = torch.tensor([_slot(segment.slot, slots) for segment in segments])
    lengths = torch.tensor([segment.end - segment.start for segment in segments])
    return to_device(torch.repeat_interleave(of_segment, lengths).to(torch.int32), device)


def _slot(slot: int, slots: int) -> int:
    return slots - 1 if slot == NO_ADAPTER else slot
