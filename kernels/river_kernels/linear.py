"""A frozen linear layer with many adapters in one pass: `y = x W^T + scale * (x A^T) B^T`, A and B by segment.

One autograd function, so that a step keeps only x and the rank-sized `x A^T`, and no adapter-sized delta is ever added
in a pass of its own.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from typing import Any

import torch

from river_kernels.frozen import frozen_product, joined
from river_kernels.segments import Pairs, Segments, add_product, check_segments, pair_at


def lora_linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    segments: Segments,
    pairs: Pairs,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x_TI` through the frozen layer and each segment's adapter; [T, out].

    `pairs[slot]` is the adapter of a slot at this layer, None if it has none here. Ranks may differ. Gradients flow to
    x through autograd and to A and B through their pairs, not to the frozen weight.
    """
    check_segments(segments, tokens=x_TI.shape[0], slots=len(pairs))
    assert not weight_OI.requires_grad, "the base model is frozen"
    return _LoraLinear.apply(x_TI, weight_OI, bias_O, segments, pairs)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        segments: Segments,
        pairs: Pairs,
    ) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        shrunk: list[torch.Tensor | None] = []  # x A^T of each segment, [t, r]
        for segment in segments:
            x = x_TI[segment.start : segment.end]
            y = frozen_product(x, weight_OI)
            outputs.append(y)
            pair = pair_at(pairs, segment.slot)
            if pair is None:
                shrunk.append(None)
                continue
            v_TR = x @ pair.a.T
            y.addmm_(v_TR, pair.b.T, alpha=pair.scale)
            shrunk.append(v_TR)
        y_TO = joined(outputs)
        if bias_O is not None:
            y_TO += bias_O
        ctx.segments, ctx.pairs, ctx.weight = segments, pairs, weight_OI
        ctx.save_for_backward(x_TI, *shrunk)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dy_TO,) = grads
        x_TI, *shrunk = ctx.saved_tensors
        weight_OI: torch.Tensor = ctx.weight
        input_grads: list[torch.Tensor] = []
        for segment, v_TR in zip(ctx.segments, shrunk, strict=True):
            rows = slice(segment.start, segment.end)
            dy = dy_TO[rows]
            pair = pair_at(ctx.pairs, segment.slot)
            dv_TR = None
            if pair is not None:
                dv_TR = dy @ pair.b
                add_product(pair.a_grad, dv_TR.T, x_TI[rows], pair.scale)
                add_product(pair.b_grad, dy.T, v_TR, pair.scale)
            if ctx.needs_input_grad[0]:
                dx = frozen_product(dy, weight_OI.T)
                if pair is not None and dv_TR is not None:
                    dx.addmm_(dv_TR, pair.a, alpha=pair.scale)
                input_grads.append(dx)
        dx_TI = joined(input_grads) if ctx.needs_input_grad[0] else None
        return dx_TI, None, None, None, None
