"""The CPU path against naive float64 loops, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn import functional

from river_kernels import (
    NO_ADAPTER,
    LoraPair,
    Segment,
    Segments,
    frozen,
    lora_linear,
    lora_logprobs,
    make_packing,
    moe_lora,
    packed_causal_attention,
)
from river_kernels.frozen import frozen_product

SEGMENTS: Segments = (
    Segment(0, 0, 7),
    Segment(NO_ADAPTER, 7, 12),
    Segment(2, 12, 12),
    Segment(1, 12, 31),
    Segment(0, 31, 33),
)
RANKS = (4, 1, 3)
TOKENS = 33
TOLERANCE = 2e-6


def relative_error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert actual is not None
    if expected is None:
        return float(actual.detach().abs().max())
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp_min(1e-9))


def make_pairs(
    generator: torch.Generator,
    *,
    inputs: int,
    outputs: int,
    experts: int | None = None,
    shared: str = "",
    ranks: Sequence[int] = RANKS,
) -> list[LoraPair | None]:
    """One pair of each rank; the slots that `shared` names by factor, as "a02", store it once for all experts."""
    lead = () if experts is None else (experts,)
    pairs: list[LoraPair | None] = []
    for slot, rank in enumerate(ranks):
        is_shared = {factor: shared[:1] == factor and str(slot) in shared for factor in "ab"}
        of_a, of_b = ((1,) if is_shared[factor] else lead for factor in "ab")
        a = torch.randn(*of_a, rank, inputs, generator=generator)
        b = torch.randn(*of_b, outputs, rank, generator=generator)
        grads = torch.zeros_like(a), torch.zeros_like(b)
        pairs.append(LoraPair(a, b, 2.0 / rank, *grads, is_shared["a"], is_shared["b"]))
    return pairs


def in_double(pairs: list[LoraPair | None]) -> list[LoraPair | None]:
    return [
        None
        if pair is None
        else LoraPair(
            pair.a.double().requires_grad_(),
            pair.b.double().requires_grad_(),
            pair.scale,
            shares_a=pair.shares_a,
            shares_b=pair.shares_b,
        )
        for pair in pairs
    ]


def check_gradients(pairs: list[LoraPair | None], naive: list[LoraPair | None]) -> None:
    for pair, expected in zip(pairs, naive, strict=True):
        if pair is None or expected is None:
            continue
        for grad, reference in ((pair.a_grad, expected.a), (pair.b_grad, expected.b)):
            assert grad is not None
            if reference.grad is None:
                assert not grad.any()
            else:
                assert relative_error(grad, reference.grad) < TOLERANCE


def naive_linear(
    x: torch.Tensor, weight: torch.Tensor, segments: Segments, pairs: list[LoraPair | None]
) -> torch.Tensor:
    rows = [x[:0] @ weight.T]
    for segment in segments:
        for token in range(segment.start, segment.end):
            row = x[token] @ weight.T
            pair = None if segment.slot < 0 else pairs[segment.slot]
            if pair is not None:
                row = row + pair.scale * (pair.b @ (pair.a @ x[token]))
            rows.append(row[None])
    return torch.cat(rows)


def naive_moe(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    segments: Segments,
    gate_up_pairs: list[LoraPair | None],
    down_pairs: list[LoraPair | None],
) -> torch.Tensor:
    def expert_linear(
        row: torch.Tensor, weight: torch.Tensor, pair: LoraPair | None, expert: int
    ) -> torch.Tensor:
        out = weight[expert] @ row
        if pair is not None:
            a, b = pair.a[0 if pair.shares_a else expert], pair.b[0 if pair.shares_b else expert]
            out = out + pair.scale * (b @ (a @ row))
        return out

    rows: list[torch.Tensor] = []
    for segment in segments:
        first = None if segment.slot < 0 else gate_up_pairs[segment.slot]
        second = None if segment.slot < 0 else down_pairs[segment.slot]
        for token in range(segment.start, segment.end):
            total = torch.zeros_like(x[token])
            for k in range(chosen.shape[1]):
                expert = int(chosen[token, k])
                gate, up = expert_linear(x[token], gate_up, first, expert).chunk(2)
                out = expert_linear(functional.silu(gate) * up, down, second, expert)
                total = total + weights[token, k] * out
            rows.append(total)
    return torch.stack(rows)


@pytest.fixture
def no_verified_weights(monkeypatch: pytest.MonkeyPatch) -> set[object]:
    """What is known of weights: nothing yet."""
    verified: set[object] = set()
    monkeypatch.setattr(frozen, "_verified", verified)
    return verified


@pytest.mark.parametrize("verified", [False, True], ids=["by parts", "together"])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 37, 100, 129])
def test_frozen_products_are_right_wherever_the_rows_lie(
    no_verified_weights: set[object], rows: int, *, verified: bool
) -> None:
    """Slices of larger matrices, last rows, transposed weights and every number of rows give the same as a product."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(24, 40, generator=generator)
    if verified:
        assert frozen.verify_rows([weight, weight.T.contiguous()])
    around = torch.randn(rows + 50, 40, generator=generator)
    around[20 + rows :] = torch.nan  # What lies behind must not matter.
    sizes = [rows // 3, 0, rows - rows // 3]
    for x in (around[20 : 20 + rows], around[:rows].clone(), around[20 : 20 + rows].T.clone().T):
        expected = x.double() @ weight.double().T
        for stored in (weight, weight.T.contiguous().T):
            assert relative_error(frozen_product(x, stored, sizes), expected) < TOLERANCE
    inside = around[20 : 20 + rows]
    again = frozen_product(inside.clone(), weight, sizes)
    assert torch.equal(frozen_product(inside, weight, sizes), again)


def test_more_rows_than_were_verified_are_right(no_verified_weights: set[object]) -> None:
    """They are computed block by block, with the same bits as by themselves."""
    weight = torch.randn(8, 16)
    x = torch.randn(2 * frozen.ROWS_MAX + 5, 16)
    assert frozen.verify_rows([weight])
    together = frozen_product(x, weight, [len(x)])
    assert relative_error(together, x.double() @ weight.double().T) < TOLERANCE
    assert torch.equal(together[-9:], frozen_product(x[-9:], weight, [9]))


def test_rows_that_depend_on_others_stay_by_themselves(
    no_verified_weights: set[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a library lets a row feel its company, every part is a product of its own."""
    weight, x = torch.randn(8, 16), torch.randn(40, 16)
    real = frozen._linear
    assert real is not None
    calls: list[int] = []

    def sensitive(rows: torch.Tensor, *others: object) -> torch.Tensor:
        calls.append(len(rows))
        return real(rows, *others) * (1 + 1e-6 * len(rows))

    monkeypatch.setattr(frozen, "_linear", sensitive)
    assert not frozen.verify_rows([weight])
    calls.clear()
    mixed = frozen_product(x, weight, [16, 24])
    assert calls == [16, 24]
    assert torch.equal(mixed[16:], frozen_product(x[16:].clone(), weight, [24]))


def test_linear_equals_a_loop_over_tokens() -> None:
    """Values and gradients of a mixed batch are those of the per-token formula."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, 24, generator=generator).requires_grad_()
    weight = torch.randn(20, 24, generator=generator)
    pairs = make_pairs(generator, inputs=24, outputs=20)
    upstream = torch.randn(TOKENS, 20, generator=generator)
    y = lora_linear(x, weight, SEGMENTS, pairs)
    y.backward(upstream)

    x64, pairs64 = x.detach().double().requires_grad_(), in_double(pairs)
    expected = naive_linear(x64, weight.double(), SEGMENTS, pairs64)
    expected.backward(upstream.double())
    assert relative_error(y, expected) < TOLERANCE
    assert relative_error(x.grad, x64.grad) < TOLERANCE
    check_gradients(pairs, pairs64)


@pytest.mark.parametrize("slots", ["", "012", "02"], ids=["per expert", "shared", "both"])
@pytest.mark.parametrize("ranks", [RANKS, (16, 8, 4)], ids=str)
@pytest.mark.parametrize("experts", [6, 60], ids=["few experts", "many experts"])
def test_moe_equals_a_loop_over_tokens(slots: str, ranks: tuple[int, ...], experts: int) -> None:
    """Values and gradients of a mixed batch are those of the formula, in either layout, with experts nobody chose."""
    generator = torch.Generator().manual_seed(2)
    hidden, inner, top = 16, 12, 2
    x = torch.randn(TOKENS, hidden, generator=generator).requires_grad_()
    chosen = torch.rand(TOKENS, experts - 1, generator=generator).topk(top).indices
    weights = torch.rand(TOKENS, top, generator=generator).requires_grad_()
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator)
    down = torch.randn(experts, hidden, inner, generator=generator)
    first = make_pairs(
        generator,
        inputs=hidden,
        outputs=2 * inner,
        experts=experts,
        shared=f"a{slots}",
        ranks=ranks,
    )
    second = make_pairs(
        generator,
        inputs=inner,
        outputs=hidden,
        experts=experts,
        shared=f"b{slots}",
        ranks=ranks,
    )
    second[1] = None
    upstream = torch.randn(TOKENS, hidden, generator=generator)
    y = moe_lora(x, chosen, weights, gate_up, down, SEGMENTS, first, second)
    y.backward(upstream)

    x64, weights64 = (tensor.detach().double().requires_grad_() for tensor in (x, weights))
    first64, second64 = in_double(first), in_double(second)
    expected = naive_moe(
        x64, chosen, weights64, gate_up.double(), down.double(), SEGMENTS, first64, second64
    )
    expected.backward(upstream.double())
    assert relative_error(y, expected) < TOLERANCE
    assert relative_error(x.grad, x64.grad) < TOLERANCE
    assert relative_error(weights.grad, weights64.grad) < TOLERANCE
    check_gradients(first, first64)
    check_gradients(second, second64)


@pytest.mark.parametrize("chunk_tokens", [5, 1024])
def test_logprobs_equal_log_softmax(chunk_tokens: int) -> None:
    """Chunked log-probabilities, entropy and gradients are those of a full log-softmax."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, 24, generator=generator).requires_grad_()
    weight = torch.randn(50, 24, generator=generator)
    targets = torch.randint(50, (TOKENS,), generator=generator)
    pairs = make_pairs(generator, inputs=24, outputs=50)
    upstream = torch.randn(TOKENS, generator=generator)
    logprobs, entropy = lora_logprobs(
        hidden, weight, targets, SEGMENTS, pairs, chunk_tokens=chunk_tokens
    )
    logprobs.backward(upstream)

    hidden64, pairs64 = hidden.detach().double().requires_grad_(), in_double(pairs)
    full = naive_linear(hidden64, weight.double(), SEGMENTS, pairs64).log_softmax(1)
    expected = full.gather(1, targets[:, None])[:, 0]
    expected.backward(upstream.double())
    assert relative_error(logprobs, expected) < TOLERANCE
    assert relative_error(entropy, -(full.exp() * full).sum(1)) < TOLERANCE
    assert relative_error(hidden.grad, hidden64.grad) < TOLERANCE
    check_gradients(pairs, pairs64)


def grads_of(pairs: list[LoraPair | None]) -> list[torch.Tensor]:
    grads = [grad for pair in pairs if pair is not None for grad in (pair.a_grad, pair.b_grad)]
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("chunk_tokens", [5, 1024], ids=["recomputed", "kept"])
def test_soft_targets_equal_log_softmax(chunk_tokens: int) -> None:
    """K targets at a position, the same one twice among them, give [T, K] and the gradients of a full log-softmax."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(TOKENS, 24, generator=generator).requires_grad_()
    weight = torch.randn(50, 24, generator=generator)
    targets = torch.randint(50, (TOKENS, 3), generator=generator)
    targets[::4, 2] = targets[::4, 0]
    pairs = make_pairs(generator, inputs=24, outputs=50)
    upstream = torch.randn(TOKENS, 3, generator=generator)
    logprobs, entropy = lora_logprobs(
        hidden, weight, targets, SEGMENTS, pairs, chunk_tokens=chunk_tokens
    )
    logprobs.backward(upstream)

    hidden64, pairs64 = hidden.detach().double().requires_grad_(), in_double(pairs)
    full = naive_linear(hidden64, weight.double(), SEGMENTS, pairs64).log_softmax(1)
    expected = full.gather(1, targets)
    expected.backward(upstream.double())
    assert logprobs.shape == (TOKENS, 3)
    assert relative_error(logprobs, expected) < TOLERANCE
    assert relative_error(entropy, -(full.exp() * full).sum(1)) < TOLERANCE
    assert relative_error(hidden.grad, hidden64.grad) < TOLERANCE
    check_gradients(pairs, pairs64)


def test_logprobs_have_the_same_bits_however_they_are_computed() -> None:
    """Neither other targets without a gradient nor keeping the softmax for backward changes a bit."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(TOKENS, 24, generator=generator)
    weight = torch.randn(50, 24, generator=generator)
    targets = torch.randint(50, (TOKENS, 2), generator=generator)
    upstream = torch.randn(TOKENS, 2, generator=generator)
    padded = [torch.cat([values, values.new_zeros(TOKENS, 5)], 1) for values in (targets, upstream)]
    pairs = make_pairs(generator, inputs=24, outputs=50)

    def computed(
        targets_TK: torch.Tensor,  # noqa: N803  # the shape, in capitals
        upstream_TK: torch.Tensor,  # noqa: N803
        chunk_tokens: int,
    ) -> list[torch.Tensor]:
        hidden = start.clone().requires_grad_()
        for grad in grads_of(pairs):
            grad.zero_()
        logprobs, entropy = lora_logprobs(
            hidden, weight, targets_TK, SEGMENTS, pairs, chunk_tokens=chunk_tokens
        )
        logprobs.backward(upstream_TK)
        assert hidden.grad is not None
        grads = [grad.clone() for grad in grads_of(pairs)]
        return [logprobs[:, :2].detach(), entropy, hidden.grad, *grads]

    plain = computed(targets, upstream, chunk_tokens=TOKENS)
    widest = max(segment.end - segment.start for segment in SEGMENTS)
    wider = computed(padded[0], padded[1], TOKENS)
    for other in (wider, computed(targets, upstream, widest)):
        for one, same in zip(plain, other, strict=True):
            assert torch.equal(one, same)


def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    """A pair without buffers takes part in forward and backward all the same."""
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(4, 24, generator=generator).requires_grad_()
    weight = torch.randn(50, 24, generator=generator)
    a, b = torch.randn(2, 24, generator=generator), torch.randn(50, 2, generator=generator)
    segments = (Segment(0, 0, 4),)
    targets = torch.tensor([1, 2, 3, 4])
    found: list[torch.Tensor] = []
    for pair in (
        LoraPair(a, b, 0.5),
        LoraPair(a, b, 0.5, torch.zeros_like(a), torch.zeros_like(b)),
    ):
        hidden.grad = None
        logprobs, _ = lora_logprobs(hidden, weight, targets, segments, [pair])
        logprobs.sum().backward()
        assert hidden.grad is not None
        found.append(hidden.grad)
    assert torch.equal(*found)
    assert found[0].any()


def test_packed_attention_equals_each_sequence_alone() -> None:
    """No sequence sees another, whatever lengths are packed together; gradients too."""
    generator = torch.Generator().manual_seed(4)
    lengths = (5, 1, 40, 17, 16, 3)
    tokens = sum(lengths)
    query = torch.randn(tokens, 4, 8, generator=generator).requires_grad_()
    key = torch.randn(tokens, 2, 8, generator=generator).requires_grad_()
    value = torch.randn(tokens, 2, 8, generator=generator).requires_grad_()
    upstream = torch.randn(tokens, 4, 8, generator=generator)
    out = packed_causal_attention(query, key, value, make_packing(lengths), scale=0.3)
    out.backward(upstream)

    copies = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    start, rows = 0, []
    for length in lengths:
        q, k, v = (tensor[start : start + length].transpose(0, 1) for tensor in copies)
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        scores = (q @ k.transpose(1, 2)) * 0.3
        mask = torch.ones(length, length).triu(1).bool()
        rows.append((scores.masked_fill(mask, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        start += length
    expected = torch.cat(rows)
    expected.backward(upstream.double())
    assert relative_error(out, expected) < TOLERANCE
    for tensor, copy in zip((query, key, value), copies, strict=True):
        assert relative_error(tensor.grad, copy.grad) < TOLERANCE


@pytest.mark.parametrize("verified", [False, True], ids=["by parts", "together"])
@pytest.mark.parametrize("ranks", [RANKS, (16, 16, 16), (16, 4, 32)], ids=str)
@pytest.mark.parametrize("slots", ["", "012"], ids=["per expert", "shared"])
def test_an_adapter_gets_the_same_alone_and_in_company(
    no_verified_weights: set[object], slots: str, ranks: tuple[int, ...], *, verified: bool
) -> None:
    """What one adapter computes does not change with the others in the batch, not even in the last bit."""
    generator = torch.Generator().manual_seed(5)
    hidden, inner, experts = 64, 32, 4
    x = torch.randn(TOKENS, hidden, generator=generator)
    chosen = torch.rand(TOKENS, experts, generator=generator).topk(2).indices
    weights = torch.rand(TOKENS, 2, generator=generator)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator) / 8
    down = torch.randn(experts, hidden, inner, generator=generator) / 8
    assert not verified or frozen.verify_rows([gate_up[0], down[0]])
    first, second = (
        make_pairs(
            generator,
            inputs=inputs,
            outputs=outputs,
            experts=experts,
            shared=factor + slots,
            ranks=ranks,
        )
        for inputs, outputs, factor in ((hidden, 2 * inner, "a"), (inner, hidden, "b"))
    )

    def gradients(rows: slice, segments: Segments) -> list[torch.Tensor]:
        for grad in grads_of([*first, *second]):
            grad.zero_()
        inputs = x[rows].clone().requires_grad_()
        routed = weights[rows].clone().requires_grad_()
        out = moe_lora(inputs, chosen[rows], routed, gate_up, down, segments, first, second)
        out.square().sum().backward()
        here = slice(segments[-2].start, segments[-2].end) if len(segments) > 1 else slice(None)
        assert inputs.grad is not None
        assert routed.grad is not None
        own = [grad.clone() for grad in grads_of([first[1], second[1]])]
        return [out[here].detach(), inputs.grad[here], routed.grad[here], *own]

    mixed = gradients(slice(0, TOKENS), SEGMENTS)
    alone = gradients(slice(12, 31), (Segment(1, 0, 19),))
    for together, by_itself, again in zip(
        mixed, alone, gradients(slice(0, TOKENS), SEGMENTS), strict=True
    ):
        assert together.any()
        assert torch.equal(together, by_itself)
        assert torch.equal(together, again)


@pytest.mark.parametrize(
    "segments",
    [(Segment(0, 0, 3),), (Segment(0, 1, 4),), (Segment(1, 0, 4),)],
    ids=["too few", "gap", "unknown slot"],
)
def test_wrong_segments_are_refused(segments: Segments) -> None:
    """Segments that do not cover the tokens or name no adapter are a bug of the caller."""
    call: Callable[[], torch.Tensor] = lambda: lora_linear(  # noqa: E731  # one line for raises
        torch.zeros(4, 2), torch.zeros(3, 2), segments, [None]
    )
    with pytest.raises(AssertionError):
        call()
