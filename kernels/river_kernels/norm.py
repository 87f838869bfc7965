"""Root mean square normalisation (Zhang and Sennrich, 2019) as one autograd function: each row by itself."""

# Tensors carry their shape in capitals.
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RmsNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, for a frozen weight."""

    def __init__(self, weight_H: torch.Tensor, eps: float) -> None:
        super().__init__()
        assert not weight_H.requires_grad, "the base model is frozen"
        self.weight, self.eps = weight_H, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RmsNorm.apply(x, self.weight, self.eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = wide * inverse_rms
        ctx.weight = weight_H
        ctx.save_for_backward(normal, inverse_rms)
        return (normal.to(x.dtype) * weight_H).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dy,) = grads
        normal, inverse_rms = ctx.saved_tensors
        dnormal = dy.float() * ctx.weight
        along = (dnormal * normal).mean(-1, keepdim=True)
        dx = dnormal.addcmul_(normal, along, value=-1.0).mul_(inverse_rms)
        return dx.to(dy.dtype), None, None
