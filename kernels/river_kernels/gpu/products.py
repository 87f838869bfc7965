"""Products with frozen weights: the matrix library's, but of shapes that depend on nobody else in the batch.

The library chooses its program, and so how it rounds, by the shapes it sees. Whatever is multiplied for several
adapters at once is therefore cut into blocks of one height, the last one filled up.
"""

from __future__ import annotations

import torch

ROWS = 1024
"""Rows of every shared product."""


def float_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """`out = left @ right` in float32, whatever the precision of the factors."""
    assert out.dtype is torch.float32
    if left.is_cuda and left.dtype is not torch.float32:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def shared_product(x_TI: torch.Tensor, weight_IO: torch.Tensor, out_TO: torch.Tensor) -> None:
    """`out = x @ weight`, every row with the bits it would have among any others."""
    tokens = x_TI.shape[0]
    whole = tokens - tokens % ROWS
    for start in range(0, whole, ROWS):
        torch.mm(x_TI[start : start + ROWS], weight_IO, out=out_TO[start : start + ROWS])
    if whole == tokens:
        return
    filled_RI = x_TI.new_zeros(ROWS, x_TI.shape[1])
    filled_RI[: tokens - whole] = x_TI[whole:]
    out_TO[whole:] = torch.mm(filled_RI, weight_IO)[: tokens - whole]
