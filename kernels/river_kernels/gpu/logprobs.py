"""`lora_logprobs` on GPUs: chunk by chunk, [h | v] [W | B]^T, then one pass over the logits each way.

Logits exist for one chunk at a time, in float32. Chunks begin where segments begin, and every product of a chunk is
its own: the bits of a segment depend on no other.
"""

# Tensors carry their shape in capitals.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from river_kernels.gpu.augmented import numbers_with_room, room_of, with_room
from river_kernels.gpu.column_grams import add_input_gradients, add_output_gradients, chunks_of
from river_kernels.gpu.columns import Columns, columns_of
from river_kernels.gpu.expand import expand_add, finish_inputs, write_tail
from river_kernels.gpu.lce import log_probabilities, logit_gradients
from river_kernels.gpu.products import float_product
from river_kernels.gpu.project import TOKENS, project
from river_kernels.gpu.tiles import Tiles, check_slots, token_tiles
from river_kernels.quantized import FrozenWeight
from river_kernels.segments import LoraPair, Pairs, Segment, Segments, pair_at


def lora_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: FrozenWeight,
    targets_TK: torch.Tensor,
    segments: Segments,
    pairs: Pairs,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, K] and entropy [T], float32; as `river_kernels.lora_logprobs`.

    A slot occurs in one segment only.
    """
    check_slots(segments)
    assert hidden_TH.dtype is weight_VH.dtype
    columns = columns_of([pairs], (0, weight_VH.shape[0]), hidden_TH)
    return _LoraLogprobs.apply(
        hidden_TH, weight_VH, targets_TK.contiguous(), segments, pairs, columns, chunk_tokens
    )


@dataclass(slots=True)
class _Head:
    """The lm_head while it is multiplied with: `width` columns behind its weights belong to `slot`."""

    weight: torch.Tensor
    room: int
    columns: Columns
    slot: int | None = None
    width: int = 0

    def turn_to(self, slot: int) -> None:
        """Makes the room behind the weights that of `slot`, if its columns fit there."""
        if slot == self.slot:
            return
        self.slot = slot
        width = self.columns.width_of(slot)
        self.width = width if width <= self.room else 0
        if self.width:
            write_tail(self.weight, self.columns, slot)

    @property
    def wide(self) -> torch.Tensor:
        """[W | B], [V, H + width]."""
        return with_room(self.weight, self.width)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What all chunks use one after another."""

    logits: torch.Tensor
    widened: torch.Tensor


class _LoraLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: FrozenWeight,
        targets_TK: torch.Tensor,
        segments: Segments,
        pairs: Pairs,
        columns: Columns,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = hidden_TH.shape[0]
        hidden_TH = hidden_TH.contiguous()
        normaliser_T, entropy_T = hidden_TH.new_empty(2, tokens, dtype=torch.float32).unbind()
        logprobs_TK = hidden_TH.new_empty(targets_TK.shape, dtype=torch.float32)
        v_TC = hidden_TH.new_empty(tokens, columns.width_max)
        head = _head(weight_VH, columns, hidden_TH)
        buffers = _buffers(segments, head, hidden_TH, chunk_tokens)
        for chunk in _chunks(segments, chunk_tokens):
            rows = slice(chunk.start, chunk.end)
            head.turn_to(chunk.slot)
            logits_CV = _logits(head, buffers, chunk, hidden_TH[rows], v_TC[rows])
            log_probabilities(
                logits_CV, targets_TK[rows], normaliser_T[rows], logprobs_TK[rows], entropy_T[rows]
            )
        ctx.segments, ctx.pairs, ctx.columns = segments, pairs, columns
        ctx.weight, ctx.chunk_tokens = weight_VH, chunk_tokens
        ctx.save_for_backward(hidden_TH, targets_TK, normaliser_T, logprobs_TK, v_TC)
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_TK, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        upstream_TK = grads[0].contiguous()
        hidden_TH, targets_TK, normaliser_T, logprobs_TK, v_TC = ctx.saved_tensors
        columns: Columns = ctx.columns
        dhidden_TH, dv_TC = torch.empty_like(hidden_TH), torch.empty_like(v_TC)
        head = _head(ctx.weight, columns, hidden_TH)
        buffers = _buffers(ctx.segments, head, hidden_TH, ctx.chunk_tokens)
        dlogits_CV = buffers.logits
        if hidden_TH.dtype is not torch.float32:
            dlogits_CV = torch.empty_like(dlogits_CV, dtype=hidden_TH.dtype)
        width = hidden_TH.shape[1] + columns.width_max
        dwidened_CJ = buffers.logits.new_empty(len(dlogits_CV), width)
        for chunk in _chunks(ctx.segments, ctx.chunk_tokens):
            rows = slice(chunk.start, chunk.end)
            tokens = chunk.end - chunk.start
            head.turn_to(chunk.slot)
            logits_CV = _logits(head, buffers, chunk, hidden_TH[rows], v_TC[rows])
            dlogits = dlogits_CV[:tokens]
            logit_gradients(
                logits_CV,
                targets_TK[rows],
                normaliser_T[rows],
                logprobs_TK[rows],
                upstream_TK[rows],
                dlogits,
            )
            dwidened = dwidened_CJ[:tokens]
            _project_logits(head, pair_at(ctx.pairs, chunk.slot), dlogits, dwidened)
            tiles = _tiles(chunk, columns, hidden_TH)
            finish_inputs(dwidened, dhidden_TH[rows], dv_TC[rows], columns, tiles)
            if columns.width_of(chunk.slot):
                own = (Segment(chunk.slot, 0, tokens),)
                sums = chunks_of(own, columns.slots, ctx.chunk_tokens, hidden_TH.device)
                add_input_gradients(dv_TC[rows], hidden_TH[rows], columns, sums)
                add_output_gradients(dlogits, v_TC[rows], columns, sums)
        return dhidden_TH, None, None, None, None, None, None


def _project_logits(
    head: _Head, pair: LoraPair | None, dlogits_CV: torch.Tensor, dwidened_CJ: torch.Tensor
) -> None:
    """Fills [dlogits W | dlogits B], float32."""
    inputs = head.weight.shape[1]
    float_product(dlogits_CV, head.wide, dwidened_CJ[:, : inputs + head.width])
    if pair is not None and not head.width:
        float_product(dlogits_CV, pair.b, dwidened_CJ[:, inputs : inputs + pair.rank])


def _logits(
    head: _Head,
    buffers: _Buffers,
    chunk: Segment,
    hidden_CH: torch.Tensor,
    v_CC: torch.Tensor,
) -> torch.Tensor:
    """The float32 logits of a chunk, [t, V]; fills its `v`."""
    tokens, inputs = hidden_CH.shape
    logits_CV = buffers.logits[:tokens]
    if not head.columns.width_of(chunk.slot):
        float_product(hidden_CH, head.weight.T, logits_CV)
        return logits_CV
    tiles = _tiles(chunk, head.columns, hidden_CH)
    if head.width:
        widened_CJ = buffers.widened[:tokens, : inputs + head.width]
        project(hidden_CH, head.columns, tiles, v_CC, widened_CJ)
        float_product(widened_CJ, head.wide.T, logits_CV)
        return logits_CV
    project(hidden_CH, head.columns, tiles, v_CC)
    float_product(hidden_CH, head.weight.T, logits_CV)
    expand_add(logits_CV, v_CC, head.columns, tiles)
    return logits_CV


def _head(weight_VH: FrozenWeight, columns: Columns, like: torch.Tensor) -> _Head:
    room = room_of(weight_VH)
    numbers = numbers_with_room(weight_VH, min(room, columns.width_max), like.device)
    return _Head(numbers, room, columns)


def _buffers(
    segments: Segments, head: _Head, hidden_TH: torch.Tensor, chunk_tokens: int
) -> _Buffers:
    longest = max((segment.end - segment.start for segment in segments), default=0)
    rows = min(longest, chunk_tokens)
    width = min(head.room, head.columns.width_max)
    return _Buffers(
        hidden_TH.new_empty(rows, head.weight.shape[0], dtype=torch.float32),
        hidden_TH.new_empty(rows, hidden_TH.shape[1] + width),
    )


def _tiles(chunk: Segment, columns: Columns, like: torch.Tensor) -> Tiles:
    """Tiles of a chunk alone."""
    own = (Segment(chunk.slot, 0, chunk.end - chunk.start),)
    return token_tiles(own, slots=columns.slots, block=TOKENS, device=like.device)


def _chunks(segments: Segments, chunk_tokens: int) -> Iterator[Segment]:
    for segment in segments:
        for start in range(segment.start, segment.end, chunk_tokens):
            yield Segment(segment.slot, start, min(start + chunk_tokens, segment.end))
