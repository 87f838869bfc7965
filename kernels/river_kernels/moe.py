"""Mixture-of-experts with a LoRA adapter on every expert, many adapters in one pass.

The pairs (token, chosen expert) are sorted by segment and expert with a stable sort, so that every group (segment,
expert) is one slice:

    x [T, H] --gather--> [P, H] --experts.py--> y [P, H] --weigh, gather back, sum over k--> [T, H]

Backward needs neither y nor the gathered gradient of the router weights: <dy, y> = <dh, h> with the unweighted dh.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from river_kernels.experts import (
    ByGroup,
    Group,
    Grouped,
    check_experts,
    run_experts,
    run_experts_backward,
    sum_over_chosen,
)
from river_kernels.segments import Pairs, Segments
from river_kernels.shared_factors import (
    BySegment,
    expand_tokens,
    expand_tokens_backward,
    sharing_b,
    shrink_tokens,
    shrink_tokens_backward,
)


@dataclass(frozen=True, slots=True)
class Span:
    """The rows and groups of one segment: `start` to `end` (exclusive), `first` to `last` (exclusive)."""

    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Route(Grouped):
    """`permutation` [P] sorts the flattened (token, k) pairs by group, `inverse` undoes it; `token` of each row.

    `spans` has one of each segment. `chosen` is the number of experts of a token.
    """

    permutation: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    chosen: int
    segments: Segments
    spans: tuple[Span, ...]

    def to_rows(self, by_segment: Mapping[int, torch.Tensor]) -> ByGroup:
        """What tokens have, copied to each one's rows."""
        by_group: ByGroup = [None] * len(self.groups)
        for index, values_TR in by_segment.items():
            span = self.spans[index]
            token = self.token[span.start : span.end] - self.segments[index].start
            sizes = self.sizes[span.first : span.last]
            rows = values_TR.index_select(0, token).split_with_sizes(sizes)
            by_group[span.first : span.last] = rows
        return by_group

    def to_tokens(
        self,
        by_group: Sequence[torch.Tensor | None],
        indices: Sequence[int],
        weight_P: torch.Tensor | None = None,
    ) -> BySegment:
        """What rows have, weighted and summed by token, of the segments at `indices`."""
        summed: BySegment = {}
        for index in indices:
            span, segment = self.spans[index], self.segments[index]
            rows = [part for part in by_group[span.first : span.last] if part is not None]
            values_PR = torch.cat(rows)
            if weight_P is not None:
                values_PR *= weight_P[span.start : span.end, None]
            pairs = slice(segment.start * self.chosen, segment.end * self.chosen)
            inverse = self.inverse[pairs] - span.start
            summed[index] = sum_over_chosen(values_PR, inverse, self.chosen)
        return summed


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
    `down_pairs[slot]` A [E, r, I] and B [E, H, r]; experts may share the factors of width H. None where a slot has no
    adapter here. Gradients flow to x and to the router weights through autograd, to A and B through their pairs.
    """
    check_experts(x_TH, gate_up, down, segments, gate_up_pairs, down_pairs)
    route = _make_route(experts_TK, segments, experts=gate_up.shape[0])
    return _MoeLora.apply(x_TH, weights_TK, gate_up, down, route, gate_up_pairs, down_pairs)


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
    spans: list[Span] = []
    for index, segment in enumerate(segments):
        first = len(groups)
        for expert, count in enumerate(counts[index * experts : (index + 1) * experts]):
            if count:
                groups.append(Group(segment.slot, expert))
                sizes.append(count)
        start, end = segment.start * chosen, segment.end * chosen
        spans.append(Span(start, end, first, len(groups)))
    return Route(
        tuple(groups),
        sizes,
        permutation,
        inverse,
        permutation // chosen,
        chosen,
        segments,
        tuple(spans),
    )


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
        segments = route.segments
        x_PH = x_TH.index_select(0, route.token)
        weight_P = weights_TK.reshape(-1)[route.permutation]
        v1 = shrink_tokens(x_TH, segments, gate_up_pairs)
        y_PH, v2, kept = run_experts(
            x_PH, gate_up, down, route, gate_up_pairs, down_pairs, route.to_rows(v1)
        )
        u = route.to_tokens(v2, sharing_b(segments, down_pairs), weight_P)
        y_PH.mul_(weight_P[:, None])
        out_TH = sum_over_chosen(y_PH, route.inverse, route.chosen)
        expand_tokens(out_TH, u, segments, down_pairs)
        ctx.route, ctx.weights, ctx.pairs = route, (gate_up, down), (gate_up_pairs, down_pairs)
        ctx.shared = tuple(v1), tuple(u)
        ctx.save_for_backward(x_TH, weight_P, *u.values(), *kept)
        return out_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dout_TH,) = grads
        route: Route = ctx.route
        gate_up, down = ctx.weights
        gate_up_pairs, down_pairs = ctx.pairs
        with_v1, with_u = ctx.shared
        x_TH, weight_P, *saved = ctx.saved_tensors
        u = dict(zip(with_u, saved[: len(with_u)], strict=True))
        du = expand_tokens_backward(dout_TH, u, route.segments, down_pairs)
        dx_PH, dweight_P, dv1 = run_experts_backward(
            dout_TH.index_select(0, route.token),
            weight_P,
            saved[len(with_u) :],
            gate_up,
            down,
            route,
            gate_up_pairs,
            down_pairs,
            route.to_rows(du),
        )
        dx_TH = sum_over_chosen(dx_PH, route.inverse, route.chosen)
        dv1_tokens = route.to_tokens(dv1, with_v1)
        shrink_tokens_backward(dx_TH, dv1_tokens, x_TH, route.segments, gate_up_pairs)
        dweights_TK = (
            dweight_P[route.inverse].view(-1, route.chosen) if ctx.needs_input_grad[1] else None
        )
        return dx_TH, dweights_TK, None, None, None, None, None
