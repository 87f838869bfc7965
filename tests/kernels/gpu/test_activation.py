"""The experts' activation with its adapters, forward and backward, row by row."""

# Tensors carry their shape in capitals.
# ruff: noqa: N806, N815

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.moe_batches import INNER, leaf, make_batch, relative_error
from support.moe_rows import RANKS, TOKENS, Routed, factors_of, routed
from torch.nn import functional

from river_kernels.gpu.activation import activate
from river_kernels.gpu.activation_backward import activate_backward
from river_kernels.gpu.configs import RANK_BLOCK

UNTOUCHED = 7.0
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES))
BY_TOKEN = pytest.mark.parametrize("by_token", [True, False], ids=["by token", "by row"])


@dataclass(frozen=True)
class Inputs:
    """What the kernels read: z of the frozen experts, x A^T and dout B, dh of the frozen experts, router weights."""

    z_PF: torch.Tensor
    v1: torch.Tensor
    dv2: torch.Tensor
    dh_PI: torch.Tensor
    weight_P: torch.Tensor
    token: torch.Tensor | None


def make_inputs(world: Routed, dtype: torch.dtype, *, by_token: bool) -> Inputs:
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, narrow = world.plan.rows, world.plan.tokens if by_token else world.plan.rows
    return Inputs(
        random(rows, 2 * INNER),
        random(narrow, 128),
        random(narrow, 128),
        random(rows, INNER),
        torch.rand(rows, generator=generator).to(dtype),
        world.plan.token if by_token else None,
    )


@dataclass(frozen=True)
class Row:
    """What one row gives: h, the gradients of z and of x A^T (None without an adapter), and of the router's weight."""

    h: torch.Tensor
    dz: torch.Tensor
    dv1: torch.Tensor | None
    dweight: torch.Tensor


def formula(world: Routed, inputs: Inputs, row: int, slot: int, expert: int) -> Row:
    """Through autograd in float64; the gradient of h has the adapter's share added, as down's A gives it."""
    source = row if inputs.token is None else int(inputs.token[row])
    z, weight = leaf(inputs.z_PF[row]), leaf(inputs.weight_P[row])
    dh = inputs.dh_PI[row].double()
    v1, total = None, z
    if slot >= 0:
        gate_up, down = world.batch.gate_up_pairs[slot], world.batch.down_pairs[slot]
        assert gate_up is not None
        assert down is not None
        _, b1 = factors_of(gate_up, expert)
        a2, _ = factors_of(down, expert)
        v1 = leaf(inputs.v1[source, : gate_up.rank])
        total = z + gate_up.scale * (b1 @ v1)
        dh = dh + down.scale * (inputs.dv2[source, : down.rank].double() @ a2)
    gate, up = total.chunk(2)
    h = functional.silu(gate) * up
    (weight * h @ dh).backward()
    assert z.grad is not None
    assert weight.grad is not None
    # The kernel leaves the scale to whoever uses it.
    dv1 = None
    if v1 is not None and v1.grad is not None:
        pair = world.batch.gate_up_pairs[slot]
        assert pair is not None
        dv1 = v1.grad / pair.scale
    return Row(h.detach(), z.grad, dv1, weight.grad)


@BY_TOKEN
@DTYPES
def test_forward(dtype: torch.dtype, *, by_token: bool) -> None:
    """H of every row, with ranks from 1 to 128 side by side and rows without an adapter; z stays."""
    world = routed(make_batch(RANKS, TOKENS, shared=True, dtype=dtype))
    inputs = make_inputs(world, dtype, by_token=by_token)
    before = inputs.z_PF.clone()
    h_PI = torch.full((world.plan.rows, INNER), UNTOUCHED, dtype=dtype)
    activate(
        inputs.z_PF, inputs.v1, h_PI, world.gate_up, world.plan.tiles,
        alignment=world.alignment, token=inputs.token,
    )  # fmt: skip
    for row, slot, expert in world.rows():
        expected = formula(world, inputs, row, slot, expert)
        assert relative_error(h_PI[row], expected.h) < TOLERANCES[dtype], (row, slot)
    assert torch.equal(inputs.z_PF, before)


@BY_TOKEN
@DTYPES
@pytest.mark.parametrize("ranks", [RANKS, (8, 16, 32, 40, 64, 8, 24)], ids=["any", "aligned"])
def test_backward(ranks: tuple[int, ...], dtype: torch.dtype, *, by_token: bool) -> None:
    """All gradients of every row; those of x A^T only of adapters that fit a block, in float32."""
    world = routed(make_batch(ranks, TOKENS, shared=True, dtype=dtype))
    plan, inputs = world.plan, make_inputs(world, dtype, by_token=by_token)
    dz_PF, weighted_h_PI = torch.empty_like(inputs.z_PF), torch.empty_like(inputs.dh_PI)
    dv1_PR = torch.full((plan.rows, 128), UNTOUCHED)
    dweights = torch.empty(plan.tokens, plan.chosen, dtype=dtype)
    activate_backward(
        inputs.dh_PI, inputs.z_PF, inputs.v1, inputs.dv2, inputs.weight_P, plan.permutation, dz_PF,
        weighted_h_PI, dv1_PR, dweights, world.gate_up, world.down, plan.tiles,
        alignment=world.alignment, token=inputs.token,
    )  # fmt: skip
    expected_weights = torch.empty(plan.rows, dtype=torch.float64)
    tolerance = TOLERANCES[dtype]
    for row, slot, expert in world.rows():
        expected = formula(world, inputs, row, slot, expert)
        expected_weights[plan.permutation[row]] = expected.dweight
        weight = inputs.weight_P[row].double()
        assert relative_error(dz_PF[row], expected.dz) < tolerance, (row, slot)
        assert relative_error(weighted_h_PI[row], weight * expected.h) < tolerance, (row, slot)
        rank = 0 if slot < 0 or ranks[slot] > RANK_BLOCK else ranks[slot]
        assert (dv1_PR[row, rank:] == UNTOUCHED).all(), (row, slot)
        if rank:
            assert expected.dv1 is not None
            assert relative_error(dv1_PR[row, :rank], expected.dv1) < tolerance, (row, slot)
    assert relative_error(dweights.view(-1), expected_weights) < tolerance
