"""The dense layers' Triton path against float64 formulas, and what it promises of bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from river_kernels import NO_ADAPTER, Block, LoraPair, Segment, Segments, lora_linear_blocks
from river_kernels.device import triton_on_cpu
from river_kernels.gpu import linear
from river_kernels.gpu.augmented import augmented, room_of
from river_kernels.gpu.launch import Launch, recorded
from river_kernels.quantized import QuantizedWeight, Scratch, dense_weight, quantize_fp8

BOUNDS = (0, 136, 160, 161)
INPUTS = 72

MIXED: Segments = (
    Segment(0, 0, 7),
    Segment(NO_ADAPTER, 7, 12),
    Segment(2, 12, 12),
    Segment(1, 12, 81),
    Segment(4, 81, 90),
    Segment(3, 90, 91),
    Segment(5, 91, 100),
)
MIXED_RANKS = ((4, 1, 3), (64, 0, 16), (8, 8, 8), (1, 1, 1), (128, 3, 0), (0, 0, 0))

# Of the tokens that `low_limits` makes long.
LONG: Segments = (
    Segment(1, 0, 70),
    Segment(NO_ADAPTER, 70, 134),
    Segment(0, 134, 142),
    Segment(2, 142, 207),
)
LONG_RANKS = ((4, 0, 3), (16, 3, 1), (64, 8, 0))


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are long, and gradients in chunks, at a size that the interpreter can take."""
    monkeypatch.setattr(linear, "OWN_PRODUCT_TOKENS_MIN", 64)
    monkeypatch.setattr(linear, "CHUNK_TOKENS", 32)


@dataclass(frozen=True, slots=True)
class Case:
    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    segments: Segments
    blocks: list[list[LoraPair | None]]


def make_case(
    segments: Segments,
    ranks: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype = torch.float32,
    room: int = 0,
) -> Case:
    """`ranks[slot][block]`, 0 for no adapter there."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens, outputs = segments[-1].end, BOUNDS[-1]
    weight = draw(outputs, INPUTS) / 8
    blocks: list[list[LoraPair | None]] = []
    for start, end in itertools.pairwise(BOUNDS):
        pairs: list[LoraPair | None] = []
        for rank in (of_slot[len(blocks)] for of_slot in ranks):
            if rank == 0:
                pairs.append(None)
                continue
            a, b = draw(rank, INPUTS) / 8, draw(end - start, rank)
            grads = torch.randn(a.shape, generator=generator), torch.zeros(b.shape)
            pairs.append(LoraPair(a, b, 1.5 / rank, *grads))
        blocks.append(pairs)
    return Case(
        draw(tokens, INPUTS),
        draw(tokens, outputs),
        augmented(weight, room) if room else weight,
        draw(outputs),
        segments,
        blocks,
    )


def cloned(case: Case) -> Case:
    """With gradients of its own."""
    return replace(
        case,
        blocks=[
            [
                None
                if pair is None
                else replace(
                    pair,
                    a_grad=None if pair.a_grad is None else pair.a_grad.clone(),
                    b_grad=None if pair.b_grad is None else pair.b_grad.clone(),
                )
                for pair in pairs
            ]
            for pairs in case.blocks
        ],
    )


def compute(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Y and dx; gradients of the adapters are added to the case's."""
    x = case.x.detach().requires_grad_()
    blocks = [
        Block(pairs, start, end)
        for pairs, start, end in zip(case.blocks, BOUNDS, BOUNDS[1:], strict=False)
    ]
    y = lora_linear_blocks(x, case.weight, case.segments, blocks, case.bias)
    y.backward(case.dy)
    assert x.grad is not None
    return y.detach(), x.grad


def compute_in_double(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain formulas, by autograd; gradients of the adapters are added to the case's."""
    x = case.x.double().requires_grad_()
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = []
    columns: list[torch.Tensor] = []
    for pairs, start, end in zip(case.blocks, BOUNDS, BOUNDS[1:], strict=False):
        rows: list[torch.Tensor] = []
        for segment in case.segments:
            part = x[segment.start : segment.end]
            y = part @ case.weight[start:end].double().T
            pair = None if segment.slot == NO_ADAPTER else pairs[segment.slot]
            if pair is not None:
                a, b = pair.a.double().requires_grad_(), pair.b.double().requires_grad_()
                assert pair.a_grad is not None
                assert pair.b_grad is not None
                leaves += [(a, pair.a_grad), (b, pair.b_grad)]
                y = y + pair.scale * (part @ a.T) @ b.T
            rows.append(y)
        columns.append(torch.cat(rows))
    y = torch.cat(columns, dim=1) + case.bias.double()
    y.backward(case.dy.double())
    for leaf, grad in leaves:
        if leaf.grad is not None:
            grad.add_(leaf.grad)
    assert x.grad is not None
    return y.detach(), x.grad


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-9))


def gradients(case: Case) -> list[torch.Tensor]:
    return [
        grad
        for pairs in case.blocks
        for pair in pairs
        if pair is not None
        for grad in (pair.a_grad, pair.b_grad)
        if grad is not None
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("segments", "ranks", "room"),
    [(MIXED, MIXED_RANKS, 0), (LONG, LONG_RANKS, 64), (LONG, LONG_RANKS, 0)],
    ids=["short", "in the room", "without room"],
)
def test_blocks_equal_plain_formulas(
    segments: Segments, ranks: Sequence[Sequence[int]], room: int, dtype: torch.dtype
) -> None:
    """Values and all gradients, added to what was there, are those of float64, and near those of the CPU path."""
    case = make_case(segments, ranks, dtype=dtype, room=room)
    naive, on_cpu = cloned(case), cloned(case)
    with triton_on_cpu():
        y, dx = compute(case)
    tolerance = 2e-6 if dtype is torch.float32 else 1e-2
    expected_y, expected_dx = compute_in_double(naive)
    assert relative_error(y, expected_y) < tolerance
    assert relative_error(dx, expected_dx) < tolerance
    cpu_y, cpu_dx = compute(on_cpu)
    assert relative_error(y, cpu_y) < 2 * tolerance
    assert relative_error(dx, cpu_dx) < 2 * tolerance
    for grad, expected, of_cpu in zip(
        gradients(case), gradients(naive), gradients(on_cpu), strict=True
    ):
        assert relative_error(grad, expected) < tolerance
        assert relative_error(grad, of_cpu) < 2 * tolerance


@pytest.mark.parametrize("room", [0, 64])
def test_a_tenant_has_the_same_bits_alone_and_again(room: int) -> None:
    """Outputs and gradients of every segment are bitwise those of a batch of its own, and of a second run."""
    case = make_case(LONG, LONG_RANKS, room=room)
    again, alone = cloned(case), cloned(case)
    with triton_on_cpu():
        y, dx = compute(case)
        y_again, dx_again = compute(again)
        assert torch.equal(y, y_again)
        assert torch.equal(dx, dx_again)
        for segment in case.segments:
            rows = slice(segment.start, segment.end)
            lone = replace(
                alone,
                x=case.x[rows],
                dy=case.dy[rows],
                segments=(Segment(segment.slot, 0, segment.end - segment.start),),
            )
            y_alone, dx_alone = compute(lone)
            assert torch.equal(y[rows], y_alone)
            assert torch.equal(dx[rows], dx_alone)
    for grad, second, of_lone in zip(
        gradients(case), gradients(again), gradients(alone), strict=True
    ):
        assert torch.equal(grad, second)
        assert torch.equal(grad, of_lone)


def test_long_segments_add_up_their_chunks() -> None:
    """The gradients of a segment of several chunks are right, and added to those of an earlier pass."""
    case = make_case((Segment(0, 0, 100),), ((3, 1, 8),), room=64)
    naive = cloned(case)
    with triton_on_cpu():
        compute(case)
        compute(case)
    compute_in_double(naive)
    compute_in_double(naive)
    for grad, expected in zip(gradients(case), gradients(naive), strict=True):
        assert relative_error(grad, expected) < 2e-6


@pytest.mark.parametrize("tokens", [0, 70])
def test_without_adapters_only_the_frozen_layer_is_left(tokens: int) -> None:
    """Tokens without an adapter, or none at all, go through the weights and launch nothing."""
    case = make_case((Segment(NO_ADAPTER, 0, tokens),), ((0, 0, 0),), room=64)
    launches: list[Launch] = []
    with triton_on_cpu(), recorded(launches.append):
        y, dx = compute(case)
    assert relative_error(y, case.x.double() @ case.weight.double().T + case.bias) < 2e-6
    assert relative_error(dx, case.dy.double() @ case.weight.double()) < 2e-6
    assert launches == []


def test_unwanted_gradients_are_left_out() -> None:
    """Where an adapter wants no gradient of A or of B, the others still get theirs."""
    case = make_case(MIXED, MIXED_RANKS)
    q, k, v = case.blocks
    assert q[0] is not None
    assert q[1] is not None
    q[0] = replace(q[0], a_grad=None)
    q[1] = replace(q[1], b_grad=None)
    naive = make_case(MIXED, MIXED_RANKS)
    with triton_on_cpu():
        compute(case)
    compute_in_double(naive)
    compared = 0
    for pairs, expected_pairs in zip((q, k, v), naive.blocks, strict=True):
        for pair, expected in zip(pairs, expected_pairs, strict=True):
            if pair is None or expected is None:
                continue
            for grad, wanted in ((pair.a_grad, expected.a_grad), (pair.b_grad, expected.b_grad)):
                if grad is None:
                    continue
                assert wanted is not None
                assert relative_error(grad, wanted) < 2e-6
                compared += 1
    assert compared == len(gradients(naive)) - 2


def test_the_room_may_hold_anything_before() -> None:
    """What others left behind the weights is in nobody's result, and the weights stay as they are."""
    case = make_case(LONG, LONG_RANKS, room=64)
    clean = cloned(case)
    with triton_on_cpu():
        y, dx = compute(clean)
    before = case.weight.clone()
    case.weight.as_strided((BOUNDS[-1], 64), case.weight.stride(), INPUTS).fill_(float("nan"))
    with triton_on_cpu():
        y_dirty, dx_dirty = compute(case)
    assert torch.equal(case.weight, before)
    assert torch.equal(y, y_dirty)
    assert torch.equal(dx, dx_dirty)


def test_stored_weights_are_written_with_room() -> None:
    """A weight in 8 bits gives what its numbers give, and what others wrote in between is no matter."""
    case = make_case(LONG, LONG_RANKS)
    scratch = Scratch()
    stored = QuantizedWeight((quantize_fp8(case.weight),), torch.float32, scratch)
    other = QuantizedWeight((quantize_fp8(torch.randn(200, 300)),), torch.float32, scratch)
    plain = replace(cloned(case), weight=augmented(dense_weight(stored).clone(), 128))
    x = case.x.detach().requires_grad_()
    with triton_on_cpu():
        expected_y, expected_dx = compute(plain)
        y = linear.lora_linear_blocks(x, stored, case.bias, case.segments, case.blocks, BOUNDS)
        dense_weight(other)
        y.backward(case.dy)
    assert x.grad is not None
    assert relative_error(y.detach(), expected_y) < 1e-6
    assert relative_error(x.grad, expected_dx) < 1e-6
    for grad, expected in zip(gradients(case), gradients(plain), strict=True):
        assert relative_error(grad, expected) < 1e-6


def test_only_augmented_weights_have_room() -> None:
    """Other views of a weight are never written behind."""
    weight = torch.randn(8, 128)
    assert room_of(augmented(weight, 192)) == 192
    assert torch.equal(augmented(weight, 64), weight)
    for other in (weight, weight.T, augmented(weight, 64)[2:], weight[:, 64:], weight[:, :60]):
        assert room_of(other) == 0


def test_a_slot_has_one_segment() -> None:
    """Two segments of one slot would write the same gradient twice."""
    case = make_case((Segment(0, 0, 3), Segment(0, 3, 5)), ((4, 4, 4),))
    with triton_on_cpu(), pytest.raises(AssertionError, match="one segment"):
        compute(case)


@pytest.mark.parametrize("room", [0, 64])
def test_passes_are_planned_without_waiting(room: int) -> None:
    """Forward and backward of tensors without storage launch what those with storage launch."""
    case = make_case(LONG, LONG_RANKS, dtype=torch.bfloat16, room=room)
    launches: list[Launch] = []
    with triton_on_cpu(), recorded(launches.append):
        compute(case)
    blocks: list[list[LoraPair | None]] = [
        [
            None
            if pair is None
            else LoraPair(
                pair.a.to("meta"),
                pair.b.to("meta"),
                pair.scale,
                None if pair.a_grad is None else pair.a_grad.to("meta"),
                None if pair.b_grad is None else pair.b_grad.to("meta"),
            )
            for pair in pairs
        ]
        for pairs in case.blocks
    ]
    weight = torch.empty(BOUNDS[-1], INPUTS, device="meta", dtype=torch.bfloat16)
    planned: list[Launch] = []
    with recorded(planned.append):
        compute(
            Case(
                case.x.to("meta"),
                case.dy.to("meta"),
                augmented(weight, room) if room else weight,
                case.bias.to("meta"),
                case.segments,
                blocks,
            )
        )
    assert [(launch.kernel.__name__, launch.grid) for launch in planned] == [
        (launch.kernel.__name__, launch.grid) for launch in launches
    ]
