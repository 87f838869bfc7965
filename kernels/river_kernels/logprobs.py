"""Log-probabilities of given next tokens under a frozen lm_head with adapters, without ever holding all logits.

A batch of T tokens would need T times vocabulary floats several times over. Here forward keeps one number a token (the
log-sum-exp), and backward computes the logits of each chunk once more.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from river_kernels.linear import add_grads, pair_at
from river_kernels.segments import (
    LoraPair,
    Segment,
    Segments,
    check_segments,
    flatten_pairs,
    scales_of,
)

CHUNK_TOKENS = 2048


def lora_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    segments: Segments,
    pairs: Sequence[LoraPair | None],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of `targets_T` at every position and the entropy there, in nats; two [T].

    Gradients flow through the log-probabilities to the hidden states and to every A and B; the entropy carries none.
    """
    check_segments(segments, tokens=hidden_TH.shape[0], slots=len(pairs))
    assert not weight_VH.requires_grad, "the base model is frozen"
    assert chunk_tokens > 0
    flat = flatten_pairs(pairs)
    return _LoraLogprobs.apply(
        hidden_TH, weight_VH, targets_T, segments, scales_of(pairs), chunk_tokens, *flat
    )


def _chunks(segments: Segments, chunk_tokens: int) -> Iterator[Segment]:
    for segment in segments:
        for start in range(segment.start, segment.end, chunk_tokens):
            yield Segment(segment.slot, start, min(start + chunk_tokens, segment.end))


def _logits(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits [t, V] of a chunk, and `hidden A^T` [t, r] if it has an adapter."""
    logits_TV = hidden_TH @ weight_VH.T
    if a is None or b is None:
        return logits_TV, None
    v_TR = hidden_TH @ a.T
    return logits_TV.addmm_(v_TR, b.T, alpha=scale), v_TR


class _LoraLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        segments: Segments,
        scales: tuple[float, ...],
        chunk_tokens: int,
        *flat: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normaliser_T = hidden_TH.new_empty(hidden_TH.shape[0])
        logprobs_T = torch.empty_like(normaliser_T)
        entropy_T = torch.empty_like(normaliser_T)
        for chunk in _chunks(segments, chunk_tokens):
            rows = slice(chunk.start, chunk.end)
            a, b = pair_at(flat, chunk.slot)
            logits_TV, _ = _logits(hidden_TH[rows], weight_VH, a, b, scales[chunk.slot])
            normaliser = torch.logsumexp(logits_TV, dim=1)
            chosen = logits_TV.gather(1, targets_T[rows, None])[:, 0]
            normaliser_T[rows] = normaliser
            logprobs_T[rows] = chosen - normaliser
            log_p_TV = logits_TV.sub_(normaliser[:, None])
            entropy_T[rows] = -torch.linalg.vecdot(log_p_TV.exp(), log_p_TV)
        ctx.segments, ctx.scales, ctx.chunk_tokens = segments, scales, chunk_tokens
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, normaliser_T, *flat)
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        dlogprobs_T = grads[0]
        hidden_TH, weight_VH, targets_T, normaliser_T, *flat = ctx.saved_tensors
        dhidden_TH = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        dflat: list[torch.Tensor | None] = [None] * len(flat)
        for chunk in _chunks(ctx.segments, ctx.chunk_tokens):
            rows = slice(chunk.start, chunk.end)
            a, b = pair_at(flat, chunk.slot)
            scale = ctx.scales[chunk.slot]
            logits_TV, v_TR = _logits(hidden_TH[rows], weight_VH, a, b, scale)
            upstream = dlogprobs_T[rows, None]
            # d logprob / d logits = onehot(target) - softmax
            dlogits_TV = logits_TV.sub_(normaliser_T[rows, None]).exp_().mul_(-upstream)
            dlogits_TV.scatter_add_(1, targets_T[rows, None], upstream)
            if dhidden_TH is not None:
                torch.mm(dlogits_TV, weight_VH, out=dhidden_TH[rows])
            if a is None or b is None or v_TR is None:
                continue
            dv_TR = (dlogits_TV @ b).mul_(scale)
            if dhidden_TH is not None:
                dhidden_TH[rows].addmm_(dv_TR, a)
            da, db = dv_TR.T @ hidden_TH[rows], (dlogits_TV.T @ v_TR).mul_(scale)
            add_grads(dflat, chunk.slot, da, db)
        return (dhidden_TH, None, None, None, None, None, *dflat)
