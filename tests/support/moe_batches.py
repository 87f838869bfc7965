"""Mixed batches for a mixture of experts with adapters, and the formula of what it computes, in float64."""

# Tensors carry their shape in capitals.
# ruff: noqa: N815

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from river_kernels import NO_ADAPTER, LoraPair, Segment, Segments, moe_lora

HIDDEN, INNER = 48, 40
"""No powers of two, so that blocks are not full; multiples of eight, as the library's products ask for."""


@dataclass(frozen=True)
class Batch:
    """Everything `moe_lora` takes, and the gradient of its result; pairs have gradients of zeros."""

    x_TH: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    segments: Segments
    gate_up_pairs: tuple[LoraPair | None, ...]
    down_pairs: tuple[LoraPair | None, ...]
    dout_TH: torch.Tensor

    @property
    def pairs(self) -> Iterator[LoraPair]:
        """Every adapter's pairs, those of gate and up before those of down."""
        return (pair for pair in (*self.gate_up_pairs, *self.down_pairs) if pair is not None)

    def cloned(self) -> Batch:
        """The same with gradients of its own, all zeros."""
        return replace(
            self,
            gate_up_pairs=tuple(map(_without_gradients, self.gate_up_pairs)),
            down_pairs=tuple(map(_without_gradients, self.down_pairs)),
        )

    def to(self, device: str) -> Batch:
        """The same elsewhere."""

        def moved(pair: LoraPair | None) -> LoraPair | None:
            if pair is None:
                return None
            a_grad, b_grad = (
                None if grad is None else grad.to(device) for grad in (pair.a_grad, pair.b_grad)
            )
            return replace(
                pair, a=pair.a.to(device), b=pair.b.to(device), a_grad=a_grad, b_grad=b_grad
            )

        return Batch(
            self.x_TH.to(device),
            self.experts_TK.to(device),
            self.weights_TK.to(device),
            self.gate_up.to(device),
            self.down.to(device),
            self.segments,
            tuple(map(moved, self.gate_up_pairs)),
            tuple(map(moved, self.down_pairs)),
            self.dout_TH.to(device),
        )

    def only(self, slot: int) -> Batch:
        """The tokens of one slot, and no other adapter; gradients of its own, all zeros."""
        (segment,) = (segment for segment in self.segments if segment.slot == slot)
        tokens = slice(segment.start, segment.end)
        alone = self.cloned()
        return replace(
            alone,
            x_TH=self.x_TH[tokens],
            experts_TK=self.experts_TK[tokens],
            weights_TK=self.weights_TK[tokens],
            dout_TH=self.dout_TH[tokens],
            segments=(Segment(0, 0, segment.end - segment.start),),
            gate_up_pairs=(alone.gate_up_pairs[slot],),
            down_pairs=(alone.down_pairs[slot],),
        )


def _without_gradients(pair: LoraPair | None) -> LoraPair | None:
    if pair is None:
        return None
    a_grad, b_grad = (
        None if grad is None else torch.zeros_like(grad) for grad in (pair.a_grad, pair.b_grad)
    )
    return replace(pair, a_grad=a_grad, b_grad=b_grad)


def make_batch(
    ranks: Sequence[int],
    tokens: Sequence[tuple[int, int]],
    *,
    shared: bool,
    dtype: torch.dtype = torch.float32,
    experts: int = 5,
    chosen: int = 2,
    used_experts: int | None = None,
    seed: int = 0,
) -> Batch:
    """Slots of `ranks` and segments of (slot, tokens); the last expert is chosen by nobody unless it has to be."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def pair(rank: int, width: int, outputs: int, *, shares_a: bool, shares_b: bool) -> LoraPair:
        a = random(1 if shares_a else experts, rank, width, scale=width**-0.5)
        b = random(1 if shares_b else experts, outputs, rank, scale=rank**-0.5)
        grads = (torch.zeros(tensor.shape) for tensor in (a, b))
        return LoraPair(a, b, 2.0 / rank**0.5, *grads, shares_a=shares_a, shares_b=shares_b)

    segments: list[Segment] = []
    total = 0
    for slot, count in tokens:
        segments.append(Segment(slot, total, total + count))
        total += count
    among = max(chosen, experts - 1 if used_experts is None else used_experts)
    choice = torch.rand(total, among, generator=generator).topk(chosen).indices
    return Batch(
        random(total, HIDDEN),
        choice,
        torch.rand(total, chosen, generator=generator).to(dtype),
        random(experts, 2 * INNER, HIDDEN, scale=HIDDEN**-0.5),
        random(experts, HIDDEN, INNER, scale=INNER**-0.5),
        tuple(segments),
        tuple(pair(rank, HIDDEN, 2 * INNER, shares_a=shared, shares_b=False) for rank in ranks),
        tuple(pair(rank, INNER, HIDDEN, shares_a=False, shares_b=shared) for rank in ranks),
        random(total, HIDDEN),
    )


@dataclass(frozen=True)
class Results:
    """The output and all gradients: of x and of the router's weights; of A and B as the pairs of a batch have them."""

    out_TH: torch.Tensor
    dx_TH: torch.Tensor
    dweights_TK: torch.Tensor
    factors: tuple[torch.Tensor | None, ...]


def formula(batch: Batch) -> Results:
    """What `moe_lora` should give, token by token, by autograd in float64."""
    x, weights = (leaf(tensor) for tensor in (batch.x_TH, batch.weights_TK))
    first, second = (
        [None if pair is None else replace(pair, a=leaf(pair.a), b=leaf(pair.b)) for pair in pairs]
        for pairs in (batch.gate_up_pairs, batch.down_pairs)
    )
    gate_up, down = batch.gate_up.double(), batch.down.double()
    rows: list[torch.Tensor] = []
    for segment in batch.segments:
        of_gate_up = None if segment.slot == NO_ADAPTER else first[segment.slot]
        of_down = None if segment.slot == NO_ADAPTER else second[segment.slot]
        for token in range(segment.start, segment.end):
            row = torch.zeros_like(x[token])
            for weight, expert in zip(weights[token], batch.experts_TK[token], strict=True):
                z = _linear(x[token], gate_up, of_gate_up, int(expert))
                gate, up = z.chunk(2)
                y = _linear(functional.silu(gate) * up, down, of_down, int(expert))
                row = row + weight * y
            rows.append(row)
    out = torch.stack(rows)
    out.backward(batch.dout_TH.double())
    grads = [
        factor.grad for pair in (*first, *second) if pair is not None for factor in (pair.a, pair.b)
    ]
    assert x.grad is not None
    assert weights.grad is not None
    return Results(out.detach(), x.grad, weights.grad, tuple(grads))


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64 that gets a gradient."""
    return tensor.detach().double().requires_grad_()


def _linear(
    row: torch.Tensor, weight: torch.Tensor, pair: LoraPair | None, expert: int
) -> torch.Tensor:
    out = weight[expert] @ row
    if pair is None:
        return out
    a, b = pair.a[0 if pair.shares_a else expert], pair.b[0 if pair.shares_b else expert]
    return out + pair.scale * (b @ (a @ row))


def run(batch: Batch) -> Results:
    """Forward and backward of `moe_lora`; its factors are the gradients of the batch's own pairs, which it adds to."""
    x, weights = (tensor.clone().requires_grad_() for tensor in (batch.x_TH, batch.weights_TK))
    out = moe_lora(
        x, batch.experts_TK, weights, batch.gate_up, batch.down, batch.segments,
        batch.gate_up_pairs, batch.down_pairs,
    )  # fmt: skip
    out.backward(batch.dout_TH)
    assert x.grad is not None
    assert weights.grad is not None
    factors = [grad for pair in batch.pairs for grad in (pair.a_grad, pair.b_grad)]
    return Results(out.detach(), x.grad, weights.grad, tuple(factors))


def check_close(actual: Results, expected: Results, tolerance: float) -> None:
    """Asserts that no relative error reaches `tolerance`; a gradient that nobody wants may be missing."""
    for name in ("out_TH", "dx_TH", "dweights_TK"):
        error = relative_error(getattr(actual, name), getattr(expected, name))
        assert error < tolerance, f"{name}: {error}"
    for index, (grad, reference) in enumerate(zip(actual.factors, expected.factors, strict=True)):
        if grad is None:
            continue
        if reference is None:
            assert not grad.any(), f"factor {index} has a gradient"
            continue
        error = relative_error(grad, reference)
        assert error < tolerance, f"factor {index}: {error}"


def check_same_bits(actual: Results, expected: Results) -> None:
    """Asserts that nothing differs."""
    for name in ("out_TH", "dx_TH", "dweights_TK"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for index, (grad, other) in enumerate(zip(actual.factors, expected.factors, strict=True)):
        assert (grad is None) == (other is None)
        assert grad is None or other is None or torch.equal(grad, other), f"factor {index}"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-9))
