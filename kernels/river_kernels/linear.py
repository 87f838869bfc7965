"""A frozen linear layer with many adapters in one pass: `y = x W^T + scale * (x A^T) B^T`, A and B by segment.

One autograd function, so that a step keeps only x and the rank-sized `x A^T`, and no adapter-sized delta is ever added
in a pass of its own.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from river_kernels.segments import LoraPair, Segments, check_segments, flatten_pairs, scales_of


def lora_linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    segments: Segments,
    pairs: Sequence[LoraPair | None],
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x_TI` through the frozen layer and each segment's adapter; [T, out].

    `pairs[slot]` is the adapter of a slot at this layer, None if it has none here. Ranks may differ. Gradients flow to
    x and to every A and B, not to the frozen weight.
    """
    check_segments(segments, tokens=x_TI.shape[0], slots=len(pairs))
    assert not weight_OI.requires_grad, "the base model is frozen"
    flat = flatten_pairs(pairs)
    return _LoraLinear.apply(x_TI, weight_OI, bias_O, segments, scales_of(pairs), *flat)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        segments: Segments,
        scales: tuple[float, ...],
        *flat: torch.Tensor | None,
    ) -> torch.Tensor:
        y_TO = torch.nn.functional.linear(x_TI, weight_OI, bias_O)
        shrunk: list[torch.Tensor | None] = []  # x A^T of each segment, [t, r]
        for segment in segments:
            a, b = pair_at(flat, segment.slot)
            if a is None or b is None:
                shrunk.append(None)
                continue
            v_TR = x_TI[segment.start : segment.end] @ a.T
            y_TO[segment.start : segment.end].addmm_(v_TR, b.T, alpha=scales[segment.slot])
            shrunk.append(v_TR)
        ctx.segments, ctx.scales = segments, scales
        ctx.save_for_backward(x_TI, weight_OI, *shrunk, *flat)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dy_TO,) = grads
        segments: Segments = ctx.segments
        x_TI, weight_OI, *rest = ctx.saved_tensors
        shrunk, flat = rest[: len(segments)], rest[len(segments) :]
        dx_TI = dy_TO @ weight_OI if ctx.needs_input_grad[0] else None
        dflat: list[torch.Tensor | None] = [None] * len(flat)
        for segment, v_TR in zip(segments, shrunk, strict=True):
            a, b = pair_at(flat, segment.slot)
            if a is None or b is None:
                continue
            rows, scale = slice(segment.start, segment.end), ctx.scales[segment.slot]
            dv_TR = (dy_TO[rows] @ b).mul_(scale)
            if dx_TI is not None:
                dx_TI[rows].addmm_(dv_TR, a)
            add_grads(dflat, segment.slot, dv_TR.T @ x_TI[rows], (dy_TO[rows].T @ v_TR).mul_(scale))
        return (dx_TI, None, None, None, None, *dflat)


def pair_at(
    flat: Sequence[torch.Tensor | None], slot: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A and B of `slot` among the flattened pairs."""
    return (None, None) if slot < 0 else (flat[2 * slot], flat[2 * slot + 1])


def add_grads(
    dflat: list[torch.Tensor | None], slot: int, da: torch.Tensor, db: torch.Tensor
) -> None:
    """Adds to the gradients of a slot; it has several segments when a batch mentions it more than once."""
    for index, grad in ((2 * slot, da), (2 * slot + 1, db)):
        known = dflat[index]
        dflat[index] = grad if known is None else known.add_(grad)
