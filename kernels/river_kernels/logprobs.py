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

from river_kernels.frozen import frozen_product
from river_kernels.segments import (
    LoraPair,
    Pairs,
    Segment,
    Segments,
    add_product,
    check_segments,
    pair_at,
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
    targets_TK = targets.view(len(targets), -1)
    logprobs_TK, entropy_T = _LoraLogprobs.apply(
        hidden_TH, weight_VH, targets_TK, segments, pairs, chunk_tokens
    )
    return logprobs_TK.view(targets.shape), entropy_T


def _chunks(segments: Segments, chunk_tokens: int) -> Iterator[Segment]:
    for segment in segments:
        for start in range(segment.start, segment.end, chunk_tokens):
            yield Segment(segment.slot, start, min(start + chunk_tokens, segment.end))


def _logits(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, pair: LoraPair | None
) -> torch.Tensor:
    """The logits [t, V] of a chunk."""
    logits_TV = frozen_product(hidden_TH, weight_VH)
    if pair is not None:
        logits_TV.addmm_(hidden_TH @ pair.a.T, pair.b.T, alpha=pair.scale)
    return logits_TV


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
            rows = slice(chunk.start, chunk.end)
            logits_TV = _logits(hidden_TH[rows], weight_VH, pair_at(pairs, chunk.slot))
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
        dhidden_TH = torch.empty_like(hidden_TH)
        for index, chunk in enumerate(_chunks(ctx.segments, ctx.chunk_tokens)):
            rows = slice(chunk.start, chunk.end)
            hidden, dhidden = hidden_TH[rows], dhidden_TH[rows]
            pair = pair_at(ctx.pairs, chunk.slot)
            if softmax:
                p_TV = softmax[index]
            else:
                logits_TV = _logits(hidden, weight_VH, pair)
                p_TV = logits_TV.sub_(normaliser_T[rows, None]).exp_()
            upstream_TK = dlogprobs_TK[rows]
            # d logprob / d logits = onehot(target) - softmax
            dlogits_TV = p_TV.mul_(-_sum_in_order(upstream_TK)[:, None])
            dlogits_TV.scatter_add_(1, targets_TK[rows], upstream_TK)
            dhidden.copy_(frozen_product(dlogits_TV, weight_VH.T))
            if pair is None:
                continue
            dv_TR = dlogits_TV @ pair.b
            dhidden.addmm_(dv_TR, pair.a, alpha=pair.scale)
            add_product(pair.a_grad, dv_TR.T, hidden, pair.scale)
            if pair.b_grad is not None:
                add_product(pair.b_grad, dlogits_TV.T, hidden @ pair.a.T, pair.scale)
        return dhidden_TH, None, None, None, None, None


def _sum_in_order(values_TK: torch.Tensor) -> torch.Tensor:
    """[T], the columns added from the first to the last, so that zeros behind them do not change the sum's rounding."""
    total_T = values_TK[:, 0].clone()
    for column in values_TK.unbind(dim=1)[1:]:
        total_T += column
    return total_T
