"""The whole mixture of experts in Triton's interpreter, against the formula in float64 and the CPU path."""

# Tensors carry their shape in capitals.
# ruff: noqa: N806

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.moe_batches import Batch, Results, check_close, formula, make_batch, run

from river_kernels import NO_ADAPTER, moe_lora
from river_kernels.device import triton_on_cpu
from river_kernels.gpu import moe
from river_kernels.gpu.launch import Launch, recorded
from river_kernels.quantized import QuantizedWeight, Scratch, quantize_fp8

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
LAYOUTS = pytest.mark.parametrize("shared", [True, False], ids=["shared_outer", "per_expert"])
TOKENS = [(0, 7), (NO_ADAPTER, 5), (2, 0), (3, 19), (1, 2)]
"""A slot without tokens, tokens without an adapter."""


def interpreted(batch: Batch) -> Results:
    """Forward and backward in Triton's interpreter."""
    with triton_on_cpu():
        return run(batch)


@LAYOUTS
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_mixed_ranks_equal_the_formula(*, shared: bool, dtype: torch.dtype) -> None:
    """Small and odd ranks, tokens without an adapter, a slot without tokens, an expert that nobody chose."""
    batch = make_batch((4, 1, 8, 3), TOKENS, shared=shared, dtype=dtype)
    check_close(interpreted(batch), formula(batch), TOLERANCES[dtype])


@LAYOUTS
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_large_ranks_equal_the_formula(*, shared: bool, dtype: torch.dtype) -> None:
    """Ranks of several blocks beside small ones; more rows of a group than a tile has."""
    tokens = [(0, 3), (1, 40), (2, 9), (NO_ADAPTER, 1)]
    batch = make_batch((128, 16, 64), tokens, shared=shared, dtype=dtype, experts=3, seed=1)
    check_close(interpreted(batch), formula(batch), TOLERANCES[dtype])


@LAYOUTS
def test_all_tokens_on_the_same_experts(*, shared: bool) -> None:
    """Where everybody chooses the same experts, groups are long and most are empty."""
    batch = make_batch((4, 8), [(1, 21), (0, 44)], shared=shared, used_experts=2)
    check_close(interpreted(batch), formula(batch), TOLERANCES[torch.float32])


@LAYOUTS
def test_slots_may_have_nothing_at_a_site(*, shared: bool) -> None:
    """A slot without an adapter for gate and up, one without for down, one without both; each gets what is its own."""
    batch = make_batch((4, 3, 2), [(0, 6), (1, 5), (2, 7)], shared=shared)
    first, second = batch.gate_up_pairs, batch.down_pairs
    batch = replace(batch, gate_up_pairs=(None, first[1], None), down_pairs=(second[0], None, None))
    check_close(interpreted(batch), formula(batch), TOLERANCES[torch.float32])


def test_a_batch_without_adapters() -> None:
    """Frozen experts alone: outputs, and gradients of inputs and router weights."""
    batch = make_batch((), [(NO_ADAPTER, 9)], shared=True)
    check_close(interpreted(batch), formula(batch), TOLERANCES[torch.float32])


def test_no_tokens() -> None:
    """Nothing in, nothing out, and a gradient of nothing."""
    batch = make_batch((4,), [(0, 0)], shared=True)
    x = batch.x_TH.clone().requires_grad_()
    with triton_on_cpu():
        out = moe_lora(
            x, batch.experts_TK, batch.weights_TK, batch.gate_up, batch.down, batch.segments,
            batch.gate_up_pairs, batch.down_pairs,
        )  # fmt: skip
        out.backward(batch.dout_TH)
    assert out.shape == (0, batch.x_TH.shape[1])
    assert x.grad is not None


@LAYOUTS
def test_both_paths_agree(*, shared: bool) -> None:
    """The interpreter and the CPU path give the same but for rounding."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
        batch = make_batch((4, 1, 8, 3), TOKENS, shared=shared, dtype=dtype, seed=3)
        beside = batch.cloned()
        here = interpreted(batch)
        check_close(here, run(beside), tolerance)


@LAYOUTS
def test_gradients_add_up(*, shared: bool) -> None:
    """Two passes into the same buffers leave the sum of both."""
    batch = make_batch((4, 3), [(0, 9), (1, 8)], shared=shared)
    once = interpreted(batch.cloned()).factors
    interpreted(batch)
    for grad, first in zip(interpreted(batch).factors, once, strict=True):
        assert grad is not None
        assert first is not None
        assert first.any()
        assert torch.equal(grad, 2 * first)


@LAYOUTS
@pytest.mark.parametrize("missing", ["a_grad", "b_grad"])
def test_gradients_that_nobody_wants(missing: str, *, shared: bool) -> None:
    """Where one factor's buffer is missing, all else is right."""
    batch = make_batch((4, 3), [(0, 9), (1, 8)], shared=shared)
    batch = replace(
        batch,
        gate_up_pairs=tuple(
            pair and replace(pair, **{missing: None}) for pair in batch.gate_up_pairs
        ),
        down_pairs=tuple(pair and replace(pair, **{missing: None}) for pair in batch.down_pairs),
    )
    results = interpreted(batch)
    assert sum(grad is None for grad in results.factors) == len(results.factors) // 2
    check_close(results, formula(batch), TOLERANCES[torch.float32])


def test_stored_weights_are_read_when_they_are_needed() -> None:
    """Experts that share one scratch give what their numbers give, forward and backward."""
    batch = make_batch((4, 3), [(0, 9), (1, 8)], shared=True)
    scratch = Scratch()
    gate_up, down = (
        QuantizedWeight((quantize_fp8(weight, (16, 16)),), torch.float32, scratch)
        for weight in (batch.gate_up, batch.down)
    )
    numbers = [weight.dense().clone() for weight in (gate_up, down)]
    x = batch.x_TH.clone().requires_grad_()
    with triton_on_cpu():
        out = moe.moe_lora(
            x, batch.experts_TK, batch.weights_TK, gate_up, down, batch.segments,
            batch.gate_up_pairs, batch.down_pairs,
        )  # fmt: skip
        out.backward(batch.dout_TH)
    expected = formula(replace(batch, gate_up=numbers[0], down=numbers[1]))
    assert torch.allclose(out.detach().double(), expected.out_TH, atol=1e-5)
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), expected.dx_TH, atol=1e-5)


@LAYOUTS
def test_a_plan_can_be_gone_again(*, shared: bool) -> None:
    """With the plan of an earlier pass the experts go unread: the same bits, though the choice says otherwise."""
    batch = make_batch((4, 3), [(0, 9), (1, 8)], shared=shared)
    plan = moe.plan_moe(batch.experts_TK, batch.segments, experts=5, adapters=2)
    outs: list[torch.Tensor] = []
    for experts_TK, kept in ((batch.experts_TK, None), (torch.zeros_like(batch.experts_TK), plan)):
        x = batch.x_TH.clone().requires_grad_()
        with triton_on_cpu():
            out = moe.moe_lora(
                x, experts_TK, batch.weights_TK, batch.gate_up, batch.down, batch.segments,
                batch.gate_up_pairs, batch.down_pairs, kept,
            )  # fmt: skip
            out.backward(batch.dout_TH)
        assert x.grad is not None
        outs += [out.detach(), x.grad]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def test_layouts_do_not_mix() -> None:
    """One pass has adapters of one layout, and of the precision of x."""
    batch = make_batch((4, 3), [(0, 9), (1, 8)], shared=True)
    other = make_batch((4, 3), [(0, 9), (1, 8)], shared=False)
    with pytest.raises(AssertionError, match="both expert layouts"):
        interpreted(replace(batch, down_pairs=other.down_pairs))
    with pytest.raises(AssertionError, match="slot 0 is not"):
        interpreted(replace(batch, x_TH=batch.x_TH.bfloat16()))


@LAYOUTS
def test_everything_is_planned_without_waiting(*, shared: bool) -> None:
    """On tensors without storage, where looking at a number fails, forward and backward start the same kernels."""
    batch = make_batch((4, 64), [(0, 9), (1, 8)], shared=shared)
    started: list[Launch] = []
    with recorded(started.append):
        interpreted(batch)
    planned: list[Launch] = []
    with recorded(planned.append):
        run(batch.to("meta"))
    names = [launch.kernel.__name__ for launch in planned]
    assert names == [launch.kernel.__name__ for launch in started]
    assert [launch.grid for launch in planned] == [launch.grid for launch in started]
    assert "combine_rows" in names
