"""From logits to log-probabilities and entropy, and back from an upstream gradient to that of the logits.

A row of the vocabulary is one program's: it reads the logits once each way. Logits are float32, as the product that
makes them accumulates: in bfloat16 a logit of 16 would be off by up to 0.06 nats, more than sampler and trainer may
differ by.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from river_kernels.gpu.launch import launch

BLOCK = 4096
"""Logits that a program has in registers at a time."""

_WARPS = 8


def log_probabilities(
    logits_TV: torch.Tensor,
    targets_TK: torch.Tensor,
    normaliser_T: torch.Tensor,
    logprobs_TK: torch.Tensor,
    entropy_T: torch.Tensor,
) -> None:
    """Fills log-sum-exp, log-probabilities of the targets, and entropy, all float32, from float32 logits."""
    rows, targets = targets_TK.shape
    assert logits_TV.stride(1) == targets_TK.stride(1) == logprobs_TK.stride(1) == 1
    launch(
        lce_rows,
        (rows,),
        logits_TV,
        targets_TK,
        normaliser_T,
        logprobs_TK,
        entropy_T,
        logits_TV.shape[1],
        targets,
        logits_TV.stride(0),
        warps=_WARPS,
        BLOCK=BLOCK,
        TARGETS=triton.next_power_of_2(targets),
    )


def logit_gradients(
    logits_TV: torch.Tensor,
    targets_TK: torch.Tensor,
    normaliser_T: torch.Tensor,
    logprobs_TK: torch.Tensor,
    upstream_TK: torch.Tensor,
    dlogits_TV: torch.Tensor,
) -> None:
    """Fills the gradient of the logits; `dlogits_TV` may be the logits themselves, or in another precision."""
    rows, targets = targets_TK.shape
    launch(
        lce_gradient_rows,
        (rows,),
        logits_TV,
        targets_TK,
        normaliser_T,
        logprobs_TK,
        upstream_TK,
        dlogits_TV,
        logits_TV.shape[1],
        targets,
        logits_TV.stride(0),
        dlogits_TV.stride(0),
        warps=_WARPS,
        BLOCK=BLOCK,
        TARGETS=triton.next_power_of_2(targets),
    )


@triton.jit
def lce_rows(
    logits,
    targets,
    normaliser,
    logprobs,
    entropy,
    vocabulary,
    target_count,
    row_stride,
    BLOCK: tl.constexpr,
    TARGETS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Every lane keeps a maximum and two sums of its own until the end.

    With p = exp(z - m) / s, where m is the maximum and s the sum of exp(z - m), the entropy is
    log s - (sum of (z - m) exp(z - m)) / s, in which large logits do not cancel.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -1e38, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        z = tl.load(logits + row * row_stride + start + lanes, mask=inside, other=-1e38)
        higher = tl.maximum(highest, z)
        down = highest - higher
        shrunk = tl.exp(down)
        term = tl.where(inside, tl.exp(z - higher), 0.0)
        weighted = shrunk * (weighted + down * sums) + term * (z - higher)
        sums = shrunk * sums + term
        highest = higher
    top = tl.max(highest)
    down = highest - top
    shrunk = tl.exp(down)
    total = tl.sum(shrunk * sums)
    mean = tl.div_rn(tl.sum(shrunk * (weighted + down * sums)), total)
    log_total = tl.log(total)
    tl.store(normaliser + row, top + log_total)
    tl.store(entropy + row, log_total - mean)
    chosen = tl.arange(0, TARGETS)
    is_target = chosen < target_count
    target = tl.load(targets + row * target_count + chosen, mask=is_target, other=0)
    z = tl.load(logits + row * row_stride + target, mask=is_target, other=0.0)
    tl.store(logprobs + row * target_count + chosen, z - (top + log_total), mask=is_target)


@triton.jit
def lce_gradient_rows(
    logits,
    targets,
    normaliser,
    logprobs,
    upstream,
    dlogits,
    vocabulary,
    target_count,
    row_stride,
    gradient_stride,
    BLOCK: tl.constexpr,
    TARGETS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Dlogits = sum over targets k of upstream_k (onehot(target_k) - softmax).

    Sums over targets go from the first to the last, so that targets without a gradient behind them change no bit.
    """
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.arange(0, TARGETS)
    is_target = chosen < target_count
    target = tl.load(targets + row * target_count + chosen, mask=is_target, other=-1)
    total = 0.0
    on_target = tl.zeros((TARGETS,), tl.float32)
    for k in range(target_count):
        gradient = tl.load(upstream + row * target_count + k).to(tl.float32)
        total += gradient
        same = target == tl.load(targets + row * target_count + k)
        on_target += tl.where(same, gradient, 0.0)
    log_total = tl.load(normaliser + row)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        z = tl.load(logits + row * row_stride + start + lanes, mask=inside, other=0.0)
        softmax = tl.exp(z - log_total)
        tl.store(
            dlogits + row * gradient_stride + start + lanes,
            (-total * softmax).to(dlogits.dtype.element_ty),
            mask=inside,
        )
    tl.debug_barrier()  # what follows is written over what other threads have just written
    softmax = tl.exp(tl.load(logprobs + row * target_count + chosen, mask=is_target, other=0.0))
    tl.store(
        dlogits + row * gradient_stride + target,
        (on_target - total * softmax).to(dlogits.dtype.element_ty),
        mask=is_target,
    )
