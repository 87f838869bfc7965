"""AdamW (Loshchilov and Hutter, 2019) for many runs at once, each with hyper-parameters of its own, and their norms.

A run's tensors are flat: whatever an adapter consists of, a step over all of it is one pass over memory.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from river_kernels.device import uses_triton


@dataclass(frozen=True, slots=True)
class AdamRule:
    """What may differ from step to step; `eps` has to be at least the smallest normal float32."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class AdamUpdate:
    """One run's update, the `step`-th from one; all tensors are float32 [N] but for `copy`.

    `gradient` is multiplied by `multiplier` first, and zero afterwards. `copy` takes the new weights in the precision
    that they are computed with; None where that is float32.
    """

    weights: torch.Tensor
    gradient: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    step: int
    rule: AdamRule
    multiplier: float = 1.0
    copy: torch.Tensor | None = None


@torch.no_grad()
def gradient_norms(gradients: Sequence[torch.Tensor]) -> list[float]:
    """The Euclidean norm of each flat float32 gradient; of finite elements it is finite. Waits for the device."""
    if not gradients:
        return []
    if uses_triton(gradients[0]):
        from river_kernels.gpu.adam import norms  # noqa: PLC0415  # CPUs need no Triton

        return norms(gradients).tolist()
    return [_norm(gradient) for gradient in gradients]


@torch.no_grad()
def multi_adam(updates: Sequence[AdamUpdate]) -> None:
    """Does all `updates` in place, as `torch.optim.AdamW` would."""
    if not updates:
        return
    for update in updates:
        _check(update)
    if uses_triton(updates[0].weights):
        from river_kernels.gpu.adam import step_all  # noqa: PLC0415  # CPUs need no Triton

        step_all(updates)
        return
    by_rule: dict[AdamRule, list[AdamUpdate]] = defaultdict(list)
    for update in updates:
        if update.multiplier != 1.0:
            update.gradient.mul_(update.multiplier)
        by_rule[update.rule].append(update)
    for rule, group in by_rule.items():
        _fused(rule, group)
    for update in updates:
        update.gradient.zero_()
        if update.copy is not None:
            update.copy.copy_(update.weights)


def _check(update: AdamUpdate) -> None:
    assert update.step >= 1
    for tensor in (update.weights, update.gradient, update.first, update.second):
        assert tensor.dtype is torch.float32
        assert tensor.shape == update.weights.shape
        assert tensor.ndim == 1
        assert tensor.is_contiguous()
    if update.copy is not None:
        assert update.copy.shape == update.weights.shape
        assert update.copy.is_contiguous()


def _norm(gradient: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(gradient))
    if not math.isfinite(norm):  # the squares may have left the range of float32
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return norm


def _fused(rule: AdamRule, updates: Sequence[AdamUpdate]) -> None:
    """One multi-tensor update; the step counts may differ."""
    torch.ops.aten._fused_adamw_(  # what torch.optim.AdamW(fused=True) calls
        [update.weights for update in updates],
        [update.gradient for update in updates],
        [update.first for update in updates],
        [update.second for update in updates],
        [],
        [torch.tensor(float(update.step)) for update in updates],
        lr=rule.lr,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=rule.weight_decay,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
    )
