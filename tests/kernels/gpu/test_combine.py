"""The kernels that bring rows back to tokens, and that add adapters to rows and to tokens."""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import pytest
import torch
from support.moe_batches import HIDDEN, make_batch, relative_error
from support.moe_rows import RANKS, TOKENS, Routed, factors_of, routed

from river_kernels.gpu.combine import Expansion, combine
from river_kernels.gpu.row_expand import expand_into_rows
from river_kernels.gpu.tables import A, B

UNTOUCHED = 7.0
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sum_by_token(
    world: Routed, rows_PW: torch.Tensor, weights_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """In float64, the rows of each token, weighted."""
    by_pair = rows_PW.double()[world.plan.inverse.long()].view(
        world.plan.tokens, world.plan.chosen, -1
    )
    return (by_pair if weights_TK is None else by_pair * weights_TK.double()[..., None]).sum(1)


@DTYPES
@pytest.mark.parametrize("chosen", [1, 3])
def test_rows_are_weighed_and_summed(chosen: int, dtype: torch.dtype) -> None:
    """Without an expansion every token has the sum of its rows, weighted or not."""
    world = routed(make_batch((4, 3), [(1, 37), (0, 2)], shared=False, dtype=dtype, chosen=chosen))
    y_PH = random(world.plan.rows, 200, seed=1, dtype=dtype)
    for weights_TK in (world.batch.weights_TK, None):
        out_TH = torch.full((world.plan.tokens, 200), UNTOUCHED, dtype=dtype)
        combine(y_PH, out_TH, world.plan, weights_TK=weights_TK)
        expected = sum_by_token(world, y_PH, weights_TK)
        assert relative_error(out_TH, expected) < TOLERANCES[dtype]


@DTYPES
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("ranks", [RANKS, (8, 16, 32, 40, 64, 8, 128)], ids=["any", "aligned"])
def test_shared_factors_are_added_to_tokens(
    ranks: tuple[int, ...], factor: str, dtype: torch.dtype
) -> None:
    """`scale * (sum of narrow rows) F`, and the sums beside it, as far as each rank goes."""
    world = routed(make_batch(ranks, TOKENS, shared=True, dtype=dtype))
    batch, plan = world.batch, world.plan
    pairs = batch.gate_up_pairs if factor == "A" else batch.down_pairs
    y_PH = random(plan.rows, HIDDEN, seed=1, dtype=dtype)
    narrow_PR = random(plan.rows, 128, seed=2)
    out_TH = torch.empty(plan.tokens, HIDDEN, dtype=dtype)
    summed_TR = torch.full((plan.tokens, 128), UNTOUCHED, dtype=dtype)
    expansion = Expansion(
        narrow_PR,
        summed_TR,
        world.gate_up if factor == "A" else world.down,
        A if factor == "A" else B,
        world.alignment,
    )
    combine(y_PH, out_TH, plan, weights_TK=batch.weights_TK, expansion=expansion)
    expected_TH = sum_by_token(world, y_PH, batch.weights_TK)
    sums_TR = sum_by_token(world, narrow_PR)
    for token, slot in world.tokens():
        rank = ranks[slot] if slot >= 0 else 0
        assert (summed_TR[token, rank:] == UNTOUCHED).all(), token
        if slot >= 0:
            pair = pairs[slot]
            assert pair is not None
            sums = sums_TR[token, :rank]
            assert relative_error(summed_TR[token, :rank], sums) < TOLERANCES[dtype]
            a, b = factors_of(pair, 0)
            expected_TH[token] += pair.scale * (sums @ a if factor == "A" else b @ sums)
        assert relative_error(out_TH[token], expected_TH[token]) < TOLERANCES[dtype], token


@DTYPES
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("ranks", [RANKS, (8, 16, 32, 40, 64, 8, 128)], ids=["any", "aligned"])
def test_experts_own_factors_are_added_to_rows(
    ranks: tuple[int, ...], factor: str, dtype: torch.dtype
) -> None:
    """`y += scale * v F`; rows without an adapter keep their bits."""
    world = routed(make_batch(ranks, TOKENS, shared=False, dtype=dtype))
    pairs = world.batch.gate_up_pairs if factor == "A" else world.batch.down_pairs
    y_PH = random(world.plan.rows, HIDDEN, seed=1, dtype=dtype)
    v_PR = random(world.plan.rows, 128, seed=2, dtype=dtype)
    before = y_PH.clone()
    expand_into_rows(
        y_PH, v_PR, world.gate_up if factor == "A" else world.down, world.plan.tiles,
        A if factor == "A" else B, alignment=world.alignment,
    )  # fmt: skip
    for row, slot, expert in world.rows():
        if slot < 0:
            assert torch.equal(y_PH[row], before[row])
            continue
        pair = pairs[slot]
        assert pair is not None
        a, b = factors_of(pair, expert)
        v = v_PR[row, : pair.rank].double()
        expected = before[row].double() + pair.scale * (v @ a if factor == "A" else b @ v)
        assert relative_error(y_PH[row], expected) < TOLERANCES[dtype], (row, slot)
