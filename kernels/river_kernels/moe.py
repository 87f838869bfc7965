"""Mixture-of-experts with a LoRA adapter on every expert, many adapters in one pass.

The pairs (token, chosen expert) are sorted by segment and expert with a stable sort, so that a segment's are one block,
and in it an expert's one slice:

    x [T, H] --gather--> [P, H] --experts.py--> y [P, H] --gather back, weigh, sum over k--> [T, H]

Backward needs neither y nor the gathered gradient of the router weights: <dy, y> = <dh, h> with the unweighted dh.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from river_kernels.device import uses_triton
from river_kernels.experts import Experts, Kept, run_experts, run_experts_backward
from river_kernels.quantized import FrozenWeight
from river_kernels.rows import ByBlock, Rows, Source, inverted, make_rows, sum_over_chosen
from river_kernels.segments import Pairs, Segment, Segments, sizes_of
from river_kernels.shared_factors import (
    expand_tokens,
    expand_tokens_backward,
    shrink_tokens,
    shrink_tokens_backward,
)


@dataclass(frozen=True, slots=True)
class Route:
    """Where the pairs (token, k) lie: a block of `rows` for each of `segments`, of which none is empty.

    `permutation` [P] sorts the flattened pairs by block and expert, `inverse` undoes it; `token` of each row. With
    `by_expert` in their names they are those of rows that lie by expert. `chosen` is the number of experts of a token.
    """

    rows: Rows
    segments: Segments
    chosen: int
    permutation: torch.Tensor
    inverse: torch.Tensor
    inverse_by_expert: torch.Tensor
    token: torch.Tensor
    token_by_expert: torch.Tensor

    def source(self, tokens_TH: torch.Tensor) -> Source:
        """Tokens, as often as they have chosen an expert."""
        return Source(tokens_TH, self.token, self.token_by_expert)

    def to_rows(self, values: Sequence[torch.Tensor | None]) -> ByBlock:
        """What the tokens of each segment have, copied to each one's rows."""
        return [
            None
            if of_tokens is None
            else of_tokens.index_select(0, self._own(self.token, segment) - segment.start)
            for segment, of_tokens in zip(self.segments, values, strict=True)
        ]

    def to_tokens(
        self, values: Sequence[torch.Tensor | None], weights_TK: torch.Tensor | None = None
    ) -> ByBlock:
        """What the rows of each block have, weighted and summed by token."""
        summed: ByBlock = []
        for segment, of_rows in zip(self.segments, values, strict=True):
            if of_rows is None:
                summed.append(None)
                continue
            inverse = self._own(self.inverse, segment) - segment.start * self.chosen
            weights = None
            if weights_TK is not None:
                weights = weights_TK[segment.start : segment.end].reshape(-1)
            summed.append(sum_over_chosen(of_rows, inverse, self.chosen, weights))
        return summed

    def sum_of(
        self, by_expert_PH: torch.Tensor, weights_TK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All rows, which lie by expert, weighted and summed by token, [T, H]."""
        weights = None if weights_TK is None else weights_TK.reshape(-1)
        return sum_over_chosen(by_expert_PH, self.inverse_by_expert, self.chosen, weights)

    def _own(self, values_P: torch.Tensor, segment: Segment) -> torch.Tensor:
        return values_P[segment.start * self.chosen : segment.end * self.chosen]


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
    experts = Experts(gate_up, down, gate_up_pairs, down_pairs)
    experts.check(x_TH, segments)
    if uses_triton(x_TH):
        from river_kernels.gpu import moe  # noqa: PLC0415  # CPUs need no Triton

        return moe.moe_lora(
            x_TH, experts_TK, weights_TK, gate_up, down, segments, gate_up_pairs, down_pairs
        )
    route = _make_route(experts_TK, segments, experts=gate_up.shape[0])
    return _MoeLora.apply(x_TH, weights_TK, experts, route)


def _make_route(experts_TK: torch.Tensor, segments: Segments, *, experts: int) -> Route:
    segments = tuple(segment for segment in segments if segment.end > segment.start)
    chosen = experts_TK.shape[1]
    expert_P = experts_TK.reshape(-1)
    key = expert_P.clone()
    sizes = [size * chosen for size in sizes_of(segments)]
    for index, of_segment in enumerate(key.split_with_sizes(sizes)):
        of_segment.add_(index * experts)
    # Stable: the order within a group is that of the tokens.
    permutation = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=experts * len(segments)).view(-1, experts)
    rows = make_rows(
        [segment.slot for segment in segments], counts, expert_P.index_select(0, permutation)
    )
    inverse, token = inverted(permutation), permutation // chosen
    return Route(
        rows,
        segments,
        chosen,
        permutation,
        inverse,
        inverse if rows.back is None else rows.back.index_select(0, inverse),
        token,
        token if rows.by_expert is None else token.index_select(0, rows.by_expert),
    )


class _MoeLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        experts: Experts,
        route: Route,
    ) -> torch.Tensor:
        segments = route.segments
        v1 = shrink_tokens(x_TH, segments, experts.gate_up_pairs)
        y_PH, v2, kept = run_experts(route.source(x_TH), experts, route.rows, route.to_rows(v1))
        out_TH = route.sum_of(y_PH, weights_TK)
        u = route.to_tokens(v2, weights_TK)
        expand_tokens(out_TH, u, segments, experts.down_pairs)
        ctx.experts, ctx.route = experts, route
        ctx.save_for_backward(x_TH, weights_TK, *u, *kept.flat())
        return out_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dout_TH,) = grads
        route: Route = ctx.route
        experts: Experts = ctx.experts
        segments = route.segments
        x_TH, weights_TK, *saved = ctx.saved_tensors
        u, kept = saved[: len(segments)], Kept.from_flat(saved[len(segments) :], route.rows)
        du = expand_tokens_backward(dout_TH, u, segments, experts.down_pairs)
        dx_PH, dweight_P, dv1 = run_experts_backward(
            route.source(dout_TH),
            weights_TK.reshape(-1)[route.permutation],
            route.source(x_TH),
            kept,
            experts,
            route.rows,
            route.to_rows(du),
        )
        dx_TH = route.sum_of(dx_PH)
        shrink_tokens_backward(dx_TH, route.to_tokens(dv1), x_TH, segments, experts.gate_up_pairs)
        dweights_TK = (
            dweight_P[route.inverse].view(-1, route.chosen) if ctx.needs_input_grad[1] else None
        )
        return dx_TH, dweights_TK, None, None
