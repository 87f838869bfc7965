"""Rotary position embedding (Su et al., 2021) in halves, as one autograd function."""

# Tensors carry their shape in capitals.
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import torch


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """`x * cos + (-x2, x1) * sin`, where x1 and x2 are the halves of the last dimension; [T, H, D]."""
    return _Rotate.apply(x_THD, cos_TD[:, None], sin_TD[:, None])


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1.0)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dy,) = grads
        cos, sin = ctx.saved_tensors
        half = dy.shape[-1] // 2
        dx = dy * cos
        dx[..., :half].addcmul_(dy[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1.0)
        return dx, None, None
