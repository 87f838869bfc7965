"""Mixture-of-experts with a LoRA adapter on every expert, many adapters in one pass (the CPU path).

The pairs (token, chosen expert) are sorted by segment and expert with a stable sort, so that every group (segment,
expert) is one slice, and each group is computed by itself:

    x [T, H] --gather--> [P, H] --W1, + A1/B1--> z [P, 2I] --silu(gate) * up--> h [P, I]
             --W2, + A2/B2--> y [P, H] --weigh, gather back, sum over k--> [T, H]

Gate and up share one A, as in PEFT's layout of a fused parameter. Backward needs neither y nor the gathered gradient of
the router weights: <dy, y> = <dh, h> with the unweighted dh.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from river_kernels.frozen import frozen_product, joined
from river_kernels.segments import (
    LoraPair,
    Pairs,
    Segments,
    add_product,
    check_segments,
    pair_at,
)


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive rows of the sorted pairs: one segment, one expert."""

    slot: int
    expert: int


@dataclass(frozen=True, slots=True)
class Grouped:
    """Rows that lie group by group; `sizes` are the rows of each."""

    groups: tuple[Group, ...]
    sizes: list[int]


@dataclass(frozen=True, slots=True)
class Route(Grouped):
    """`permutation` [P] sorts the flattened (token, k) pairs by group, `inverse` undoes it; `token` of each row."""

    permutation: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor


def moe_lora(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    segments: Segments,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
) -> torch.Tensor:
    """The weighted sum of the chosen experts of every token; [T, H].

    `gate_up` [E, 2I, H] and `down` [E, H, I] are frozen. `gate_up_pairs[slot]` has A [E, r, H] and B [E, 2I, r],
    `down_pairs[slot]` A [E, r, I] and B [E, H, r]; None where a slot has no adapter here. Gradients flow to x and to
    the router weights through autograd, to A and B through their pairs.
    """
    check_experts(x_TH, gate_up, down, segments, gate_up_pairs, down_pairs)
    route = _make_route(experts_TK, segments, experts=gate_up.shape[0])
    return _MoeLora.apply(x_TH, weights_TK, gate_up, down, route, gate_up_pairs, down_pairs)


def check_experts(
    x_TH: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    segments: Segments,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
) -> None:
    """Asserts that segments and pairs fit the tokens, and that the experts are frozen."""
    slots = len(gate_up_pairs)
    assert len(down_pairs) == slots
    check_segments(segments, tokens=x_TH.shape[0], slots=slots)
    assert not gate_up.requires_grad, "the base model is frozen"
    assert not down.requires_grad, "the base model is frozen"


def _make_route(experts_TK: torch.Tensor, segments: Segments, *, experts: int) -> Route:
    tokens, chosen = experts_TK.shape
    key = experts_TK.reshape(-1)
    if len(segments) > 1:
        lengths = torch.tensor([(segment.end - segment.start) * chosen for segment in segments])
        first_key = torch.arange(0, len(segments) * experts, experts)
        key = key + torch.repeat_interleave(first_key, lengths, output_size=tokens * chosen)
    permutation = torch.argsort(key, stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel())
    counts = torch.bincount(key, minlength=experts * len(segments)).tolist()
    groups: list[Group] = []
    sizes: list[int] = []
    for index, count in enumerate(counts):
        if count:
            segment, expert = divmod(index, experts)
            groups.append(Group(segments[segment].slot, expert))
            sizes.append(count)
    return Route(tuple(groups), sizes, permutation, inverse, permutation // chosen)


class _MoeLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        route: Route,
        gate_up_pairs: Pairs,
        down_pairs: Pairs,
    ) -> torch.Tensor:
        x_PH = x_TH.index_select(0, route.token)
        weight_P = weights_TK.reshape(-1)[route.permutation]
        y_PH, kept = run_experts(x_PH, gate_up, down, route, gate_up_pairs, down_pairs)
        ctx.route, ctx.weights, ctx.pairs = route, (gate_up, down), (gate_up_pairs, down_pairs)
        ctx.save_for_backward(weight_P, *kept)
        y_PH.mul_(weight_P[:, None])
        return sum_over_chosen(y_PH, route.inverse, weights_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dout_TH,) = grads
        route: Route = ctx.route
        weight_P, *kept = ctx.saved_tensors
        dout_PH = dout_TH.index_select(0, route.token)
        chosen = weight_P.numel() // dout_TH.shape[0]
        gate_up, down = ctx.weights
        gate_up_pairs, down_pairs = ctx.pairs
        dx_PH, dweight_P = run_experts_backward(
            dout_PH, weight_P, kept, gate_up, down, route, gate_up_pairs, down_pairs
        )
        dweights_TK = dweight_P[route.inverse].view(-1, chosen) if ctx.needs_input_grad[1] else None
        dx_TH = sum_over_chosen(dx_PH, route.inverse, chosen)
        return dx_TH, dweights_TK, None, None, None, None, None


Kept = list[torch.Tensor | None]
"""What the experts keep for their backward pass."""


def run_experts(
    x_PH: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    grouped: Grouped,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
) -> tuple[torch.Tensor, Kept]:
    """Every row through its expert and adapter, [P, H], and what `run_experts_backward` needs."""
    z_PF, v1 = _project(x_PH, gate_up, grouped, gate_up_pairs)
    gate_PI, up_PI = z_PF.chunk(2, dim=1)
    activated_PI = functional.silu(gate_PI)
    h_PI = activated_PI * up_PI
    y_PH, v2 = _project(h_PI, down, grouped, down_pairs)
    return y_PH, [x_PH, z_PF, activated_PI, h_PI, *v1, *v2]


def run_experts_backward(
    dout_PH: torch.Tensor,
    weight_P: torch.Tensor,
    kept: Sequence[torch.Tensor | None],
    gate_up: torch.Tensor,
    down: torch.Tensor,
    grouped: Grouped,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the rows, [P, H], and of their router weights, [P]; adds those of A and B to their buffers.

    `dout_PH` is the gradient of each row's token, not yet weighted by the router's `weight_P`.
    """
    x_PH, z_PF, activated_PI, h_PI, *shrunk = kept
    assert x_PH is not None
    assert z_PF is not None
    assert activated_PI is not None
    assert h_PI is not None
    v1, v2 = shrunk[: len(grouped.groups)], shrunk[len(grouped.groups) :]
    dh_PI = _project_backward(dout_PH, h_PI, down, grouped, down_pairs, v2, weight_P)
    dweight_P = (dh_PI * h_PI).sum(1)
    dz_PF = _swiglu_backward(dh_PI.mul_(weight_P[:, None]), z_PF, activated_PI)
    return _project_backward(dz_PF, x_PH, gate_up, grouped, gate_up_pairs, v1), dweight_P


def _project(
    x_PI: torch.Tensor, weight_EOI: torch.Tensor, grouped: Grouped, pairs: Pairs
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Every row through its expert and adapter, [P, O]; and `x A^T` of every group, [rows, r]."""
    weights_OI = weight_EOI.unbind()
    adapters = [None if pair is None else _transposed(pair) for pair in pairs]
    outputs: list[torch.Tensor] = []
    shrunk: list[torch.Tensor | None] = []
    for group, x in zip(grouped.groups, x_PI.split_with_sizes(grouped.sizes), strict=True):
        y = frozen_product(x, weights_OI[group.expert])
        outputs.append(y)
        adapter = pair_at(adapters, group.slot)
        if adapter is None:
            shrunk.append(None)
            continue
        a_IR, b_RO, scale = adapter.a[group.expert], adapter.b[group.expert], adapter.scale
        v = x @ a_IR
        y.addmm_(v, b_RO, alpha=scale)
        shrunk.append(v)
    return joined(outputs), shrunk


def _project_backward(
    dy_PO: torch.Tensor,
    x_PI: torch.Tensor,
    weight_EOI: torch.Tensor,
    grouped: Grouped,
    pairs: Pairs,
    shrunk: Sequence[torch.Tensor | None],
    row_weight_P: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of `x_PI`, [P, I]; adds those of A and B to their buffers.

    With `row_weight_P` the gradients of A and B are those of `row_weight * dy`, while that of x stays unweighted.
    """
    input_grads: list[torch.Tensor] = []
    weights_IO = weight_EOI.transpose(1, 2).unbind()
    adapters = [None if pair is None else _by_expert(pair) for pair in pairs]
    row_weights = (
        [None] * len(grouped.groups)
        if row_weight_P is None
        else row_weight_P[:, None].split_with_sizes(grouped.sizes)
    )
    pieces = (tensor.split_with_sizes(grouped.sizes) for tensor in (dy_PO, x_PI))
    for group, v, weight, dy, x in zip(grouped.groups, shrunk, row_weights, *pieces, strict=True):
        expert = group.expert
        dx = frozen_product(dy, weights_IO[expert])
        input_grads.append(dx)
        adapter = pair_at(adapters, group.slot)
        if adapter is None or v is None:
            continue
        dv = dy @ adapter.b[expert]
        dx.addmm_(dv, adapter.a[expert], alpha=adapter.scale)
        if weight is not None:
            dv.mul_(weight)
            v = v * weight  # noqa: PLW2901  # the weighted v is what the gradient needs
        if adapter.a_grad is not None and adapter.b_grad is not None:
            add_product(adapter.a_grad[expert], dv.T, x, adapter.scale)
            add_product(adapter.b_grad[expert], dy.T, v, adapter.scale)
    return joined(input_grads)


@dataclass(frozen=True, slots=True)
class _Experts:
    """A `LoraPair` cut into its experts."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    scale: float
    a_grad: tuple[torch.Tensor, ...] | None = None
    b_grad: tuple[torch.Tensor, ...] | None = None


def _transposed(pair: LoraPair) -> _Experts:
    return _Experts(pair.a.transpose(1, 2).unbind(), pair.b.transpose(1, 2).unbind(), pair.scale)


def _by_expert(pair: LoraPair) -> _Experts:
    if pair.a_grad is None or pair.b_grad is None:
        return _Experts(pair.a.unbind(), pair.b.unbind(), pair.scale)
    return _Experts(
        pair.a.unbind(), pair.b.unbind(), pair.scale, pair.a_grad.unbind(), pair.b_grad.unbind()
    )


def sum_over_chosen(y_PH: torch.Tensor, inverse: torch.Tensor, chosen: int) -> torch.Tensor:
    """Rows of the sorted pairs summed by token, [T, H], always in the same order."""
    return y_PH.index_select(0, inverse).view(-1, chosen, y_PH.shape[1]).sum(1)


def _swiglu_backward(
    dh_PI: torch.Tensor, z_PF: torch.Tensor, activated_PI: torch.Tensor
) -> torch.Tensor:
    """The gradient of z for h = silu(gate) * up, [P, 2I], from silu(gate)."""
    gate_PI, up_PI = z_PF.chunk(2, dim=1)
    dz_PF = torch.empty_like(z_PF)
    dgate_PI, dup_PI = dz_PF.chunk(2, dim=1)
    torch.mul(dh_PI, activated_PI, out=dup_PI)
    dgate_PI.copy_(torch.ops.aten.silu_backward(dh_PI * up_PI, gate_PI))
    return dz_PF
