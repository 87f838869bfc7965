"""The kernel that shrinks tokens and rows to the ranks of their adapters."""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import pytest
import torch
from support.moe_batches import make_batch, relative_error
from support.moe_rows import RANKS, TOKENS, factors_of, routed

from river_kernels.gpu.configs import TOKEN_ROWS
from river_kernels.gpu.shrink import shrink
from river_kernels.gpu.tables import A, B
from river_kernels.gpu.tiles import token_tiles

UNTOUCHED = 7.0
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES))


def check_rows(
    actual_NR: torch.Tensor, expected: dict[int, torch.Tensor], tolerance: float
) -> None:
    """Rows are as expected as far as their ranks go, and nothing else was written."""
    for row, values in enumerate(actual_NR):
        wanted = expected.get(row, torch.empty(0))
        assert (values[len(wanted) :] == UNTOUCHED).all(), f"row {row}"
        if len(wanted):
            assert relative_error(values[: len(wanted)], wanted) < tolerance, f"row {row}"


@DTYPES
@pytest.mark.parametrize("factor", ["A", "B"])
def test_tokens(factor: str, dtype: torch.dtype) -> None:
    """Ranks from 1 to 128 side by side, of factors that experts share: x A^T, and x B where x has the width of B."""
    world = routed(make_batch(RANKS, TOKENS, shared=True, dtype=dtype))
    batch = world.batch
    table, pairs = (
        (world.gate_up, batch.gate_up_pairs) if factor == "A" else (world.down, batch.down_pairs)
    )
    out_TR = torch.full((batch.x_TH.shape[0], 128), UNTOUCHED, dtype=dtype)
    tiles = token_tiles(
        batch.segments, slots=table.slots, block=TOKEN_ROWS, device=torch.device("cpu")
    )
    shrink(
        batch.x_TH, out_TR, table, tiles, A if factor == "A" else B,
        shared=True, alignment=world.alignment,
    )  # fmt: skip
    expected: dict[int, torch.Tensor] = {}
    for token, slot in world.tokens():
        if slot >= 0 and (pair := pairs[slot]) is not None:
            a, b = factors_of(pair, 0)
            x = batch.x_TH[token].double()
            expected[token] = a @ x if factor == "A" else b.T @ x
    check_rows(out_TR, expected, TOLERANCES[dtype])


@DTYPES
def test_rows_of_experts(dtype: torch.dtype) -> None:
    """Every row has the factor of its expert and adapter, x of its token, and a weight; results may be more precise."""
    world = routed(make_batch(RANKS, TOKENS, shared=False, dtype=dtype))
    batch, plan = world.batch, world.plan
    weight_P = torch.rand(plan.rows, generator=torch.Generator().manual_seed(1)).to(dtype)
    out_PR = torch.full((plan.rows, 128), UNTOUCHED)
    shrink(
        batch.x_TH, out_PR, world.gate_up, plan.tiles, A,
        shared=False, alignment=world.alignment, rows=plan.token, weight=weight_P,
    )  # fmt: skip
    expected: dict[int, torch.Tensor] = {}
    for row, slot, expert in world.rows():
        if slot >= 0 and (pair := batch.gate_up_pairs[slot]) is not None:
            a, _ = factors_of(pair, expert)
            expected[row] = weight_P[row].double() * (a @ batch.x_TH[plan.token[row]].double())
    check_rows(out_PR, expected, 1e-6)


def test_small_adapters_can_be_left_out() -> None:
    """With a least rank, rows of smaller adapters stay as they are; aligned ranks are no different."""
    world = routed(make_batch((8, 32, 40), [(0, 5), (2, 9), (1, 7)], shared=False))
    batch, plan = world.batch, world.plan
    dz_PF = torch.randn(plan.rows, 80, generator=torch.Generator().manual_seed(1))
    out_PR = torch.full((plan.rows, 48), UNTOUCHED)
    shrink(
        dz_PF, out_PR, world.gate_up, plan.tiles, B,
        shared=False, alignment=world.alignment, rank_min=33,
    )  # fmt: skip
    expected: dict[int, torch.Tensor] = {}
    for row, slot, expert in world.rows():
        if slot == 2 and (pair := batch.gate_up_pairs[slot]) is not None:
            _, b = factors_of(pair, expert)
            expected[row] = b.T @ dz_PF[row].double()
    assert expected
    check_rows(out_PR, expected, 1e-6)
