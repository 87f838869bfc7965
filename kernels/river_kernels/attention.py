"""Causal attention over packed sequences that never look at each other.

Sequences are gathered into small batches of like length, padded on the right, where causal attention never looks: so no
mask is needed and the fused kernel runs. The padded length of a sequence is a function of its own length alone, so that
its result does not depend on the others in the batch.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

LENGTH_STEP = 16
"""Sequences are padded to a multiple of this; long ones to a multiple of an eighth of their power of two."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """`sequences` of one padded length, at rows `start` to `end` of the padded layout."""

    sequences: int
    length: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each token goes: `padded[p]` is the token at row p of the padded layout, `packed[t]` the row of token t."""

    padded: torch.Tensor
    packed: torch.Tensor
    buckets: tuple[Bucket, ...]


def make_packing(lengths: Sequence[int]) -> Packing:
    """The packing of sequences of these lengths that lie one after another."""
    starts = [0]
    for length in lengths:
        assert length > 0
        starts.append(starts[-1] + length)
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(_padded_length(length), []).append(index)

    padded: list[torch.Tensor] = []
    packed = torch.empty(starts[-1], dtype=torch.long)
    buckets: list[Bucket] = []
    row = 0
    for padded_length, members in sorted(by_length.items()):
        first = torch.tensor([starts[index] for index in members])
        count = torch.tensor([lengths[index] for index in members])
        offset = torch.arange(padded_length)
        # Padding repeats the last token: it must be some row, and nothing looks at it.
        token = first[:, None] + torch.minimum(offset, count[:, None] - 1)
        rows = row + torch.arange(len(members))[:, None] * padded_length + offset
        real = offset < count[:, None]
        packed[token[real]] = rows[real]
        padded.append(token.reshape(-1))
        end = row + token.numel()
        buckets.append(Bucket(len(members), padded_length, row, end))
        row = end
    return Packing(torch.cat(padded), packed, tuple(buckets))


def _padded_length(length: int) -> int:
    step = max(LENGTH_STEP, (1 << (length.bit_length() - 1)) // 8)
    return -(-length // step) * step


def packed_causal_attention(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    packing: Packing,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention of T packed tokens with H query heads over G key heads (H a multiple of G); [T, H, D]."""
    assert query_THD.shape[1] % key_TGD.shape[1] == 0
    padded = [_Pad.apply(tensor, packing) for tensor in (query_THD, key_TGD, value_TGD)]
    outputs: list[torch.Tensor] = []
    for bucket in packing.buckets:
        query, key, value = (
            tensor[bucket.start : bucket.end]
            .unflatten(0, (bucket.sequences, bucket.length))
            .transpose(1, 2)
            for tensor in padded
        )  # each (sequences, heads, length, head dim)
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return _Unpad.apply(torch.cat(outputs), packing)


class _Pad(torch.autograd.Function):
    """Packed rows into the padded layout. The padding's gradient is zero, so backward gathers instead of adding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return x[packing.padded]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return grads[0][ctx.packing.packed], None


class _Unpad(torch.autograd.Function):
    """Padded rows back into the packed layout."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return x[packing.packed]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        packing: Packing = ctx.packing
        padded = grads[0].new_zeros((packing.padded.numel(), *grads[0].shape[1:]))
        padded[packing.packed] = grads[0]
        return padded, None
