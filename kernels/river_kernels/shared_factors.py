"""The factors that the experts of a mixture share: A of gate and up, B of down (layout `shared_outer`).

They touch the model's width, so they are applied to tokens, of which there are fewer than rows by the number of chosen
experts:

    v1 = x A1^T for every token, then copied to its rows;   out += scale * (sum over k of w v2) B2^T

Each segment is computed by itself. What belongs to one is found by its index; segments that share nothing have nothing.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from river_kernels.segments import LoraPair, Pairs, Segments, add_product, pair_at

BySegment = dict[int, torch.Tensor]
"""Tensors [t, r] by the index of their segment."""


def shrink_tokens(x_TH: torch.Tensor, segments: Segments, gate_up_pairs: Pairs) -> BySegment:
    """`x A1^T` of the tokens of every segment whose pair shares A."""
    return {
        index: x_TH[rows] @ pair.a[0].T
        for index, rows, pair in _sharing(segments, gate_up_pairs, _shares_a)
    }


def shrink_tokens_backward(
    dx_TH: torch.Tensor,
    dv1: Mapping[int, torch.Tensor],
    x_TH: torch.Tensor,
    segments: Segments,
    gate_up_pairs: Pairs,
) -> None:
    """Adds to the gradient of x, in place, and to those of A; `dv1` is not yet scaled."""
    for index, rows, pair in _sharing(segments, gate_up_pairs, _shares_a):
        dx_TH[rows].addmm_(dv1[index], pair.a[0], alpha=pair.scale)
        if pair.a_grad is not None:
            add_product(pair.a_grad[0], dv1[index].T, x_TH[rows], pair.scale)


def expand_tokens(
    out_TH: torch.Tensor, u: Mapping[int, torch.Tensor], segments: Segments, down_pairs: Pairs
) -> None:
    """Adds `scale * u B2^T` to the tokens of every segment whose pair shares B, in place."""
    for index, rows, pair in _sharing(segments, down_pairs, _shares_b):
        out_TH[rows].addmm_(u[index], pair.b[0].T, alpha=pair.scale)


def expand_tokens_backward(
    dout_TH: torch.Tensor, u: Mapping[int, torch.Tensor], segments: Segments, down_pairs: Pairs
) -> BySegment:
    """The gradients of `u`, not yet scaled; adds those of B."""
    du: BySegment = {}
    for index, rows, pair in _sharing(segments, down_pairs, _shares_b):
        dout = dout_TH[rows]
        du[index] = dout @ pair.b[0]
        if pair.b_grad is not None:
            add_product(pair.b_grad[0], dout.T, u[index], pair.scale)
    return du


def sharing_segments(segments: Segments, pairs: Pairs) -> list[int]:
    """The indices of the segments whose pair shares a factor."""
    return [
        index
        for index, _, _ in _sharing(segments, pairs, lambda pair: pair.shares_a or pair.shares_b)
    ]


def sharing_b(segments: Segments, pairs: Pairs) -> list[int]:
    """The indices of the segments whose pair shares B."""
    return [index for index, _, _ in _sharing(segments, pairs, _shares_b)]


def _shares_a(pair: LoraPair) -> bool:
    return pair.shares_a


def _shares_b(pair: LoraPair) -> bool:
    return pair.shares_b


def _sharing(
    segments: Segments, pairs: Pairs, is_shared: Callable[[LoraPair], bool]
) -> Iterator[tuple[int, slice, LoraPair]]:
    """Index, tokens and pair of the segments whose pair shares a factor."""
    for index, segment in enumerate(segments):
        pair = pair_at(pairs, segment.slot)
        if pair is not None and is_shared(pair) and segment.end > segment.start:
            yield index, slice(segment.start, segment.end), pair
