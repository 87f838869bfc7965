"""Backward through the experts' activation, adapters included, in one pass over z and the gradient of h.

h is made again from z. What the experts' outputs were is not needed: the gradient of a row's router weight, <dout, y>,
is <dh, h> with the dh that is not yet weighted, because y is linear in h.
"""

# Tensors carry their shape in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from river_kernels.gpu.activation import expanded_gate_up
from river_kernels.gpu.configs import BACKWARD_BYTES, RANK_BLOCK, RANK_STEP, Alignment, block_of
from river_kernels.gpu.dequantize import rounded
from river_kernels.gpu.launch import dot, launch
from river_kernels.gpu.rows import EACH, factor_of, load_factor, rank_at, tile_at
from river_kernels.gpu.tables import A, AdapterTable, B, scale_of
from river_kernels.gpu.tiles import Tiles


def activate_backward(
    dh_PI: torch.Tensor,
    z_PF: torch.Tensor,
    v1: torch.Tensor,
    dv2: torch.Tensor,
    weight_P: torch.Tensor,
    permutation: torch.Tensor,
    dz_PF: torch.Tensor,
    weighted_h_PI: torch.Tensor,
    dv1_PR: torch.Tensor,
    dweights: torch.Tensor,
    gate_up: AdapterTable,
    down: AdapterTable,
    tiles: Tiles,
    *,
    alignment: Alignment,
    token: torch.Tensor | None,
) -> None:
    """Makes the gradients of z and what else the factors' gradients need.

    `dh_PI` [P, I] is the frozen experts' share of the gradient of h, not yet weighted by the router. Written are:

    * `dz_PF` [P, 2I], the gradient of z;
    * `weighted_h_PI` [P, I], h times the router's weight, for the gradient of A of down;
    * `dv1_PR` [P, rank_max], `dz B`, of adapters up to RANK_BLOCK, not scaled;
    * `dweights` [P], by pair and not by row, the gradients of the router's weights.

    `v1` and `dv2` are `x A^T` and `dout B` of each row, or of tokens with `token` int32 [P] of each row.
    """
    inner = dh_PI.shape[1]
    for tensor in (dh_PI, z_PF, dz_PF, weighted_h_PI):
        assert tensor.is_contiguous()
    launch(
        activation_gradients,
        (tiles.count,),
        dh_PI,
        z_PF,
        v1,
        dv2,
        weight_P,
        permutation,
        dz_PF,
        weighted_h_PI,
        dv1_PR,
        dweights,
        permutation if token is None else token,
        gate_up.rows,
        down.rows,
        tiles.rows,
        tiles.count,
        gate_up.slots,
        inner,
        v1.stride(0),
        dv2.stride(0),
        dv1_PR.stride(0),
        warps=4,
        stages=1,
        ALIGNED=alignment.value,
        MAPPED=token is not None,
        ROWS=tiles.block,
        WIDTH=block_of(inner, BACKWARD_BYTES, z_PF.dtype),
        RANKS=RANK_STEP,
        FUSED=RANK_BLOCK,
    )


@triton.jit
def activation_gradients(
    dh,  # [P, inner]
    z,  # [P, 2 * inner]
    v1,  # [., rank_max]
    dv2,  # [., rank_max]
    weight,  # [P]
    permutation,  # int32 [P]
    dz,  # [P, 2 * inner]
    weighted_h,  # [P, inner]
    dv1,  # [P, rank_max]
    dweights,  # [P]
    token,  # int32 [P], if MAPPED
    gate_up,
    down,
    tiles,
    tile_count,
    slots,
    inner,
    v1_stride,
    dv2_stride,
    dv1_stride,
    ALIGNED: tl.constexpr,
    MAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    FUSED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of rows, over the whole inner width."""
    slot, expert, start, end = tile_at(tiles, tile_count, tl.program_id(0))
    if start >= end:
        return
    rows = start + tl.arange(0, ROWS)
    inside = rows < end
    sources = tl.load(token + rows, mask=inside, other=0) if MAPPED else rows
    row_weight = tl.load(weight + rows, mask=inside, other=0.0).to(tl.float32)
    wide_rows = rows.to(tl.int64)[:, None] * inner
    rank = rank_at(gate_up, slots, slot, ALIGNED)
    b = factor_of(gate_up, slots, slot, expert, 2 * inner, rank, v1, B, EACH, ALIGNED)
    fused_ranks = tl.arange(0, FUSED)
    dv1_sums = tl.zeros((ROWS, FUSED), tl.float32)
    dweight = tl.zeros((ROWS,), tl.float32)
    for first in range(0, inner, WIDTH):
        places = first + tl.arange(0, WIDTH)
        mask = inside[:, None] & (places[None, :] < inner)
        gate_delta, up_delta = expanded_gate_up(
            v1, sources, inside, places, gate_up, slots, slot, expert, inner, v1_stride,
            ALIGNED, ROWS, WIDTH, RANKS, UPCAST,
        )  # fmt: skip
        at_z = 2 * wide_rows + places[None, :]
        gate = tl.load(z + at_z, mask=mask, other=0.0).to(tl.float32) + gate_delta
        up = tl.load(z + at_z + inner, mask=mask, other=0.0).to(tl.float32) + up_delta
        gradient = tl.load(dh + wide_rows + places[None, :], mask=mask, other=0.0).to(tl.float32)
        gradient += _expanded_inner(
            dv2, sources, inside, places, down, slots, slot, expert, inner, dv2_stride,
            ALIGNED, ROWS, WIDTH, RANKS, UPCAST,
        )  # fmt: skip
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        h = silu * up
        dweight += tl.sum(tl.where(mask, gradient * h, 0.0), axis=1)
        gradient *= row_weight[:, None]
        dgate = rounded(gradient * up * (sigmoid + silu * (1.0 - sigmoid)), dz, UPCAST)
        dup = rounded(gradient * silu, dz, UPCAST)
        tl.store(dz + at_z, dgate, mask=mask)
        tl.store(dz + at_z + inner, dup, mask=mask)
        tl.store(
            weighted_h + wide_rows + places[None, :],
            rounded(h * row_weight[:, None], weighted_h, UPCAST),
            mask=mask,
        )
        if rank <= FUSED:
            # What lies behind the gate's width is multiplied by zeros.
            gate_tile = load_factor(b, 2 * inner, rank, places, fused_ranks, B)
            up_tile = load_factor(b, 2 * inner, rank, inner + places, fused_ranks, B)
            dv1_sums = dot(dgate, gate_tile, dv1_sums, UPCAST)
            dv1_sums = dot(dup, up_tile, dv1_sums, UPCAST)
    pairs = tl.load(permutation + rows, mask=inside, other=0)
    tl.store(dweights + pairs, rounded(dweight, dweights, UPCAST), mask=inside)
    is_written = fused_ranks < tl.where(rank <= FUSED, rank, 0)
    tl.store(
        dv1 + rows.to(tl.int64)[:, None] * dv1_stride + fused_ranks[None, :],
        rounded(dv1_sums, dv1, UPCAST),
        mask=inside[:, None] & is_written[None, :],
    )


@triton.jit
def _expanded_inner(
    dv2,
    sources,
    inside,
    places,
    down,
    slots,
    slot,
    expert,
    inner,
    dv2_stride,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`scale * dv2 A` at `places`, float32 [ROWS, WIDTH]."""
    rank = rank_at(down, slots, slot, ALIGNED)
    factor = factor_of(down, slots, slot, expert, inner, rank, dv2, A, EACH, ALIGNED)
    dv2 += sources.to(tl.int64)[:, None] * dv2_stride
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        tile = tl.load(
            dv2 + ranks[None, :], mask=inside[:, None] & (ranks[None, :] < rank), other=0.0
        )
        factor_tile = load_factor(factor, inner, rank, places, ranks, A)
        sums = dot(tile, tl.trans(factor_tile), sums, UPCAST)
    return sums * scale_of(down, slots, slot)
