"""Log-probabilities of given next tokens under a frozen lm_head with adapters, without ever holding all logits.

A batch of T tokens would need T times vocabulary floats several times over. Here forward keeps one number a token (the
log-sum-exp), and backward computes the logits of each chunk once more.
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
    targets_T: torch.Tensor,
    segments: Segments,
    pairs: Pairs,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of `targets_T` at every position and the entropy there, in nats; two [T].

    Gradients flow from the log-probabilities to the hidden states through autograd, and to A and B through their
    pairs; the entropy carries none.
    """
    check_segments(segments, tokens=hidden_TH.shape[0], slots=len(pairs))
    assert not weight_VH.requires_grad, "the base model is frozen"
    assert chunk_tokens > 0
    return _LoraLogprobs.apply(hidden_TH, weight_VH, targets_T, segments, pairs, chunk_tokens)


def _chunks(segments: Segments, chunk_tokens: int) -> Iterator[Segment]:
    for segment in segments:
        for start in range(segment.start, segment.end, chunk_tokens):
            yield Segment(segment.slot, start, min(start + chunk_tokens, segment.end))


def _logits(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, pair: LoraPair | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits [t, V] of a chunk, and `hidden A^T` [t, r] if it has an adapter."""
    logits_TV = frozen_product(hidden_TH, weight_VH)
    if pair is None:
        return logits_TV, None
    v_TR = hidden_TH @ pair.a.T
    return logits_TV.addmm_(v_TR, pair.b.T, alpha=pair.scale), v_TR


class _LoraLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        segments: Segments,
        pairs: Pairs,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normaliser_T = hidden_TH.new_empty(hidden_TH.shape[0])
        logprobs_T = torch.empty_like(normaliser_T)
        entropy_T = torch.empty_like(normaliser_T)
        for chunk in _chunks(segments, chunk_tokens):
            rows = slice(chunk.start, chunk.end)
            logits_TV, _ = _logits(hidden_TH[rows], weight_VH, pair_at(pairs, chunk.slot))
            normaliser = torch.logsumexp(logits_TV, dim=1)
            chosen = logits_TV.gather(1, targets_T[rows, None])[:, 0]
            normaliser_T[rows] = normaliser
            logprobs_T[rows] = chosen - normaliser
            log_p_TV = logits_TV.sub_(normaliser[:, None])
            entropy_T[rows] = -torch.linalg.vecdot(log_p_TV.exp(), log_p_TV)
        ctx.segments, ctx.pairs, ctx.chunk_tokens = segments, pairs, chunk_tokens
        ctx.weight = weight_VH
        ctx.save_for_backward(hidden_TH, targets_T, normaliser_T)
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        dlogprobs_T = grads[0]
        hidden_TH, targets_T, normaliser_T = ctx.saved_tensors
        weight_VH: torch.Tensor = ctx.weight
        dhidden_TH = torch.empty_like(hidden_TH)
        for chunk in _chunks(ctx.segments, ctx.chunk_tokens):
            rows = slice(chunk.start, chunk.end)
            hidden, dhidden = hidden_TH[rows], dhidden_TH[rows]
            pair = pair_at(ctx.pairs, chunk.slot)
            logits_TV, v_TR = _logits(hidden, weight_VH, pair)
            upstream = dlogprobs_T[rows, None]
            # d logprob / d logits = onehot(target) - softmax
            dlogits_TV = logits_TV.sub_(normaliser_T[rows, None]).exp_().mul_(-upstream)
            dlogits_TV.scatter_add_(1, targets_T[rows, None], upstream)
            dhidden.copy_(frozen_product(dlogits_TV, weight_VH.T))
            if pair is None or v_TR is None:
                continue
            dv_TR = dlogits_TV @ pair.b
            dhidden.addmm_(dv_TR, pair.a, alpha=pair.scale)
            add_product(pair.a_grad, dv_TR.T, hidden, pair.scale)
            add_product(pair.b_grad, dlogits_TV.T, v_TR, pair.scale)
        return dhidden_TH, None, None, None, None, None
