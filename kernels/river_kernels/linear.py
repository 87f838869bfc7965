"""A frozen linear layer with many adapters in one pass: `y = x W^T + scale * (x A^T) B^T`, A and B by segment.

Layers that read the same x, such as the projections of attention, may be one frozen matrix whose rows are theirs: each
has its own adapters on its own block of columns of y.

One autograd function, so that a step keeps only x and the rank-sized `x A^T`, and no adapter-sized delta is ever added
in a pass of its own.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from river_kernels.device import uses_triton
from river_kernels.frozen import frozen_product
from river_kernels.quantized import FrozenWeight, dense_weight
from river_kernels.segments import (
    Pairs,
    Segments,
    add_product,
    check_segments,
    pair_at,
    sizes_of,
)


@dataclass(frozen=True, slots=True)
class Block:
    """Columns `start` to `end` (exclusive) of y, and the adapters of their layer by slot."""

    pairs: Pairs
    start: int
    end: int


def lora_linear(
    x_TI: torch.Tensor,
    weight_OI: FrozenWeight,
    segments: Segments,
    pairs: Pairs,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x_TI` through the frozen layer and each segment's adapter; [T, out].

    `pairs[slot]` is the adapter of a slot at this layer, None if it has none here. Ranks may differ. Gradients flow to
    x through autograd and to A and B through their pairs, not to the frozen weight.
    """
    return lora_linear_blocks(
        x_TI, weight_OI, segments, [Block(pairs, 0, weight_OI.shape[0])], bias_O
    )


def lora_linear_blocks(
    x_TI: torch.Tensor,
    weight_OI: FrozenWeight,
    segments: Segments,
    blocks: Sequence[Block],
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """`lora_linear` of several layers at once; `weight_OI` has the rows of all, and `blocks` say which are whose.

    It may be stored in fewer bits.
    """
    assert not weight_OI.requires_grad, "the base model is frozen"
    position = 0
    for block in blocks:
        assert block.start == position
        check_segments(segments, tokens=x_TI.shape[0], slots=len(block.pairs))
        position = block.end
    assert position == weight_OI.shape[0], "blocks cover all rows"
    if uses_triton(x_TI):
        from river_kernels.gpu import linear  # noqa: PLC0415  # CPUs need no Triton

        bounds = (0, *(block.end for block in blocks))
        pairs = [block.pairs for block in blocks]
        return linear.lora_linear_blocks(x_TI, weight_OI, bias_O, segments, pairs, bounds)
    return _LoraLinear.apply(x_TI, weight_OI, bias_O, segments, tuple(blocks))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        weight: FrozenWeight,
        bias_O: torch.Tensor | None,
        segments: Segments,
        blocks: tuple[Block, ...],
    ) -> torch.Tensor:
        y_TO = frozen_product(x_TI, dense_weight(weight), sizes_of(segments))
        shrunk: list[torch.Tensor | None] = []  # x A^T of each segment and block, [t, r]
        for segment in segments:
            rows = slice(segment.start, segment.end)
            x, y = x_TI[rows], y_TO[rows]
            for block in blocks:
                pair = pair_at(block.pairs, segment.slot)
                if pair is None:
                    shrunk.append(None)
                    continue
                v_TR = x @ pair.a.T
                y[:, block.start : block.end].addmm_(v_TR, pair.b.T, alpha=pair.scale)
                shrunk.append(v_TR)
        if bias_O is not None:
            y_TO += bias_O
        ctx.segments, ctx.blocks, ctx.weight = segments, blocks, weight
        ctx.save_for_backward(x_TI, *shrunk)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dy_TO,) = grads
        x_TI, *shrunk = ctx.saved_tensors
        kept = iter(shrunk)
        dx_TI = frozen_product(dy_TO, dense_weight(ctx.weight).T, sizes_of(ctx.segments))
        for segment in ctx.segments:
            rows = slice(segment.start, segment.end)
            x, dy, dx = x_TI[rows], dy_TO[rows], dx_TI[rows]
            for block in ctx.blocks:
                pair, v_TR = pair_at(block.pairs, segment.slot), next(kept)
                if pair is None:
                    continue
                dy_block = dy[:, block.start : block.end]
                dv_TR = dy_block @ pair.b
                dx.addmm_(dv_TR, pair.a, alpha=pair.scale)
                add_product(pair.a_grad, dv_TR.T, x, pair.scale)
                add_product(pair.b_grad, dy_block.T, v_TR, pair.scale)
        return dx_TI, None, None, None, None
