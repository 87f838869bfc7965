"""Rows through their experts, with each one's adapter: what `moe_lora` and `moe_lora_parallel` have in common (CPUs).

    x [P, H] --W1, + A1/B1--> z [P, 2I] --silu(gate) * up--> h [P, I] --W2, + A2/B2--> y [P, H]

Rows lie block by block (`rows.py`). The frozen products leave theirs by expert; they are put back into blocks where
there is an adapter to add or something to compute element by element. Gate and up have one A, as in PEFT's layout of a
fused parameter.

A factor that the experts share touches tokens and not rows. It is applied outside of here, where tokens are: `x A1^T`
of the rows comes in then, and `h A2^T` goes out beside y; backward the other way round. Both are scaled wherever they
appear, so that no product with B has to be.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from river_kernels.grouped import grouped_gram, grouped_product
from river_kernels.quantized import FrozenWeight, dense_weight
from river_kernels.rows import Block, ByBlock, Rows, Source
from river_kernels.segments import LoraPair, Pairs, Segments, check_segments, pair_at


@dataclass(frozen=True, slots=True)
class Experts:
    """The frozen experts, `gate_up` [E, 2I, H] and `down` [E, H, I], and the adapters on both by slot."""

    gate_up: FrozenWeight
    down: FrozenWeight
    gate_up_pairs: Pairs
    down_pairs: Pairs

    def check(self, x_TH: torch.Tensor, segments: Segments) -> None:
        """Asserts that segments and pairs fit the tokens, and that the experts are frozen."""
        slots = len(self.gate_up_pairs)
        assert len(self.down_pairs) == slots
        check_segments(segments, tokens=x_TH.shape[0], slots=slots)
        assert not self.gate_up.requires_grad, "the base model is frozen"
        assert not self.down.requires_grad, "the base model is frozen"
        for pair in self.gate_up_pairs:
            assert pair is None or not pair.shares_b, "B of gate and up differs between experts"
        for pair in self.down_pairs:
            assert pair is None or not pair.shares_a, "A of down differs between experts"


@dataclass(frozen=True, slots=True)
class Kept:
    """What the experts keep for their backward pass: h of all rows, the rest of each block."""

    h: torch.Tensor
    z: list[torch.Tensor]
    activated: list[torch.Tensor]
    v1: ByBlock
    v2: ByBlock

    def flat(self) -> list[torch.Tensor | None]:
        """For autograd to keep."""
        return [self.h, *self.z, *self.activated, *self.v1, *self.v2]

    @classmethod
    def from_flat(cls, flat: Sequence[Any], rows: Rows) -> Kept:
        h_PI, *others = flat
        count = len(rows.blocks)
        return cls(h_PI, *(others[part * count : (part + 1) * count] for part in range(4)))


def run_experts(
    x: Source, experts: Experts, rows: Rows, given_v1: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ByBlock, Kept]:
    """Every row through its expert and adapter; `scale * h A2^T` where B is shared, by block; what backward needs.

    `given_v1` has `scale * x A1^T` of the blocks whose pair shares A. A pair that shares B is not yet in the result.
    """
    z_PF = rows.product(x, dense_weight(experts.gate_up))
    h_PI = z_PF.new_empty(z_PF.shape[0], z_PF.shape[1] // 2)
    v1: ByBlock = []
    kept_z: list[torch.Tensor] = []
    kept_activated: list[torch.Tensor] = []
    # A block at a time, of which most stays in the cache.
    for block, given in zip(rows.blocks, given_v1, strict=True):
        pair = pair_at(experts.gate_up_pairs, block.slot)
        z = rows.of(z_PF, block)
        v = None if pair is None else given if pair.shares_a else _shrunk(x.of(block), pair, block)
        if pair is not None and v is not None:
            z.add_(_expanded(v, pair, block))
        v1.append(v)
        gate, up = z.chunk(2, dim=1)
        activated = functional.silu(gate)
        torch.mul(activated, up, out=_of(h_PI, block))
        kept_z.append(z)
        kept_activated.append(activated)
    y_PH, v2 = _run_down(h_PI, experts, rows)
    pairs = [pair_at(experts.down_pairs, block.slot) for block in rows.blocks]
    left = [v if pair and pair.shares_b else None for pair, v in zip(pairs, v2, strict=True)]
    return y_PH, left, Kept(h_PI, kept_z, kept_activated, v1, v2)


def _run_down(h_PI: torch.Tensor, experts: Experts, rows: Rows) -> tuple[torch.Tensor, ByBlock]:
    y_PH = rows.product(rows.source(h_PI), dense_weight(experts.down))
    v2: ByBlock = []
    for block in rows.blocks:
        pair = pair_at(experts.down_pairs, block.slot)
        v = None if pair is None else _shrunk(_of(h_PI, block), pair, block)
        if pair is not None and v is not None and not pair.shares_b:
            rows.add_of(y_PH, block, _expanded(v, pair, block))
        v2.append(v)
    return y_PH, v2


def run_experts_backward(
    dout: Source,
    weight_P: torch.Tensor,
    x: Source,
    kept: Kept,
    experts: Experts,
    rows: Rows,
    given_dv2: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, ByBlock]:
    """The gradients of the rows, of their router weights, [P], and of `x A1^T` / scale where A1 is shared.

    Adds the gradients of every A and B that is not shared to their buffers. `dout` is the gradient of each row's token,
    not yet weighted by the router's `weight_P`; nor is `given_dv2`, that of `h A2^T` of the blocks whose pair shares B.
    """
    dh_PI = rows.product(dout, dense_weight(experts.down).transpose(1, 2))
    dz_PF = dh_PI.new_empty(dh_PI.shape[0], 2 * dh_PI.shape[1])
    dweights: list[torch.Tensor] = []
    for index, block in enumerate(rows.blocks):
        pair = pair_at(experts.down_pairs, block.slot)
        v = kept.v2[index]
        weight = _of(weight_P, block)[:, None]
        dh, h = rows.of(dh_PI, block), _of(kept.h, block)
        if pair is not None and v is not None:
            dv = given_dv2[index]
            if not pair.shares_b:
                dv = _expanded_backward(dout.of(block), v * weight, pair, block)
                dv.mul_(pair.scale)
            assert dv is not None
            dh.add_(_shrunk_backward(dv, pair, block))
            _add_to_a(dv * weight, h, pair, block)
        dweights.append((dh * h).sum(1))
        dz = _of(dz_PF, block)
        _swiglu_backward(dh.mul_(weight), kept.z[index], kept.activated[index], dz)
    dx_PH, dv1 = _run_gate_up_backward(dz_PF, x, kept.v1, experts, rows)
    return dx_PH, torch.cat(dweights), dv1


def _run_gate_up_backward(
    dz_PF: torch.Tensor,
    x: Source,
    v1: Sequence[torch.Tensor | None],
    experts: Experts,
    rows: Rows,
) -> tuple[torch.Tensor, ByBlock]:
    dx_PH = rows.product(rows.source(dz_PF), dense_weight(experts.gate_up).transpose(1, 2))
    left: ByBlock = []
    for block, v in zip(rows.blocks, v1, strict=True):
        pair = pair_at(experts.gate_up_pairs, block.slot)
        if pair is None or v is None:
            left.append(None)
            continue
        dv = _expanded_backward(_of(dz_PF, block), v, pair, block)
        left.append(dv if pair.shares_a else None)
        if not pair.shares_a:
            dv.mul_(pair.scale)
            rows.add_of(dx_PH, block, _shrunk_backward(dv, pair, block))
            if pair.a_grad is not None:
                _add_to_a(dv, x.of(block), pair, block)
    return dx_PH, left


def _of(rows_PN: torch.Tensor, block: Block) -> torch.Tensor:
    return rows_PN[block.start : block.end]


def _shrunk(x_PI: torch.Tensor, pair: LoraPair, block: Block) -> torch.Tensor:
    """`scale * x A^T`."""
    a_EIR = block.of_experts(pair.a).transpose(1, 2)
    return grouped_product(x_PI, a_EIR, block).mul_(pair.scale)


def _expanded(v_PR: torch.Tensor, pair: LoraPair, block: Block) -> torch.Tensor:
    """`v B^T`."""
    return grouped_product(v_PR, block.of_experts(pair.b).transpose(1, 2), block)


def _expanded_backward(
    dy_PO: torch.Tensor, v_PR: torch.Tensor, pair: LoraPair, block: Block
) -> torch.Tensor:
    """`dy B`; adds `dy^T v` to the gradient of B."""
    if pair.b_grad is not None:
        block.add_to(pair.b_grad, _gram(dy_PO, v_PR, pair.b_grad.dtype, block))
    return grouped_product(dy_PO, block.of_experts(pair.b), block)


def _shrunk_backward(dv_PR: torch.Tensor, pair: LoraPair, block: Block) -> torch.Tensor:
    """`dv A`."""
    return grouped_product(dv_PR, block.of_experts(pair.a), block)


def _add_to_a(dv_PR: torch.Tensor, x_PI: torch.Tensor, pair: LoraPair, block: Block) -> None:
    """Adds `dv^T x` to the gradient of A."""
    if pair.a_grad is not None:
        block.add_to(pair.a_grad, _gram(dv_PR, x_PI, pair.a_grad.dtype, block))


def _gram(
    left_PO: torch.Tensor, right_PI: torch.Tensor, dtype: torch.dtype, block: Block
) -> torch.Tensor:
    """In the gradient's precision."""
    return grouped_gram(left_PO.to(dtype), right_PI.to(dtype), block)


def _swiglu_backward(
    dh_PI: torch.Tensor, z_PF: torch.Tensor, activated_PI: torch.Tensor, dz_PF: torch.Tensor
) -> None:
    """Writes the gradient of z for h = silu(gate) * up, from silu(gate)."""
    gate_PI, up_PI = z_PF.chunk(2, dim=1)
    dgate_PI, dup_PI = dz_PF.chunk(2, dim=1)
    torch.mul(dh_PI, activated_PI, out=dup_PI)
    torch.ops.aten.silu_backward.grad_input(dh_PI.mul_(up_PI), gate_PI, grad_input=dgate_PI)
