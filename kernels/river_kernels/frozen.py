"""Products with the frozen weights of the base model, where nearly all arithmetic of a step is."""

# Tensors carry their shape in capitals.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROWS_MIN = 16
"""With fewer rows oneDNN's preparations cost more than they save."""

_linear = (
    torch.ops.mkldnn._linear_pointwise  # noqa: SLF001  # as torch's own compiler calls it
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


def frozen_product(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """`x W^T`, [T, O], outside of autograd. `weight_OI` may be a transposed view.

    In float32 on CPUs it is oneDNN's, in full precision: the library behind `torch.mm` does without the wide vectors of
    processors that are not its maker's. Which path is taken depends on nothing but T, device and dtype.
    """
    if (
        _linear is not None
        and x_TI.shape[0] >= _ROWS_MIN
        and x_TI.is_cpu
        and x_TI.dtype is weight_OI.dtype is torch.float32
    ):
        return _linear(x_TI, weight_OI, None, "none", [], "")
    return x_TI @ weight_OI.T


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all `parts` as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
