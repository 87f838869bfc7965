"""Products with the frozen weights of the base model, where nearly all arithmetic of a step is."""

# Tensors carry their shape in capitals.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROWS_MIN = 16
"""With fewer rows oneDNN's preparations cost more than they save."""

_ROWS_STEPS = 8
"""oneDNN makes a program for every number of rows. Rounded up by at most an eighth, there are few of them."""

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
    rows = x_TI.shape[0]
    if (
        _linear is not None
        and rows >= _ROWS_MIN
        and x_TI.is_cpu
        and x_TI.dtype is weight_OI.dtype is torch.float32
    ):
        return _linear(_with_rows(x_TI, _rounded(rows)), weight_OI, None, "none", [], "")[:rows]
    return x_TI @ weight_OI.T


def _rounded(rows: int) -> int:
    """A multiple of an eighth of the power of two below `rows`, at least `rows`."""
    step = max(_ROWS_STEPS, (1 << (rows.bit_length() - 1)) // _ROWS_STEPS)
    return -(-rows // step) * step


def _with_rows(x_TI: torch.Tensor, rows: int) -> torch.Tensor:
    """`x_TI` and whatever comes after it, [rows, I]; what is computed of the rows behind is thrown away."""
    if rows == x_TI.shape[0]:
        return x_TI
    stride, width = x_TI.stride(0), x_TI.shape[1]
    end = x_TI.storage_offset() + (rows - 1) * stride + width
    if x_TI.stride(1) == 1 and end * x_TI.element_size() <= x_TI.untyped_storage().nbytes():
        # The rows that follow in memory will do: a row's product depends on no other row.
        return x_TI.as_strided((rows, width), (stride, 1))
    padded = x_TI.new_zeros(rows, width)
    padded[: x_TI.shape[0]] = x_TI
    return padded


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all `parts` as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
