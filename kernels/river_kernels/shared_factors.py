"""The factors that the experts of a mixture share: A of gate and up, B of down (layout `shared_outer`).

They touch the model's width, so they are applied to tokens, of which there are fewer than rows by the number of chosen
experts:

    v1 = scale * x A1^T for every token, then copied to its rows;   out += (sum over k of w v2) B2^T

Each segment is computed by itself; of segments that share nothing there is nothing.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence

import torch

from river_kernels.rows import ByBlock
from river_kernels.segments import LoraPair, Pairs, Segment, Segments, add_product, pair_at


def shrink_tokens(x_TH: torch.Tensor, segments: Segments, gate_up_pairs: Pairs) -> ByBlock:
    """`scale * x A1^T` of the tokens of every segment whose pair shares A."""
    found: ByBlock = []
    for segment in segments:
        pair = pair_sharing_a(segment, gate_up_pairs)
        if pair is None:
            found.append(None)
        else:
            found.append((_of(x_TH, segment) @ pair.a[0].T).mul_(pair.scale))
    return found


def shrink_tokens_backward(
    dx_TH: torch.Tensor,
    dv1: Sequence[torch.Tensor | None],
    x_TH: torch.Tensor,
    segments: Segments,
    gate_up_pairs: Pairs,
) -> None:
    """Adds to the gradient of x, in place, and to those of A; `dv1` is not yet scaled."""
    for segment, dv1_TR in zip(segments, dv1, strict=True):
        pair = pair_sharing_a(segment, gate_up_pairs)
        if pair is None or dv1_TR is None:
            continue
        scaled_TR = dv1_TR * pair.scale
        _of(dx_TH, segment).addmm_(scaled_TR, pair.a[0])
        if pair.a_grad is not None:
            add_product(pair.a_grad[0], scaled_TR.T, _of(x_TH, segment))


def expand_tokens(
    out_TH: torch.Tensor,
    u: Sequence[torch.Tensor | None],
    segments: Segments,
    down_pairs: Pairs,
) -> None:
    """Adds `u B2^T` to the tokens of every segment whose pair shares B, in place."""
    for segment, u_TR in zip(segments, u, strict=True):
        pair = pair_sharing_b(segment, down_pairs)
        if pair is not None and u_TR is not None:
            _of(out_TH, segment).addmm_(u_TR, pair.b[0].T)


def expand_tokens_backward(
    dout_TH: torch.Tensor,
    u: Sequence[torch.Tensor | None],
    segments: Segments,
    down_pairs: Pairs,
) -> ByBlock:
    """The gradients of `h A2^T`, not yet weighted by the router; adds those of B."""
    found: ByBlock = []
    for segment, u_TR in zip(segments, u, strict=True):
        pair = pair_sharing_b(segment, down_pairs)
        if pair is None or u_TR is None:
            found.append(None)
            continue
        dout = _of(dout_TH, segment)
        found.append((dout @ pair.b[0]).mul_(pair.scale))
        if pair.b_grad is not None:
            add_product(pair.b_grad[0], dout.T, u_TR)
    return found


def pair_sharing_a(segment: Segment, pairs: Pairs) -> LoraPair | None:
    pair = pair_at(pairs, segment.slot)
    return pair if pair is not None and pair.shares_a else None


def pair_sharing_b(segment: Segment, pairs: Pairs) -> LoraPair | None:
    pair = pair_at(pairs, segment.slot)
    return pair if pair is not None and pair.shares_b else None


def _of(tokens_TH: torch.Tensor, segment: Segment) -> torch.Tensor:
    return tokens_TH[segment.start : segment.end]
