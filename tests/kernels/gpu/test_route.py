"""The plan of a mixture's rows, worked out by the device, against one that looks at every pair."""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import pytest
import torch

from river_kernels import NO_ADAPTER, Segment, Segments
from river_kernels.gpu.launch import Launch, recorded
from river_kernels.gpu.route import RoutePlan, make_plan, tiles_max

EXPERTS, SLOTS, CHOSEN = 5, 4, 2
CASES = {
    "mixed": [(0, 7), (NO_ADAPTER, 5), (2, 0), (1, 19)],
    "one": [(2, 33)],
    "nobody": [(NO_ADAPTER, 3), (0, 1), (NO_ADAPTER, 9)],
}


def make_case(name: str, *, one_expert: bool = False) -> tuple[torch.Tensor, Segments]:
    segments: list[Segment] = []
    total = 0
    for slot, tokens in CASES[name]:
        segments.append(Segment(slot, total, total + tokens))
        total += tokens
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.rand(total, EXPERTS - 1, generator=generator).topk(CHOSEN).indices
    if one_expert:
        experts_TK = torch.tensor([3, 1]).expand(total, CHOSEN)
    return experts_TK, tuple(segments)


def plan_of(experts_TK: torch.Tensor, segments: Segments, block: int = 4) -> RoutePlan:
    return make_plan(experts_TK, segments, experts=EXPERTS, slots=SLOTS, block=block)


def expected_groups(experts_TK: torch.Tensor, segments: Segments) -> dict[tuple[int, int], list]:
    """The pairs of each expert and slot, in the order of their tokens."""
    pairs: dict[tuple[int, int], list] = {
        (expert, slot): [] for expert in range(EXPERTS) for slot in range(SLOTS)
    }
    for segment in segments:
        slot = SLOTS - 1 if segment.slot == NO_ADAPTER else segment.slot
        for token in range(segment.start, segment.end):
            for k, expert in enumerate(experts_TK[token].tolist()):
                pairs[expert, slot].append(token * CHOSEN + k)
    return pairs


@pytest.mark.parametrize("one_expert", [False, True], ids=["any experts", "one expert"])
@pytest.mark.parametrize("name", list(CASES))
def test_rows_lie_by_expert_and_slot(name: str, *, one_expert: bool) -> None:
    """Permutation, inverse, tokens, offsets and groups are what sorting by hand gives."""
    experts_TK, segments = make_case(name, one_expert=one_expert)
    plan = plan_of(experts_TK, segments)
    groups = expected_groups(experts_TK, segments)
    order = [pair for pairs in groups.values() for pair in pairs]
    assert plan.permutation.tolist() == order
    assert plan.permutation[plan.inverse.long()].tolist() == list(range(len(order)))
    assert plan.token.tolist() == [pair // CHOSEN for pair in order]
    slot, expert, start, end = plan.groups.rows.tolist()
    assert list(zip(expert, slot, strict=True)) == list(groups)
    assert [last - first for first, last in zip(start, end, strict=True)] == list(
        map(len, groups.values())
    )
    assert start == [0, *end[:-1]]
    assert plan.offsets.tolist() == end[SLOTS - 1 :: SLOTS]
    for tensor in (plan.permutation, plan.inverse, plan.token, plan.offsets, plan.groups.rows):
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()


@pytest.mark.parametrize("block", [1, 4, 16, 64])
@pytest.mark.parametrize("name", list(CASES))
def test_tiles_cover_groups_from_their_starts(name: str, block: int) -> None:
    """Every group is cut from its first row on, nothing reaches over two, and what is left over is empty."""
    experts_TK, segments = make_case(name)
    plan = plan_of(experts_TK, segments, block)
    expected = [
        (slot, expert, first, min(first + block, end))
        for slot, expert, start, end in plan.groups.rows.T.tolist()
        for first in range(start, end, block)
    ]
    tiles = [tuple(tile) for tile in plan.tiles.rows.T.tolist()]
    assert tiles[: len(expected)] == expected
    assert all(start >= end for _, _, start, end in tiles[len(expected) :])
    assert all(0 <= slot < SLOTS and 0 <= expert < EXPERTS for slot, expert, _, _ in tiles)
    assert plan.tiles.block == block
    assert plan.tiles.count == tiles_max(experts_TK.numel(), EXPERTS * SLOTS, block)


def test_the_bound_on_tiles_is_reached() -> None:
    """No fewer tiles would do for every division of rows, and no division takes more."""

    def most(rows: int, groups: int, block: int) -> int:
        if groups == 1:
            return -(-rows // block)
        return max(
            -(-first // block) + most(rows - first, groups - 1, block) for first in range(rows + 1)
        )

    for rows in range(1, 12):
        for groups in (1, 2, 4):
            for block in (1, 3, 4):
                assert tiles_max(rows, groups, block) == most(rows, groups, block)


def test_a_plan_is_made_without_waiting() -> None:
    """On a device without storage, where looking at a number fails, it has the same shapes, and starts no kernel."""
    experts_TK, segments = make_case("mixed")
    started: list[Launch] = []
    with recorded(started.append):
        plan = plan_of(experts_TK.to("meta"), segments)
    here = plan_of(experts_TK, segments)
    for name in ("permutation", "inverse", "token", "offsets"):
        there: torch.Tensor = getattr(plan, name)
        assert there.is_meta
        assert there.shape == getattr(here, name).shape
    assert plan.tiles.rows.is_meta
    assert plan.tiles.count == here.tiles.count
    assert started == []


def test_a_slot_has_one_segment() -> None:
    """Its gradient has one writer."""
    segments = (Segment(0, 0, 3), Segment(1, 3, 5), Segment(0, 5, 6))
    with pytest.raises(AssertionError, match="one segment"):
        plan_of(torch.zeros(6, CHOSEN, dtype=torch.int64), segments)


def test_many_groups_have_keys_of_their_own() -> None:
    """Also more groups than 16 bits can tell apart are sorted right."""
    experts_TK = torch.tensor([[39_999, 7], [39_999, 32_768]])
    segments = (Segment(0, 0, 2),)
    plan = make_plan(experts_TK, segments, experts=40_000, slots=2, block=4)
    assert plan.permutation.tolist() == [1, 3, 0, 2]
