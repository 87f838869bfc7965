"""Products of a block's rows with a matrix for each expert, and of two such matrices with each other.

Torch goes through the groups of a grouped product one after another, with a product for each: what a group gets depends
on its own rows. It asks for rows of whole 16 bytes. Ranks such as 1 and 3 have none, and are multiplied group by group
out of Python.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803

from __future__ import annotations

import torch
from torch.nn import functional

from river_kernels.rows import Block

_ALIGNED_BYTES = 16
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_product(x_PI: torch.Tensor, factor_EIO: torch.Tensor, block: Block) -> torch.Tensor:
    """Every row of `block` times what `factor` has for its expert, [p, O]."""
    if _is_aligned(x_PI) and _is_aligned(factor_EIO):
        return functional.grouped_mm(x_PI, factor_EIO, offs=block.ends)
    parts = zip(x_PI.split_with_sizes(block.sizes), factor_EIO.unbind(), strict=True)
    return torch.cat([part_PI @ factor_IO for part_PI, factor_IO in parts])


def grouped_gram(left_PO: torch.Tensor, right_PI: torch.Tensor, block: Block) -> torch.Tensor:
    """The sum over an expert's rows of `left` times `right`, [E, O, I]."""
    if _is_aligned(left_PO) and _is_aligned(right_PI):
        return functional.grouped_mm(left_PO.T, right_PI, offs=block.ends)
    rows = (tensor.split_with_sizes(block.sizes) for tensor in (left_PO, right_PI))
    return torch.stack([left.T @ right for left, right in zip(*rows, strict=True)])


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a grouped product takes it: next to one dense dimension, steps are whole 16 bytes."""
    *_, outer, inner = tensor.stride()
    step = outer if inner == 1 else inner
    return step * tensor.element_size() % _ALIGNED_BYTES == 0 and tensor.dtype in _GROUPED_DTYPES
