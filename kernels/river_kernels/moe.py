"""Mixture-of-experts with a LoRA adapter on every expert, many adapters in one pass (the CPU path).

The pairs (token, chosen expert) are sorted by expert with a stable sort. Tokens lie adapter by adapter, so inside an
expert the rows of one adapter are contiguous too, and every group (expert, adapter) is one slice:

    x [T, H] --gather--> [P, H] --W1 by expert, + A1/B1 by group--> z [P, 2I] --silu(gate) * up--> h [P, I]
             --W2 by expert, + A2/B2 by group--> y [P, H] --weigh, gather back, sum over k--> [T, H]

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

from river_kernels.segments import LoraPair, Segments, check_segments, flatten_pairs, scales_of


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows `start` to `end` of the sorted pairs: one expert, one adapter."""

    expert: int
    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Route:
    """`permutation` [P] sorts the flattened (token, k) pairs by expert, `inverse` undoes it, `token` is its token."""

    permutation: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    expert_ends: torch.Tensor
    groups: tuple[_Group, ...]


def moe_lora(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    segments: Segments,
    gate_up_pairs: Sequence[LoraPair | None],
    down_pairs: Sequence[LoraPair | None],
) -> torch.Tensor:
    """The weighted sum of the chosen experts of every token; [T, H].

    `gate_up` [E, 2I, H] and `down` [E, H, I] are frozen. `gate_up_pairs[slot]` has A [E, r, H] and B [E, 2I, r],
    `down_pairs[slot]` A [E, r, I] and B [E, H, r]; None where a slot has no adapter here. Gradients flow to x, to the
    router weights and to every A and B.
    """
    slots = len(gate_up_pairs)
    assert len(down_pairs) == slots
    check_segments(segments, tokens=x_TH.shape[0], slots=slots)
    assert not gate_up.requires_grad, "the base model is frozen"
    assert not down.requires_grad, "the base model is frozen"
    route = _make_route(experts_TK, segments, experts=gate_up.shape[0])
    flat = flatten_pairs(gate_up_pairs) + flatten_pairs(down_pairs)
    scales = scales_of(gate_up_pairs) + scales_of(down_pairs)
    return _MoeLora.apply(x_TH, weights_TK, gate_up, down, route, scales, *flat)


def _make_route(experts_TK: torch.Tensor, segments: Segments, *, experts: int) -> _Route:
    tokens, chosen = experts_TK.shape
    flat = experts_TK.reshape(-1)
    permutation = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)

    lengths = torch.tensor([segment.end - segment.start for segment in segments])
    segment_T = torch.repeat_interleave(torch.arange(len(segments)), lengths, output_size=tokens)
    key = flat * len(segments) + segment_T.to(flat.device).repeat_interleave(chosen)
    ends = torch.bincount(key, minlength=experts * len(segments)).cumsum(0).tolist()
    groups: list[_Group] = []
    start = 0
    for index, end in enumerate(ends):
        expert, segment = divmod(index, len(segments))
        if end > start:
            groups.append(_Group(expert, segments[segment].slot, start, end))
        start = end
    expert_ends = torch.tensor(
        ends[len(segments) - 1 :: len(segments)], dtype=torch.int32, device=flat.device
    )
    return _Route(permutation, inverse, permutation // chosen, expert_ends, tuple(groups))


def _by_expert(x_PI: torch.Tensor, weight_EIO: torch.Tensor, route: _Route) -> torch.Tensor:
    """Every row times its expert's matrix; [P, O]."""
    return functional.grouped_mm(x_PI, weight_EIO, offs=route.expert_ends)


def _expand_groups(
    x_PI: torch.Tensor,
    y_PO: torch.Tensor,
    route: _Route,
    flat: Sequence[torch.Tensor | None],
    scales: Sequence[float],
) -> list[torch.Tensor | None]:
    """Adds every group's update to `y_PO` in place; returns `x A^T` of every group, [rows, r]."""
    shrunk: list[torch.Tensor | None] = []
    for group in route.groups:
        a, b = _pair_of(flat, group)
        if a is None or b is None:
            shrunk.append(None)
            continue
        v = x_PI[group.start : group.end] @ a.T
        y_PO[group.start : group.end].addmm_(v, b.T, alpha=scales[group.slot])
        shrunk.append(v)
    return shrunk


def _pair_of(
    flat: Sequence[torch.Tensor | None], group: _Group
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The group's A [r, in] and B [out, r]."""
    if group.slot < 0:
        return None, None
    a, b = flat[2 * group.slot], flat[2 * group.slot + 1]
    return (None, None) if a is None or b is None else (a[group.expert], b[group.expert])


def _groups_backward(
    dy_PO: torch.Tensor,
    x_PI: torch.Tensor,
    dx_PI: torch.Tensor | None,
    route: _Route,
    flat: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    shrunk: Sequence[torch.Tensor | None],
    row_weight_P: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Adds every group's share to `dx_PI` in place; returns the gradients of the flattened pairs.

    With `row_weight_P` the gradients of A and B are those of `row_weight * dy`, while `dx_PI` stays unweighted.
    """
    grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in flat]
    for group, v in zip(route.groups, shrunk, strict=True):
        a, b = _pair_of(flat, group)
        if a is None or b is None or v is None:
            continue
        rows, scale = slice(group.start, group.end), scales[group.slot]
        dy = dy_PO[rows]
        dv = (dy @ b).mul_(scale)
        if dx_PI is not None:
            dx_PI[rows].addmm_(dv, a)
        scaled_v = v * scale
        if row_weight_P is not None:
            weight = row_weight_P[rows, None]
            dv, scaled_v = dv * weight, scaled_v * weight
        da, db = grads[2 * group.slot], grads[2 * group.slot + 1]
        assert da is not None
        assert db is not None
        da[group.expert].addmm_(dv.T, x_PI[rows])
        db[group.expert].addmm_(dy.T, scaled_v)
    return grads


class _MoeLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        route: _Route,
        scales: tuple[float, ...],
        *flat: torch.Tensor | None,
    ) -> torch.Tensor:
        half = len(flat) // 2
        slots = len(scales) // 2
        x_PH = x_TH[route.token]
        z_PF = _by_expert(x_PH, gate_up.transpose(1, 2), route)
        v1 = _expand_groups(x_PH, z_PF, route, flat[:half], scales[:slots])
        gate_PI, up_PI = z_PF.chunk(2, dim=1)
        h_PI = functional.silu(gate_PI).mul_(up_PI)
        y_PH = _by_expert(h_PI, down.transpose(1, 2), route)
        v2 = _expand_groups(h_PI, y_PH, route, flat[half:], scales[slots:])
        weight_P = weights_TK.reshape(-1)[route.permutation]
        ctx.route, ctx.scales = route, scales
        ctx.save_for_backward(x_PH, z_PF, h_PI, weight_P, gate_up, down, *v1, *v2, *flat)
        y_PH.mul_(weight_P[:, None])
        return y_PH[route.inverse].view(*weights_TK.shape, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dout_TH,) = grads
        route: _Route = ctx.route
        count = len(route.groups)
        x_PH, z_PF, h_PI, weight_P, gate_up, down, *rest = ctx.saved_tensors
        v1, v2, flat = rest[:count], rest[count : 2 * count], rest[2 * count :]
        half, slots = len(flat) // 2, len(ctx.scales) // 2
        shape = (dout_TH.shape[0], -1)

        dout_PH = dout_TH[route.token]
        dh_PI = _by_expert(dout_PH, down, route)
        d_down = _groups_backward(
            dout_PH, h_PI, dh_PI, route, flat[half:], ctx.scales[slots:], v2, weight_P
        )
        dweights_TK = (dh_PI * h_PI).sum(1)[route.inverse].view(shape)
        dz_PF = _swiglu_backward(dh_PI.mul_(weight_P[:, None]), z_PF)
        dx_PH = _by_expert(dz_PF, gate_up, route) if ctx.needs_input_grad[0] else None
        d_gate_up = _groups_backward(dz_PF, x_PH, dx_PH, route, flat[:half], ctx.scales[:slots], v1)
        dx_TH = None
        if dx_PH is not None:
            dx_TH = dx_PH[route.inverse].view(*dweights_TK.shape, -1).sum(1)
        return (dx_TH, dweights_TK, None, None, None, None, *d_gate_up, *d_down)


def _swiglu_backward(dh_PI: torch.Tensor, z_PF: torch.Tensor) -> torch.Tensor:
    """The gradient of z for h = silu(gate) * up; [P, 2I]."""
    gate_PI, up_PI = z_PF.chunk(2, dim=1)
    dz_PF = torch.empty_like(z_PF)
    dgate_PI, dup_PI = dz_PF.chunk(2, dim=1)
    torch.mul(dh_PI, functional.silu(gate_PI), out=dup_PI)
    silu_grad_PI = torch.ops.aten.silu_backward(dh_PI * up_PI, gate_PI)
    dgate_PI.copy_(silu_grad_PI)
    return dz_PF
