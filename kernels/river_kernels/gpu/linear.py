"""`lora_linear_blocks` on GPUs.

    long segments      [x | v] [W | B]^T            one product each, in the room behind the weights
    all the others     x W^T, then y += v B^T       shared products of fixed shapes, then one launch

How a segment is computed depends on its own length and ranks, so that its bits do not depend on the others. Rows of
a long segment make a product that fills a GPU; many short ones would each read all weights again.
"""

# Tensors carry their shape in capitals.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from river_kernels.gpu.augmented import numbers_with_room, room_of, with_room
from river_kernels.gpu.column_grams import (
    CHUNK_TOKENS,
    add_input_gradients,
    add_output_gradients,
    chunks_of,
)
from river_kernels.gpu.columns import Columns, columns_of
from river_kernels.gpu.expand import expand_add, finish_inputs, write_tail
from river_kernels.gpu.products import shared_product
from river_kernels.gpu.project import TOKENS, project, project_back
from river_kernels.gpu.tiles import Tiles, check_slots, token_tiles
from river_kernels.quantized import FrozenWeight
from river_kernels.segments import Pairs, Segment, Segments

OWN_PRODUCT_TOKENS_MIN = 512
"""From this length on a segment has products of its own."""


@dataclass(frozen=True, slots=True)
class _Way:
    """How each segment is computed: `joined` with its B behind the weights, `alone` and `shared` without.

    `shared` are runs of neighbours; `expanded` are the segments whose adapters a launch of its own adds.
    """

    joined: Segments
    alone: Segments
    shared: tuple[tuple[int, int], ...]
    expanded: Segments

    def width(self, columns: Columns) -> int:
        """How many columns the room behind the weights has to have."""
        return max((columns.width_of(segment.slot) for segment in self.joined), default=0)


def lora_linear_blocks(
    x_TI: torch.Tensor,
    weight_OI: FrozenWeight,
    bias_O: torch.Tensor | None,
    segments: Segments,
    blocks: Sequence[Pairs],
    bounds: Sequence[int],
) -> torch.Tensor:
    """As `river_kernels.lora_linear_blocks`; block i has the rows from `bounds[i]` to `bounds[i + 1]`.

    A slot occurs in one segment only.
    """
    check_slots(segments)
    assert x_TI.dtype is weight_OI.dtype
    columns = columns_of(blocks, bounds, x_TI)
    return _LoraLinear.apply(x_TI, weight_OI, bias_O, segments, columns)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        weight: FrozenWeight,
        bias_O: torch.Tensor | None,
        segments: Segments,
        columns: Columns,
    ) -> torch.Tensor:
        tokens, inputs = x_TI.shape
        if x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        way = _way(segments, columns, room_of(weight))
        weight_OI = _numbers(weight, way, columns, x_TI.device)
        v_TC = x_TI.new_empty(tokens, columns.width_max)
        y_TO = x_TI.new_empty(tokens, weight_OI.shape[0])
        widened_TJ = None
        if way.joined:
            widened_TJ = x_TI.new_empty(tokens, inputs + way.width(columns))
        if columns.width_max:
            project(x_TI, columns, _tiles(segments, columns, x_TI), v_TC, widened_TJ)
        for segment in way.joined:
            assert widened_TJ is not None
            wide_OJ = _written(weight_OI, columns, segment.slot)
            x_tJ = widened_TJ[segment.start : segment.end, : wide_OJ.shape[1]]
            torch.mm(x_tJ, wide_OJ.T, out=y_TO[segment.start : segment.end])
        for start, end in _spans(way.alone):
            torch.mm(x_TI[start:end], weight_OI.T, out=y_TO[start:end])
        for start, end in way.shared:
            shared_product(x_TI[start:end], weight_OI.T, y_TO[start:end])
        if way.expanded:
            expand_add(y_TO, v_TC, columns, _tiles(way.expanded, columns, x_TI))
        if bias_O is not None:
            y_TO += bias_O
        ctx.segments, ctx.columns, ctx.way, ctx.weight = segments, columns, way, weight
        ctx.save_for_backward(x_TI, v_TC)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        dy_TO = grads[0] if grads[0].stride(1) == 1 else grads[0].contiguous()
        x_TI, v_TC = ctx.saved_tensors
        columns: Columns = ctx.columns
        way: _Way = ctx.way
        weight_OI = _numbers(ctx.weight, way, columns, x_TI.device)
        tokens, inputs = x_TI.shape
        widened_TJ = x_TI.new_empty(tokens, inputs + columns.width_max)
        for segment in way.joined:
            wide_OJ = _written(weight_OI, columns, segment.slot)
            rows_tJ = widened_TJ[segment.start : segment.end, : wide_OJ.shape[1]]
            torch.mm(dy_TO[segment.start : segment.end], wide_OJ, out=rows_tJ)
        for start, end in _spans(way.alone):
            torch.mm(dy_TO[start:end], weight_OI, out=widened_TJ[start:end, :inputs])
        for start, end in way.shared:
            shared_product(dy_TO[start:end], weight_OI, widened_TJ[start:end, :inputs])
        if not columns.width_max:
            return widened_TJ, None, None, None, None
        if way.expanded:
            tiles = _tiles(way.expanded, columns, x_TI)
            project_back(dy_TO, columns, tiles, widened_TJ[:, inputs:])
        dx_TI, dv_TC = torch.empty_like(x_TI), torch.empty_like(v_TC)
        finish_inputs(widened_TJ, dx_TI, dv_TC, columns, _tiles(ctx.segments, columns, x_TI))
        chunks = chunks_of(ctx.segments, columns.slots, CHUNK_TOKENS, x_TI.device)
        add_input_gradients(dv_TC, x_TI, columns, chunks)
        add_output_gradients(dy_TO, v_TC, columns, chunks)
        return dx_TI, None, None, None, None


def _way(segments: Segments, columns: Columns, room: int) -> _Way:
    joined: list[Segment] = []
    alone: list[Segment] = []
    shared: list[tuple[int, int]] = []
    expanded: list[Segment] = []
    for segment in segments:
        width = columns.width_of(segment.slot)
        is_long = segment.end - segment.start >= OWN_PRODUCT_TOKENS_MIN
        if is_long and 0 < width <= room:
            joined.append(segment)
            continue
        if width:
            expanded.append(segment)
        if is_long:
            alone.append(segment)
        elif shared and shared[-1][1] == segment.start:
            shared[-1] = (shared[-1][0], segment.end)
        else:
            shared.append((segment.start, segment.end))
    return _Way(tuple(joined), tuple(alone), tuple(shared), tuple(expanded))


def _numbers(
    weight: FrozenWeight, way: _Way, columns: Columns, device: torch.device
) -> torch.Tensor:
    return numbers_with_room(weight, way.width(columns), device)


def _written(weight_OI: torch.Tensor, columns: Columns, slot: int) -> torch.Tensor:
    """[W | B] of the adapter in `slot`."""
    write_tail(weight_OI, columns, slot)
    return with_room(weight_OI, columns.width_of(slot))


def _tiles(segments: Segments, columns: Columns, x: torch.Tensor) -> Tiles:
    return token_tiles(segments, slots=columns.slots, block=TOKENS, device=x.device)


def _spans(segments: Segments) -> Iterator[tuple[int, int]]:
    return ((segment.start, segment.end) for segment in segments)
