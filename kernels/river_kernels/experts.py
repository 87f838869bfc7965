"""Rows through their experts, with each one's adapter: what `moe_lora` and `moe_lora_parallel` have in common (CPUs).

    x [P, H] --W1, + A1/B1--> z [P, 2I] --silu(gate) * up--> h [P, I] --W2, + A2/B2--> y [P, H]

Rows lie group by group (expert, segment). Each group is a part of its own (`frozen_product`); groups of one expert that
lie together are one product with the frozen weights. Gate and up have one A, as in PEFT's layout of a fused parameter.

A factor that the experts share touches tokens and not rows. It is applied outside of here, where tokens are: `x A1^T`
of the rows comes in then, and `h A2^T` goes out beside y; backward the other way round.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from river_kernels.frozen import frozen_product, joined
from river_kernels.quantized import FrozenWeight, dense_weight
from river_kernels.segments import (
    LoraPair,
    Pairs,
    Segments,
    add_product,
    check_segments,
    pair_at,
)


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive rows: one expert, one segment."""

    slot: int
    expert: int


@dataclass(frozen=True, slots=True)
class Grouped:
    """Rows that lie group by group; `sizes` are the rows of each."""

    groups: tuple[Group, ...]
    sizes: list[int]

    def product(self, x_PI: torch.Tensor, weights_OI: Sequence[torch.Tensor]) -> torch.Tensor:
        """Every row times the frozen matrix of its expert, [P, O]."""
        outputs: list[torch.Tensor] = []
        start = 0
        sized = zip(self.groups, self.sizes, strict=True)
        for expert, run in itertools.groupby(sized, lambda item: item[0].expert):
            sizes = [size for _, size in run]
            end = start + sum(sizes)
            outputs.append(frozen_product(x_PI[start:end], weights_OI[expert], sizes))
            start = end
        return joined(outputs)


ByGroup = list[torch.Tensor | None]
"""For each group a tensor [rows, r], or None."""

Kept = list[torch.Tensor | None]
"""What the experts keep for their backward pass."""


def check_experts(
    x_TH: torch.Tensor,
    gate_up: FrozenWeight,
    down: FrozenWeight,
    segments: Segments,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
) -> None:
    """Asserts that segments and pairs fit the tokens, and that the experts are frozen."""
    slots = len(gate_up_pairs)
    assert len(down_pairs) == slots
    check_segments(segments, tokens=x_TH.shape[0], slots=slots)
    assert not gate_up.requires_grad, "the base model is frozen"
    assert not down.requires_grad, "the base model is frozen"
    for pair in gate_up_pairs:
        assert pair is None or not pair.shares_b, "B of gate and up differs from expert to expert"
    for pair in down_pairs:
        assert pair is None or not pair.shares_a, "A of down differs from expert to expert"


def run_experts(
    x_PH: torch.Tensor,
    gate_up: FrozenWeight,
    down: FrozenWeight,
    grouped: Grouped,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
    given_v1: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, ByGroup, Kept]:
    """Every row through its expert and adapter, [P, H]; `h A2^T` where B is shared, by group; what backward needs.

    `given_v1` has `x A1^T` of the groups whose pair shares A. A pair that shares B is not yet in y.
    """
    z_PF, v1 = _project(x_PH, gate_up, grouped, gate_up_pairs, given_v1)
    gate_PI, up_PI = z_PF.chunk(2, dim=1)
    activated_PI = functional.silu(gate_PI)
    h_PI = activated_PI * up_PI
    y_PH, v2 = _project(h_PI, down, grouped, down_pairs)
    pairs = [pair_at(down_pairs, group.slot) for group in grouped.groups]
    left = [v if pair and pair.shares_b else None for pair, v in zip(pairs, v2, strict=True)]
    return y_PH, left, [x_PH, z_PF, activated_PI, h_PI, *v1, *v2]


def run_experts_backward(
    dout_PH: torch.Tensor,
    weight_P: torch.Tensor,
    kept: Sequence[torch.Tensor | None],
    gate_up: FrozenWeight,
    down: FrozenWeight,
    grouped: Grouped,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
    given_dv2: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, ByGroup]:
    """The gradients of the rows, [P, H], of their router weights, [P], and of `x A1^T` where A1 is shared.

    Adds the gradients of every A and B that is not shared to their buffers. `dout_PH` is the gradient of each row's
    token, not yet weighted by the router's `weight_P`; nor is `given_dv2`, `dout B2` of the groups whose pair shares B.
    """
    x_PH, z_PF, activated_PI, h_PI, *shrunk = kept
    assert x_PH is not None
    assert z_PF is not None
    assert activated_PI is not None
    assert h_PI is not None
    v1, v2 = shrunk[: len(grouped.groups)], shrunk[len(grouped.groups) :]
    dh_PI, _ = _project_backward(dout_PH, h_PI, down, grouped, down_pairs, v2, weight_P, given_dv2)
    dweight_P = (dh_PI * h_PI).sum(1)
    dz_PF = _swiglu_backward(dh_PI.mul_(weight_P[:, None]), z_PF, activated_PI)
    dx_PH, dv1 = _project_backward(dz_PF, x_PH, gate_up, grouped, gate_up_pairs, v1)
    return dx_PH, dweight_P, dv1


def sum_over_chosen(y_PH: torch.Tensor, inverse: torch.Tensor, chosen: int) -> torch.Tensor:
    """Rows of the sorted pairs summed by token, [T, H], always in the same order."""
    return y_PH.index_select(0, inverse).view(-1, chosen, y_PH.shape[1]).sum(1)


def _project(
    x_PI: torch.Tensor,
    weight_EOI: FrozenWeight,
    grouped: Grouped,
    pairs: Pairs,
    given: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, ByGroup]:
    """Every row through its expert and, unless B is shared, its adapter, [P, O]; `x A^T` of every group, [rows, r]."""
    y_PO = grouped.product(x_PI, dense_weight(weight_EOI).unbind())
    adapters = [None if pair is None else _transposed(pair) for pair in pairs]
    shrunk: ByGroup = []
    given = given or [None] * len(grouped.groups)
    rows = (tensor.split_with_sizes(grouped.sizes) for tensor in (x_PI, y_PO))
    for group, given_v, x, y in zip(grouped.groups, given, *rows, strict=True):
        adapter = pair_at(adapters, group.slot)
        if adapter is None:
            shrunk.append(None)
            continue
        v = given_v if adapter.a is None else x @ adapter.a[group.expert]
        assert v is not None
        if adapter.b is not None:
            y.addmm_(v, adapter.b[group.expert], alpha=adapter.scale)
        shrunk.append(v)
    return y_PO, shrunk


def _project_backward(
    dy_PO: torch.Tensor,
    x_PI: torch.Tensor,
    weight_EOI: FrozenWeight,
    grouped: Grouped,
    pairs: Pairs,
    shrunk: Sequence[torch.Tensor | None],
    row_weight_P: torch.Tensor | None = None,
    given: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, ByGroup]:
    """The gradient of `x_PI`, [P, I], and that of `x A^T` of the groups whose A is shared, without its scale.

    Adds the gradients of A and B that are not shared to their buffers. With `row_weight_P` they are those of
    `row_weight * dy`, while that of x stays unweighted.
    """
    weights_IO = dense_weight(weight_EOI).transpose(1, 2).unbind()
    dx_PI = grouped.product(dy_PO, weights_IO)
    left: ByGroup = []
    adapters = [None if pair is None else _by_expert(pair) for pair in pairs]
    nothing = [None] * len(grouped.groups)
    row_weights = (
        nothing if row_weight_P is None else row_weight_P[:, None].split_with_sizes(grouped.sizes)
    )
    rows = (tensor.split_with_sizes(grouped.sizes) for tensor in (dy_PO, x_PI, dx_PI))
    columns = zip(grouped.groups, shrunk, row_weights, given or nothing, *rows, strict=True)
    for group, v, weight, given_dv, dy, x, dx in columns:
        expert = group.expert
        adapter = pair_at(adapters, group.slot)
        if adapter is None or v is None:
            left.append(None)
            continue
        dv = given_dv if adapter.b is None else dy @ adapter.b[expert]
        assert dv is not None
        left.append(dv if adapter.a is None else None)
        if adapter.a is not None:
            dx.addmm_(dv, adapter.a[expert], alpha=adapter.scale)
        if adapter.a_grad is not None:
            weighted = dv if weight is None else dv * weight
            add_product(adapter.a_grad[expert], weighted.T, x, adapter.scale)
        if adapter.b_grad is not None:
            weighted = v if weight is None else v * weight
            add_product(adapter.b_grad[expert], dy.T, weighted, adapter.scale)
    return dx_PI, left


Cut = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Experts:
    """A `LoraPair` cut into its experts; None in the place of what they share."""

    a: Cut | None
    b: Cut | None
    scale: float
    a_grad: Cut | None = None
    b_grad: Cut | None = None


def _transposed(pair: LoraPair) -> _Experts:
    return _Experts(
        None if pair.shares_a else pair.a.transpose(1, 2).unbind(),
        None if pair.shares_b else pair.b.transpose(1, 2).unbind(),
        pair.scale,
    )


def _by_expert(pair: LoraPair) -> _Experts:
    def cut(tensor: torch.Tensor | None, *, shared: bool) -> Cut | None:
        return None if shared or tensor is None else tensor.unbind()

    return _Experts(
        cut(pair.a, shared=pair.shares_a),
        cut(pair.b, shared=pair.shares_b),
        pair.scale,
        cut(pair.a_grad, shared=pair.shares_a),
        cut(pair.b_grad, shared=pair.shares_b),
    )


def _swiglu_backward(
    dh_PI: torch.Tensor, z_PF: torch.Tensor, activated_PI: torch.Tensor
) -> torch.Tensor:
    """The gradient of z for h = silu(gate) * up, [P, 2I], from silu(gate)."""
    gate_PI, up_PI = z_PF.chunk(2, dim=1)
    dz_PF = torch.empty_like(z_PF)
    dgate_PI, dup_PI = dz_PF.chunk(2, dim=1)
    torch.mul(dh_PI, activated_PI, out=dup_PI)
    dgate_PI.copy_(torch.ops.aten.silu_backward(dh_PI * up_PI, gate_PI))
    return dz_PF
