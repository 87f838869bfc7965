"""Where the pairs (token, chosen expert) of a mixture lie, worked out on the device without the host ever waiting.

Pairs are sorted by (expert, slot), stably, so that an expert's rows are one slice for the frozen product, and an
adapter's rows of an expert are one slice of that, in the order of its tokens:

    expert   |------------ 0 ------------|------- 1 -------| …
    slot     |  0  |    1    | no adapter|  0  | no adapter| …     a group is one expert and one slot
    tile     | t t | t t t t |  t  t  t  |  t  |   t   t   | …     a tile never reaches over two groups

How many tiles there are only the device knows; the host starts as many as there may be, and the last are empty.
"""

# Tensors carry their shape in capitals.

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from river_kernels.gpu.tables import to_device
from river_kernels.gpu.tiles import Tiles, check_slots, token_slots
from river_kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """Rows of the P = T * K pairs. What a pass recomputes must go the same way: keep the plan, do not make it again.

    `permutation` int32 [P] has the pair (t * K + k) of each row, `inverse` int32 [P] the row of each pair, `token`
    int32 [P] the token of each row. `offsets` int32 [E] are the ends of the experts' rows. `groups` has one entry for
    each expert and slot, also where there is no row; `tiles` has its rows in blocks.
    """

    permutation: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    offsets: torch.Tensor
    groups: Tiles
    tiles: Tiles
    segments: Segments
    chosen: int

    @property
    def rows(self) -> int:
        return self.token.shape[0]

    @property
    def tokens(self) -> int:
        return self.rows // self.chosen


def make_plan(
    experts_TK: torch.Tensor, segments: Segments, *, experts: int, slots: int, block: int
) -> RoutePlan:
    """The plan of `experts_TK`, integers on the device that computes.

    `slots` as in `AdapterTable`, one more than there are adapters; `block` is the rows of a tile.
    """
    check_slots(segments)
    chosen = experts_TK.shape[1]
    pairs, groups = experts_TK.numel(), experts * slots
    device = experts_TK.device
    key_type = torch.int16 if groups <= torch.iinfo(torch.int16).max else torch.int32
    slot_T = token_slots(segments, slots=slots, device=device)
    key = (experts_TK * slots + slot_T[:, None]).to(key_type).reshape(-1)
    sorted_key, order = torch.sort(key, stable=True)
    inverse = torch.empty(pairs, dtype=torch.int32, device=device)
    inverse.scatter_(0, order, _count(pairs, torch.int32, device))
    bounds = torch.searchsorted(sorted_key, _count(groups + 1, key_type, device), out_int32=True)
    starts, ends = bounds[:-1], bounds[1:]
    slot_expert = _slots_and_experts(experts, slots, device)
    group_rows = torch.stack([slot_expert[0], slot_expert[1], starts, ends])
    permutation = order.to(torch.int32)
    return RoutePlan(
        permutation=permutation,
        inverse=inverse,
        token=permutation // chosen,
        offsets=bounds[slots::slots].contiguous(),
        groups=Tiles(group_rows, pairs, slots),
        tiles=Tiles(_tile_rows(group_rows, pairs, block), block, slots),
        segments=segments,
        chosen=chosen,
    )


def tiles_max(pairs: int, groups: int, block: int) -> int:
    """The tiles of the worst of all divisions of `pairs` rows among `groups`."""
    filled = min(pairs, groups)
    return (pairs + filled * (block - 1)) // block


def _tile_rows(groups: torch.Tensor, pairs: int, block: int) -> torch.Tensor:
    """Slot, expert, start and end of all tiles, int32 [4, `tiles_max`]; what is left over is empty."""
    starts, ends = groups[2], groups[3]
    last_tile = torch.cumsum((ends - starts + (block - 1)) // block, 0, dtype=torch.int32)
    tile = _count(tiles_max(pairs, groups.shape[1], block), torch.int32, groups.device)
    group = torch.searchsorted(last_tile, tile, right=True, out_int32=True)
    slot, expert, start, end = groups.index_select(1, group.clamp_max_(groups.shape[1] - 1))
    first_tile = last_tile.index_select(0, group) - (end - start + (block - 1)) // block
    # Behind the last tile, the start computed for its group lies at or behind the group's end.
    start = torch.minimum(start + (tile - first_tile) * block, end)
    return torch.stack([slot, expert, start, torch.minimum(start + block, end)])


@lru_cache(maxsize=64)
def _count(end: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.arange(end, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _slots_and_experts(experts: int, slots: int, device: torch.device) -> torch.Tensor:
    """Slot and expert of every group, int32 [2, E * slots]."""
    group = torch.arange(experts * slots, dtype=torch.int32)
    return to_device(torch.stack([group % slots, group // slots]), device)
