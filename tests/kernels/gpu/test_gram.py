"""The kernels that sum the gradients of factors over rows and over tokens."""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.moe_batches import INNER, Batch, make_batch, relative_error
from support.moe_rows import RANKS, TOKENS, Routed, routed

from river_kernels import NO_ADAPTER, LoraPair
from river_kernels.gpu.configs import GRAM_CHUNK
from river_kernels.gpu.gram import group_gram, segment_gram
from river_kernels.gpu.tables import A, B

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(pair: LoraPair, name: str, before: float, added: torch.Tensor, tolerance: float) -> None:
    """A gradient that was `before` everywhere has `added` on top."""
    grad: torch.Tensor = getattr(pair, name)
    assert relative_error(grad - before, added) < tolerance
    assert (grad[added == 0] == before).all()


def filled(batch: Batch, value: float) -> Batch:
    for pair in batch.pairs:
        for grad in (pair.a_grad, pair.b_grad):
            if grad is not None:
                grad.fill_(value)
    return batch


@DTYPES
def test_gradients_of_b_of_every_group(dtype: torch.dtype) -> None:
    """DB += scale * sum of weight * wide narrow^T, ranks from 1 to 128 in one launch, narrow rows by token."""
    world = routed(filled(make_batch(RANKS, TOKENS, shared=True, dtype=dtype), 0.5))
    plan = world.plan
    dz_PF = random(plan.rows, 2 * INNER, seed=1, dtype=dtype)
    v_TR = random(plan.tokens, 128, seed=2, dtype=dtype)
    weight_P = torch.rand(plan.rows, generator=torch.Generator().manual_seed(3)).to(dtype)
    group_gram(
        dz_PF, v_TR, world.gate_up, plan.groups, B,
        alignment=world.alignment, narrow_rows=plan.token, weight=weight_P,
    )  # fmt: skip
    sums = [
        torch.zeros(pair.b.shape, dtype=torch.float64) for pair in world.batch.gate_up_pairs if pair
    ]
    for row, slot, expert in world.rows():
        pair = world.batch.gate_up_pairs[slot]
        if slot >= 0 and pair is not None:
            v = weight_P[row].double() * v_TR[plan.token[row], : pair.rank].double()
            sums[slot][expert] += pair.scale * torch.outer(dz_PF[row].double(), v)
    for pair, added in zip(world.batch.gate_up_pairs, sums, strict=True):
        assert pair is not None
        check(pair, "b_grad", 0.5, added, TOLERANCES[dtype])
        assert pair.a_grad is not None
        assert (pair.a_grad == 0.5).all()


@DTYPES
@pytest.mark.parametrize("ranks", [RANKS, (8, 16, 8, 40, 64, 8, 8)], ids=["any", "aligned"])
def test_gradients_of_a_of_every_group(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    """DA += scale * sum of narrow wide^T, wide rows by token."""
    world = routed(filled(make_batch(ranks, TOKENS, shared=False, dtype=dtype), -0.25))
    plan, batch = world.plan, world.batch
    dv_PR = random(plan.rows, 128, seed=2, dtype=dtype)
    group_gram(
        batch.x_TH, dv_PR, world.gate_up, plan.groups, A,
        alignment=world.alignment, wide_rows=plan.token,
    )  # fmt: skip
    sums = [torch.zeros(pair.a.shape, dtype=torch.float64) for pair in batch.gate_up_pairs if pair]
    for row, slot, expert in world.rows():
        pair = batch.gate_up_pairs[slot]
        if slot >= 0 and pair is not None:
            x = batch.x_TH[plan.token[row]].double()
            sums[slot][expert] += pair.scale * torch.outer(dv_PR[row, : pair.rank].double(), x)
    for pair, added in zip(batch.gate_up_pairs, sums, strict=True):
        assert pair is not None
        check(pair, "a_grad", -0.25, added, TOLERANCES[dtype])


LONG = [(0, 3), (NO_ADAPTER, 5), (2, GRAM_CHUNK + 40), (1, GRAM_CHUNK)]


def token_sums(world: Routed, wide_TW: torch.Tensor, narrow_TR: torch.Tensor) -> list[torch.Tensor]:
    """Of every slot, scale * narrow^T wide."""
    sums: list[torch.Tensor] = []
    for slot, pair in enumerate(world.batch.gate_up_pairs):
        assert pair is not None
        tokens = [token for token, owner in world.tokens() if owner == slot]
        narrow, wide = narrow_TR[tokens, : pair.rank].double(), wide_TW[tokens].double()
        sums.append(pair.scale * narrow.T @ wide)
    return sums


@DTYPES
def test_gradients_that_experts_share(dtype: torch.dtype) -> None:
    """Tokens of no, one and several chunks: dA += scale * narrow^T wide; what nobody wants is skipped."""
    batch = make_batch((4, 40, 3, 2), LONG, shared=True, dtype=dtype, experts=2, chosen=1)
    world = routed(filled(batch, 1.0))
    narrow_TR = random(world.plan.tokens, 48, seed=2, dtype=dtype)
    segment_gram(batch.x_TH, narrow_TR, world.gate_up, batch.segments, A, alignment=world.alignment)
    sums = token_sums(world, batch.x_TH, narrow_TR)
    for pair, added in zip(batch.gate_up_pairs, sums, strict=True):
        assert pair is not None
        check(pair, "a_grad", 1.0, added[None], TOLERANCES[dtype])


def test_chunks_are_those_of_the_adapter() -> None:
    """An adapter's sum has the same bits when others' tokens lie before it."""
    batch = make_batch((4, 40, 3), LONG, shared=True, experts=2, chosen=1)
    narrow_TR = random(batch.x_TH.shape[0], 48, seed=2)
    world = routed(batch)
    segment_gram(batch.x_TH, narrow_TR, world.gate_up, batch.segments, A, alignment=world.alignment)
    alone = batch.only(2)
    (segment,) = (segment for segment in batch.segments if segment.slot == 2)
    own = routed(alone)
    segment_gram(
        alone.x_TH, narrow_TR[segment.start : segment.end], own.gate_up, alone.segments, A,
        alignment=own.alignment,
    )  # fmt: skip
    mixed_pair, alone_pair = batch.gate_up_pairs[2], alone.gate_up_pairs[0]
    assert mixed_pair is not None
    assert alone_pair is not None
    assert mixed_pair.a_grad is not None
    assert alone_pair.a_grad is not None
    assert alone_pair.a_grad.any()
    assert torch.equal(mixed_pair.a_grad, alone_pair.a_grad)


def test_missing_buffers_are_skipped() -> None:
    """A slot whose gradient nobody wants changes nothing, and the others get theirs."""
    batch = make_batch((4, 3), [(0, 6), (1, 7)], shared=False)
    first = batch.gate_up_pairs[0]
    assert first is not None
    batch = replace(batch, gate_up_pairs=(replace(first, b_grad=None), batch.gate_up_pairs[1]))
    world = routed(batch)
    dz_PF = random(world.plan.rows, 2 * INNER, seed=1)
    v_PR = random(world.plan.rows, 16, seed=2)
    group_gram(dz_PF, v_PR, world.gate_up, world.plan.groups, B, alignment=world.alignment)
    second = batch.gate_up_pairs[1]
    assert second is not None
    assert second.b_grad is not None
    assert second.b_grad.any()
    assert first.b_grad is not None
    assert not first.b_grad.any()
