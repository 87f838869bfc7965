"""The lm_head's Triton path against a full log-softmax in float64, and what it promises of bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from river_kernels import NO_ADAPTER, LoraPair, Segment, Segments, lora_logprobs
from river_kernels.device import triton_on_cpu
from river_kernels.gpu import lce
from river_kernels.gpu.augmented import augmented
from river_kernels.gpu.launch import Launch, recorded

SEGMENTS: Segments = (
    Segment(0, 0, 7),
    Segment(NO_ADAPTER, 7, 12),
    Segment(2, 12, 12),
    Segment(1, 12, 31),
    Segment(3, 31, 33),
    Segment(4, 33, 34),
)
RANKS = (4, 1, 3, 80, 0)
TOKENS, INPUTS, VOCABULARY = 34, 24, 150


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary is several blocks, the last one not full."""
    monkeypatch.setattr(lce, "BLOCK", 64)


@dataclass(frozen=True, slots=True)
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor
    pairs: list[LoraPair | None]
    segments: Segments = SEGMENTS


def make_case(*, dtype: torch.dtype = torch.float32, targets: int = 3, room: int = 0) -> Case:
    """Every fourth token has the same target twice."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    pairs: list[LoraPair | None] = []
    for rank in RANKS:
        if rank == 0:
            pairs.append(None)
            continue
        a, b = draw(rank, INPUTS), draw(VOCABULARY, rank)
        grads = torch.randn(a.shape, generator=generator), torch.zeros(b.shape)
        pairs.append(LoraPair(a, b, 0.3 / rank, *grads))
    chosen = torch.randint(VOCABULARY, (TOKENS, targets), generator=generator)
    chosen[::4, -1] = chosen[::4, 0]
    weight = draw(VOCABULARY, INPUTS)
    return Case(
        draw(TOKENS, INPUTS),
        augmented(weight, room) if room else weight,
        chosen,
        torch.randn(TOKENS, targets, generator=generator),
        pairs,
    )


def cloned(case: Case) -> Case:
    """With gradients of its own."""
    pairs = [
        None
        if pair is None
        else replace(
            pair,
            a_grad=None if pair.a_grad is None else pair.a_grad.clone(),
            b_grad=None if pair.b_grad is None else pair.b_grad.clone(),
        )
        for pair in case.pairs
    ]
    return replace(case, pairs=pairs)


def gradients(case: Case) -> list[torch.Tensor]:
    grads = [grad for pair in case.pairs if pair for grad in (pair.a_grad, pair.b_grad)]
    return [grad for grad in grads if grad is not None]


def compute(case: Case, chunk_tokens: int = 1024) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropy and the gradient of the hidden states; those of the adapters are added."""
    hidden = case.hidden.detach().requires_grad_()
    logprobs, entropy = lora_logprobs(
        hidden, case.weight, case.targets, case.segments, case.pairs, chunk_tokens=chunk_tokens
    )
    logprobs.backward(case.upstream.to(logprobs.dtype))
    assert hidden.grad is not None
    assert not entropy.requires_grad
    return logprobs.detach(), entropy, hidden.grad


def compute_in_double(case: Case) -> tuple[torch.Tensor, ...]:
    """The plain formulas, by autograd."""
    hidden = case.hidden.double().requires_grad_()
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = []
    rows: list[torch.Tensor] = []
    for segment in case.segments:
        part = hidden[segment.start : segment.end]
        logits = part @ case.weight.double().T
        pair = None if segment.slot == NO_ADAPTER else case.pairs[segment.slot]
        if pair is not None:
            a, b = pair.a.double().requires_grad_(), pair.b.double().requires_grad_()
            assert pair.a_grad is not None
            assert pair.b_grad is not None
            leaves += [(a, pair.a_grad), (b, pair.b_grad)]
            logits = logits + pair.scale * (part @ a.T) @ b.T
        rows.append(logits)
    full = torch.cat(rows).log_softmax(1)
    logprobs = full.gather(1, case.targets)
    logprobs.backward(case.upstream.double())
    for leaf, grad in leaves:
        if leaf.grad is not None:
            grad.add_(leaf.grad)
    assert hidden.grad is not None
    return logprobs.detach(), -(full.exp() * full).sum(1).detach(), hidden.grad


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-9))


@pytest.mark.parametrize(
    ("dtype", "room", "chunk_tokens"),
    [
        (torch.float32, 0, 5),
        (torch.float32, 64, 1024),
        (torch.float32, 128, 5),
        (torch.bfloat16, 0, 1024),
        (torch.bfloat16, 64, 5),
    ],
)
def test_logprobs_equal_log_softmax(dtype: torch.dtype, room: int, chunk_tokens: int) -> None:
    """Values and gradients, added to what was there, are those of float64, and near those of the CPU path."""
    case = make_case(dtype=dtype, room=room)
    naive, on_cpu = cloned(case), cloned(case)
    with triton_on_cpu():
        results = compute(case, chunk_tokens)
    assert results[0].dtype is results[1].dtype is torch.float32
    tolerance = 3e-6 if dtype is torch.float32 else 1.5e-2
    for result, expected in zip(results, compute_in_double(naive), strict=True):
        assert relative_error(result, expected) < tolerance
    for grad, expected in zip(gradients(case), gradients(naive), strict=True):
        assert relative_error(grad, expected) < tolerance
    if dtype is torch.float32:
        for result, expected in zip(results, compute(on_cpu, chunk_tokens), strict=True):
            assert relative_error(result, expected) < tolerance
        for grad, expected in zip(gradients(case), gradients(on_cpu), strict=True):
            assert relative_error(grad, expected) < tolerance


def test_one_target_a_token_keeps_its_shape() -> None:
    """Targets [T] give log-probabilities [T], the same as those of [T, 1]."""
    case = make_case(targets=1)
    flat = replace(cloned(case), targets=case.targets[:, 0], upstream=case.upstream[:, 0])
    with triton_on_cpu():
        logprobs, entropy, dhidden = compute(case)
        flat_logprobs, flat_entropy, flat_dhidden = compute(flat)
    assert flat_logprobs.shape == (TOKENS,)
    assert torch.equal(flat_logprobs, logprobs[:, 0])
    assert torch.equal(flat_entropy, entropy)
    assert torch.equal(flat_dhidden, dhidden)


@pytest.mark.parametrize("room", [0, 64])
def test_a_tenant_has_the_same_bits_alone_and_again(room: int) -> None:
    """Every segment's results and gradients are bitwise those of a batch of its own, and of a second run."""
    case = make_case(room=room)
    again, alone = cloned(case), cloned(case)
    with triton_on_cpu():
        results = compute(case, 8)
        for one, same in zip(results, compute(again, 8), strict=True):
            assert torch.equal(one, same)
        for segment in case.segments:
            rows = slice(segment.start, segment.end)
            lone = replace(
                alone,
                hidden=case.hidden[rows],
                targets=case.targets[rows],
                upstream=case.upstream[rows],
                segments=(Segment(segment.slot, 0, segment.end - segment.start),),
            )
            for one, same in zip(results, compute(lone, 8), strict=True):
                assert torch.equal(one[rows], same)
    for grad, second, of_lone in zip(
        gradients(case), gradients(again), gradients(alone), strict=True
    ):
        assert torch.equal(grad, second)
        assert torch.equal(grad, of_lone)


def test_targets_without_a_gradient_change_no_bit() -> None:
    """Further targets behind the others, one of them the same, change nothing if their gradient is zero."""
    case = make_case()
    wider = replace(
        cloned(case),
        targets=torch.cat([case.targets, case.targets[:, :1], case.targets * 0, case.targets], 1),
        upstream=torch.cat([case.upstream, torch.zeros(TOKENS, 7)], 1),
    )
    with triton_on_cpu():
        logprobs, *others = compute(case)
        wide_logprobs, *wide_others = compute(wider)
    assert torch.equal(logprobs, wide_logprobs[:, :3])
    for one, same in zip(others + gradients(case), wide_others + gradients(wider), strict=True):
        assert torch.equal(one, same)


def test_large_logits_lose_nothing() -> None:
    """Logits of hundreds give log-probabilities and an entropy without overflow or cancellation."""
    logits = torch.tensor([[500.0, 499.0, -500.0] + [-400.0] * 67, [-300.0] * 70])
    targets = torch.tensor([[1], [3]])
    normaliser, entropy, logprobs = torch.empty(2), torch.empty(2), torch.empty(2, 1)
    with triton_on_cpu():
        lce.log_probabilities(logits, targets, normaliser, logprobs, entropy)
    full = logits.double().log_softmax(1)
    expected = -torch.where(full > -100, full.exp() * full, 0.0).sum(1)
    torch.testing.assert_close(logprobs.double(), full.gather(1, targets), rtol=0, atol=4e-5)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-6, atol=0)


def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    """A pair without buffers takes part all the same, and the others get their gradients."""
    case = make_case(room=64)
    wanted = cloned(case)
    first = case.pairs[0]
    assert first is not None
    case.pairs[0] = replace(first, a_grad=None, b_grad=None)
    with triton_on_cpu():
        results, expected = compute(case), compute(wanted)
    for one, same in zip(results, expected, strict=True):
        assert torch.equal(one, same)
    for grad, same in zip(gradients(case), gradients(wanted)[2:], strict=True):
        assert torch.equal(grad, same)


@pytest.mark.parametrize("room", [0, 64])
def test_passes_are_planned_without_waiting(room: int) -> None:
    """Forward and backward of tensors without storage launch what those with storage launch."""
    case = make_case(dtype=torch.bfloat16, room=room)
    launches: list[Launch] = []
    with triton_on_cpu(), recorded(launches.append):
        compute(case)
    pairs = [
        None
        if pair is None
        else replace(
            pair,
            a=pair.a.to("meta"),
            b=pair.b.to("meta"),
            a_grad=None if pair.a_grad is None else pair.a_grad.to("meta"),
            b_grad=None if pair.b_grad is None else pair.b_grad.to("meta"),
        )
        for pair in case.pairs
    ]
    weight = torch.empty(VOCABULARY, INPUTS, device="meta", dtype=torch.bfloat16)
    planned: list[Launch] = []
    with recorded(planned.append):
        compute(
            Case(
                case.hidden.to("meta"),
                augmented(weight, room) if room else weight,
                case.targets.to("meta"),
                case.upstream.to("meta"),
                pairs,
            )
        )
    assert [(launch.kernel.__name__, launch.grid) for launch in planned] == [
        (launch.kernel.__name__, launch.grid) for launch in launches
    ]
