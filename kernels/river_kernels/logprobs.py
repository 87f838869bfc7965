"""Log-probabilities of given next tokens under a frozen lm_head with adapters, without ever holding all logits.

A batch of T tokens would need T times vocabulary floats several times over. Here no more than a chunk of them exists at
once: forward keeps one number a token (the log-sum-exp), and backward computes the logits of each chunk once more. A
batch no larger than a chunk keeps its softmax for backward instead, which has the same bits.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from river_kernels.device import uses_triton
from river_kernels.frozen import frozen_product, joined
from river_kernels.segments import (
    Pairs,
    Segment,
    Segments,
    add_product,
    check_segments,
    pair_at,
    sizes_of,
)

CHUNK_TOKENS = 2048


def lora_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets: torch.Tensor,
    segments: Segments,
    pairs: Pairs,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of `targets`, [T] or [T, K], in their shape, and the entropy [T]; in nats.

    Gradients flow from the log-probabilities to the hidden states through autograd, and to A and B through their
    pairs; the entropy carries none. The bits of a segment depend on no other, nor on targets added to it whose
    log-probabilities have a gradient of zero.
    """
    check_segments(segments, tokens=hidden_TH.shape[0], slots=len(pairs))
    assert targets.ndim in {1, 2}
    assert targets.shape[0] == hidden_TH.shape[0]
    assert not weight_VH.requires_grad, "the base model is frozen"
    assert chunk_tokens > 0
    targets_TK = targets if targets.ndim == 2 else targets[:, None]  # noqa: PLR2004
    arguments = (hidden_TH, weight_VH, targets_TK, segments, pairs)
    if uses_triton(hidden_TH):
        from river_kernels.gpu import logprobs  # noqa: PLC0415  # CPUs need no Triton

        logprobs_TK, entropy_T = logprobs.lora_logprobs(*arguments, chunk_tokens)
    else:
        logprobs_TK, entropy_T = _LoraLogprobs.apply(*arguments, chunk_tokens)
    return logprobs_TK.view(targets.shape), entropy_T


Chunk = list[Segment]
"""Consecutive segments, or a part of one."""


def _chunks(segments: Segments, chunk_tokens: int) -> Iterator[Chunk]:
    """Whole segments together, as many as fit; those that do not fit at all in parts, which only they decide about."""
    chunk: Chunk = []
    for segment in segments:
        if chunk and segment.end - chunk[0].start > chunk_tokens:
            yield chunk
            chunk = []
        parts = [
            Segment(segment.slot, start, min(start + chunk_tokens, segment.end))
            for start in range(segment.start, segment.end, chunk_tokens)
        ]
        for part in parts[:-1]:
            yield [part]
        if len(parts) > 1:
            yield parts[-1:]
        else:
            chunk += parts
    if chunk:
        yield chunk


def _logits(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, chunk: Chunk, pairs: Pairs
) -> torch.Tensor:
    """The logits [t, V] of a chunk."""
    first = chunk[0].start
    logits_TV = frozen_product(hidden_TH[first : chunk[-1].end], weight_VH, sizes_of(tuple(chunk)))
    for segment in chunk:
        pair = pair_at(pairs, segment.slot)
        if pair is not None:
            rows = logits_TV[segment.start - first : segment.end - first]
            v_TR = hidden_TH[segment.start : segment.end] @ pair.a.T
            rows.addmm_(v_TR, pair.b.T, alpha=pair.scale)
    return logits_TV


def _hidden_gradient(
    dlogits_TV: torch.Tensor,
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    chunk: Chunk,
    pairs: Pairs,
) -> torch.Tensor:
    """The gradient of a chunk's hidden states, [t, H]; adds those of A and B."""
    first = chunk[0].start
    dhidden_TH = frozen_product(dlogits_TV, weight_VH.T, sizes_of(tuple(chunk)))
    for segment in chunk:
        pair = pair_at(pairs, segment.slot)
        if pair is None:
            continue
        hidden = hidden_TH[segment.start : segment.end]
        dlogits = dlogits_TV[segment.start - first : segment.end - first]
        dv_TR = dlogits @ pair.b
        dhidden_TH[segment.start - first : segment.end - first].addmm_(
            dv_TR, pair.a, alpha=pair.scale
        )
        add_product(pair.a_grad, dv_TR.T, hidden, pair.scale)
        if pair.b_grad is not None:
            add_product(pair.b_grad, dlogits.T, hidden @ pair.a.T, pair.scale)
    return dhidden_TH


class _LoraLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_TK: torch.Tensor,
        segments: Segments,
        pairs: Pairs,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normaliser_T = hidden_TH.new_empty(hidden_TH.shape[0])
        logprobs_TK = hidden_TH.new_empty(targets_TK.shape)
        entropy_T = torch.empty_like(normaliser_T)
        is_kept = ctx.needs_input_grad[0] and hidden_TH.shape[0] <= chunk_tokens
        softmax: list[torch.Tensor] = []  # [t, V] of each chunk
        for chunk in _chunks(segments, chunk_tokens):
            rows = slice(chunk[0].start, chunk[-1].end)
            logits_TV = _logits(hidden_TH, weight_VH, chunk, pairs)
            normaliser = torch.logsumexp(logits_TV, dim=1)
            normaliser_T[rows] = normaliser
            log_p_TV = logits_TV.sub_(normaliser[:, None])
            logprobs_TK[rows] = log_p_TV.gather(1, targets_TK[rows])
            p_TV = log_p_TV.exp()
            entropy_T[rows] = -torch.linalg.vecdot(p_TV, log_p_TV)
            if is_kept:
                softmax.append(p_TV)
        ctx.segments, ctx.pairs, ctx.chunk_tokens = segments, pairs, chunk_tokens
        ctx.weight = weight_VH
        ctx.save_for_backward(hidden_TH, targets_TK, normaliser_T, *softmax)
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_TK, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        dlogprobs_TK = grads[0]
        hidden_TH, targets_TK, normaliser_T, *softmax = ctx.saved_tensors
        weight_VH: torch.Tensor = ctx.weight
        gradients: list[torch.Tensor] = []
        for index, chunk in enumerate(_chunks(ctx.segments, ctx.chunk_tokens)):
            rows = slice(chunk[0].start, chunk[-1].end)
            if softmax:
                p_TV = softmax[index]
            else:
                logits_TV = _logits(hidden_TH, weight_VH, chunk, ctx.pairs)
                p_TV = logits_TV.sub_(normaliser_T[rows, None]).exp_()
            upstream_TK = dlogprobs_TK[rows]
            # d logprob / d logits = onehot(target) - softmax
            dlogits_TV = p_TV.mul_(-_sum_in_order(upstream_TK)[:, None])
            dlogits_TV.scatter_add_(1, targets_TK[rows], upstream_TK)
            gradients.append(_hidden_gradient(dlogits_TV, hidden_TH, weight_VH, chunk, ctx.pairs))
        return joined(gradients), None, None, None, None, None


def _sum_in_order(values_TK: torch.Tensor) -> torch.Tensor:
    """[T], the columns added from the first to the last, so that zeros behind them do not change the sum's rounding."""
    total_T = values_TK[:, 0].clone()
    for column in values_TK.unbind(dim=1)[1:]:
        total_T += column
    return total_T
