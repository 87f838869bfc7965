"""Causal attention over packed sequences that never look at each other.

Sequences are gathered into small batches of like length, padded on the right, where causal attention never looks. The
padded length of a sequence is a function of its own length alone, so that its result does not depend on the others in
the batch. On CPUs short sequences keep their attention weights, which is faster than the fused kernel that computes
them again; long ones go through it. There attention is computed in float32; a device computes it in the precision of
its inputs.
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

KEPT_LENGTH_MAX = 512
"""Sequences up to this padded length keep their attention weights, [heads, length, length], for the backward pass."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """`sequences` of one padded length, at rows `start` to `end` of the padded layout."""

    sequences: int
    length: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each token goes: `padded[p]` is the token at row p of the padded layout, `packed[t]` the row of token t.

    `identical` says that both layouts are the same: no sequence needs padding, and none has to move.
    """

    padded: torch.Tensor
    packed: torch.Tensor
    buckets: tuple[Bucket, ...]
    identical: bool = False


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
    rows_of_tokens = torch.cat(padded)
    identical = torch.equal(rows_of_tokens, torch.arange(starts[-1]))
    return Packing(rows_of_tokens, packed, tuple(buckets), identical)


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
    """Attention of T packed tokens with H query heads over G key heads (H a multiple of G); [T, H, D].

    `packing` is on the device of the tensors.
    """
    assert query_THD.shape[1] % key_TGD.shape[1] == 0
    is_cpu, dtype = query_THD.is_cpu, query_THD.dtype
    sizes = [bucket.end - bucket.start for bucket in packing.buckets]
    padded = [
        _Pad.apply(tensor.float() if is_cpu else tensor, packing).split(sizes)
        for tensor in (query_THD, key_TGD, value_TGD)
    ]
    outputs: list[torch.Tensor] = []
    for bucket, *rows in zip(packing.buckets, *padded, strict=True):
        query, key, value = (
            tensor.unflatten(0, (bucket.sequences, bucket.length)) for tensor in rows
        )  # each (sequences, length, heads, head dim)
        if is_cpu and bucket.length <= KEPT_LENGTH_MAX:
            attended = _KeptAttention.apply(query, key, value, scale)
        else:
            attended = functional.scaled_dot_product_attention(
                *(tensor.transpose(1, 2) for tensor in (query, key, value)),
                is_causal=True,
                scale=scale,
                enable_gqa=True,
            ).transpose(1, 2)
        outputs.append(attended.flatten(0, 1))
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _Unpad.apply(together, packing).to(dtype)


class _KeptAttention(torch.autograd.Function):
    """Causal attention that keeps its weights. Query heads of one key head are rows of one matrix product."""

    @staticmethod
    def forward(
        ctx: Any,
        query_SLHD: torch.Tensor,
        key_SLGD: torch.Tensor,
        value_SLGD: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        length, heads = query_SLHD.shape[1:3]
        groups = key_SLGD.shape[2]
        query = _by_key_head(query_SLHD, groups) * scale  # (S * G, H / G * L, D)
        key, value = (_by_key_head(tensor, groups) for tensor in (key_SLGD, value_SLGD))
        scores = torch.bmm(query, key.transpose(1, 2))
        later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1)
        scores.view(-1, length, length).masked_fill_(later, -torch.inf)
        weights = scores.softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.heads = scale, heads
        return _by_token(torch.bmm(weights, value), query_SLHD.shape[0], length, heads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, weights = ctx.saved_tensors
        sequences, length, heads = grads[0].shape[:3]
        groups = key.shape[0] // sequences
        dout = _by_key_head(grads[0], groups)
        dvalue = torch.bmm(weights.transpose(1, 2), dout)
        dweights = torch.bmm(dout, value.transpose(1, 2))
        along = (dweights * weights).sum(-1, keepdim=True)
        dscores = dweights.sub_(along).mul_(weights)
        dquery = torch.bmm(dscores, key).mul_(ctx.scale)
        dkey = torch.bmm(dscores.transpose(1, 2), query)
        return (
            _by_token(dquery, sequences, length, heads),
            _by_token(dkey, sequences, length, groups),
            _by_token(dvalue, sequences, length, groups),
            None,
        )


def _by_key_head(x_SLHD: torch.Tensor, groups: int) -> torch.Tensor:
    """(S, L, H, D) as (S * G, H / G * L, D): the heads that share a key head one below the other."""
    sequences, length, heads, size = x_SLHD.shape
    grouped = x_SLHD.reshape(sequences, length, groups, heads // groups, size)
    return grouped.permute(0, 2, 3, 1, 4).reshape(sequences * groups, -1, size)


def _by_token(x: torch.Tensor, sequences: int, length: int, heads: int) -> torch.Tensor:
    """The inverse of `_by_key_head`, (S, L, H, D)."""
    return x.view(sequences, heads, length, -1).transpose(1, 2)


class _Pad(torch.autograd.Function):
    """Packed rows into the padded layout. The padding's gradient is zero, so backward gathers instead of adding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return x.view_as(x) if packing.identical else x.index_select(0, packing.padded)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        packing: Packing = ctx.packing
        if packing.identical:
            return grads[0], None
        return grads[0].index_select(0, packing.packed), None


class _Unpad(torch.autograd.Function):
    """Padded rows back into the packed layout."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return x.view_as(x) if packing.identical else x.index_select(0, packing.packed)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        packing: Packing = ctx.packing
        if packing.identical:
            return grads[0], None
        padded = grads[0].new_zeros((packing.padded.numel(), *grads[0].shape[1:]))
        padded[packing.packed] = grads[0]
        return padded, None
