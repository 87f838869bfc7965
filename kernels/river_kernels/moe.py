"""Mixture-of-experts with a LoRA adapter on every expert, many adapters in one pass.

The pairs (token, chosen expert) are sorted by expert and segment with a stable sort, so that every group (expert,
segment) is one slice, and all rows of an expert another:

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

from river_kernels.device import uses_triton
from river_kernels.experts import (
    ByGroup,
    Group,
    Grouped,
    check_experts,
    run_experts,
    run_experts_backward,
    sum_over_chosen,
)
from river_kernels.quantized import FrozenWeight
from river_kernels.segments import Pairs, Segments, sizes_of
from river_kernels.shared_factors import (
    BySegment,
    expand_tokens,
    expand_tokens_backward,
    sharing_b,
    sharing_segments,
    shrink_tokens,
    shrink_tokens_backward,
)


@dataclass(frozen=True, slots=True)
class Share:
    """What of the rows belongs to one segment.

    `rows` [p] in their order, with the `token` of each, counted from the segment's first; `inverse` [p] sorts them by
    (token, k).
    """

    rows: torch.Tensor
    token: torch.Tensor
    inverse: torch.Tensor


@dataclass(frozen=True, slots=True)
class Route(Grouped):
    """`permutation` [P] sorts the flattened (token, k) pairs by group, `inverse` undoes it; `token` of each row.

    `chosen` is the number of experts of a token. `groups_of` has the indices of each segment's groups.
    """

    permutation: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    chosen: int
    groups_of: list[list[int]]


class Shares:
    """What of the rows belongs to the segments whose experts share a factor."""

    def __init__(self, route: Route, segments: Segments, pairs: Sequence[Pairs]) -> None:
        self._route = route
        self._shares: dict[int, Share] = {}
        sharing = {index for of_site in pairs for index in sharing_segments(segments, of_site)}
        if not sharing:
            return
        sizes = [size * route.chosen for size in sizes_of(segments)]
        of_token = torch.repeat_interleave(
            torch.arange(len(segments)), torch.tensor(sizes_of(segments))
        )
        # Rows segment by segment, in each as they lie.
        order = torch.argsort(of_token[route.token], stable=True)
        inverse = _inverted(order)[route.inverse]
        for index, (rows, inverse_rows) in enumerate(
            zip(order.split(sizes), inverse.split(sizes), strict=True)
        ):
            if index in sharing:
                segment = segments[index]
                self._shares[index] = Share(
                    rows,
                    route.token[rows] - segment.start,
                    inverse_rows - segment.start * route.chosen,
                )

    def to_rows(self, by_segment: Mapping[int, torch.Tensor]) -> ByGroup:
        """What tokens have, copied to each one's rows."""
        route = self._route
        by_group: ByGroup = [None] * len(route.groups)
        for index, values_TR in by_segment.items():
            groups = route.groups_of[index]
            sizes = [route.sizes[group] for group in groups]
            rows = values_TR.index_select(0, self._shares[index].token).split_with_sizes(sizes)
            for group, part in zip(groups, rows, strict=True):
                by_group[group] = part
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
            share = self._shares[index]
            parts = [by_group[group] for group in self._route.groups_of[index]]
            values_PR = torch.cat([part for part in parts if part is not None])
            if weight_P is not None:
                values_PR *= weight_P.index_select(0, share.rows)[:, None]
            summed[index] = sum_over_chosen(values_PR, share.inverse, self._route.chosen)
        return summed


def moe_lora(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: FrozenWeight,
    down: FrozenWeight,
    segments: Segments,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
) -> torch.Tensor:
    """The weighted sum of the chosen experts of every token; [T, H].

    `gate_up` [E, 2I, H] and `down` [E, H, I] are frozen; they may be stored in fewer bits. `gate_up_pairs[slot]` has A
    [E, r, H] and B [E, 2I, r], `down_pairs[slot]` A [E, r, I] and B [E, H, r]; experts may share the factors of width
    H. None where a slot has no adapter here. Gradients flow to x and to the router weights through autograd, to A and B
    through their pairs.
    """
    check_experts(x_TH, gate_up, down, segments, gate_up_pairs, down_pairs)
    if uses_triton(x_TH):
        from river_kernels.gpu import moe  # noqa: PLC0415  # CPUs need no Triton

        return moe.moe_lora(
            x_TH, experts_TK, weights_TK, gate_up, down, segments, gate_up_pairs, down_pairs
        )
    route = _make_route(experts_TK, segments, experts=gate_up.shape[0])
    return _MoeLora.apply(
        x_TH, weights_TK, gate_up, down, route, segments, gate_up_pairs, down_pairs
    )


def _make_route(experts_TK: torch.Tensor, segments: Segments, *, experts: int) -> Route:
    tokens, chosen = experts_TK.shape
    count = len(segments)
    sizes = [size * chosen for size in sizes_of(segments)]
    key = experts_TK.reshape(-1)
    if count > 1:
        of_segment = torch.repeat_interleave(
            torch.arange(count), torch.tensor(sizes), output_size=tokens * chosen
        )
        key = key * count + of_segment
    # Stable, and tokens lie segment by segment: the order within a group is that of the tokens.
    permutation = torch.argsort(key, stable=True)
    inverse = _inverted(permutation)
    found = torch.bincount(key, minlength=experts * count).tolist()
    groups: list[Group] = []
    group_sizes: list[int] = []
    groups_of: list[list[int]] = [[] for _ in segments]
    for index, size in enumerate(found):
        if size:
            expert, segment = divmod(index, count)
            groups_of[segment].append(len(groups))
            groups.append(Group(segments[segment].slot, expert))
            group_sizes.append(size)
    return Route(
        tuple(groups), group_sizes, permutation, inverse, permutation // chosen, chosen, groups_of
    )


def _inverted(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel())
    return inverse


class _MoeLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_up: FrozenWeight,
        down: FrozenWeight,
        route: Route,
        segments: Segments,
        gate_up_pairs: Pairs,
        down_pairs: Pairs,
    ) -> torch.Tensor:
        x_PH = x_TH.index_select(0, route.token)
        weight_P = weights_TK.reshape(-1)[route.permutation]
        shares = Shares(route, segments, (gate_up_pairs, down_pairs))
        v1 = shrink_tokens(x_TH, segments, gate_up_pairs)
        y_PH, v2, kept = run_experts(
            x_PH, gate_up, down, route, gate_up_pairs, down_pairs, shares.to_rows(v1)
        )
        u = shares.to_tokens(v2, sharing_b(segments, down_pairs), weight_P)
        y_PH.mul_(weight_P[:, None])
        out_TH = sum_over_chosen(y_PH, route.inverse, route.chosen)
        expand_tokens(out_TH, u, segments, down_pairs)
        ctx.route, ctx.shares, ctx.segments = route, shares, segments
        ctx.weights, ctx.pairs = (gate_up, down), (gate_up_pairs, down_pairs)
        ctx.with_v1, ctx.with_u = tuple(v1), tuple(u)
        ctx.save_for_backward(x_TH, weight_P, *u.values(), *kept)
        return out_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dout_TH,) = grads
        route: Route = ctx.route
        gate_up, down = ctx.weights
        gate_up_pairs, down_pairs = ctx.pairs
        segments, shares, with_u = ctx.segments, ctx.shares, ctx.with_u
        x_TH, weight_P, *saved = ctx.saved_tensors
        u = dict(zip(with_u, saved[: len(with_u)], strict=True))
        du = expand_tokens_backward(dout_TH, u, segments, down_pairs)
        dx_PH, dweight_P, dv1 = run_experts_backward(
            dout_TH.index_select(0, route.token),
            weight_P,
            saved[len(with_u) :],
            gate_up,
            down,
            route,
            gate_up_pairs,
            down_pairs,
            shares.to_rows(du),
        )
        dx_TH = sum_over_chosen(dx_PH, route.inverse, route.chosen)
        dv1_tokens = shares.to_tokens(dv1, ctx.with_v1)
        shrink_tokens_backward(dx_TH, dv1_tokens, x_TH, segments, gate_up_pairs)
        dweights_TK = (
            dweight_P[route.inverse].view(-1, route.chosen) if ctx.needs_input_grad[1] else None
        )
        return dx_TH, dweights_TK, None, None, None, None, None, None
