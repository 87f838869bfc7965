"""Mixture-of-experts with a LoRA adapter on every expert: adapters, experts and ranks mixed in one pass.

    x [T, H] --gather--> [P, H] --W1--> z [P, 2I] --activation, + A1/B1--> h [P, I] --W2--> y [P, H] --combine--> [T, H]

Factors of the model's width are applied to tokens where the experts share them (layout `shared_outer`: A1 before the
gather, B2 in `combine`), to rows where they do not (layout `per_expert`). Only z and rank-sized tensors are kept for
backward; h is made again from z, and y is never needed.

The frozen products are the library's. What an adapter adds or gets as a gradient has the same bits in any company, and
so has the rest if the library's products do.
"""

# Tensors carry their shape in capitals.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from river_kernels.frozen import frozen_product, joined
from river_kernels.gpu.activation import activate
from river_kernels.gpu.activation_backward import activate_backward
from river_kernels.gpu.combine import Expansion, combine
from river_kernels.gpu.configs import RANK_BLOCK, ROUTE_ROWS, TOKEN_ROWS, Alignment, alignment_of
from river_kernels.gpu.gram import group_gram, segment_gram
from river_kernels.gpu.route import RoutePlan, make_plan
from river_kernels.gpu.row_expand import expand_into_rows
from river_kernels.gpu.shrink import shrink
from river_kernels.gpu.tables import A, AdapterTable, B, adapter_table, check_precision
from river_kernels.gpu.tiles import Tiles, token_tiles
from river_kernels.quantized import FrozenWeight, dense_weight
from river_kernels.segments import Pairs, Segments

_NARROW_STEP = 16
"""Rank-sized rows are as long as a multiple of this, so that they begin where threads can move 16 bytes."""


@dataclass(frozen=True, slots=True)
class _Block:
    """The experts and adapters of one pass. `shared`: the layout is `shared_outer`."""

    plan: RoutePlan
    gate_up: FrozenWeight
    down: FrozenWeight
    first: AdapterTable
    second: AdapterTable
    shared: bool
    alignment: Alignment

    @property
    def token(self) -> torch.Tensor | None:
        """Where a row finds what `x A^T` and `dout B` are, if that is at its token."""
        return self.plan.token if self.shared else None

    def token_tiles(self, device: torch.device) -> Tiles:
        return token_tiles(
            self.plan.segments, slots=self.first.slots, block=TOKEN_ROWS, device=device
        )


def plan_moe(
    experts_TK: torch.Tensor, segments: Segments, *, experts: int, adapters: int
) -> RoutePlan:
    """The way of all pairs through the experts; `adapters` are the slots, without that of tokens that have none."""
    return make_plan(experts_TK, segments, experts=experts, slots=adapters + 1, block=ROUTE_ROWS)


def moe_lora(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: FrozenWeight,
    down: FrozenWeight,
    segments: Segments,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
    plan: RoutePlan | None = None,
) -> torch.Tensor:
    """As `river_kernels.moe_lora`, with one layout for all adapters of the pass; `plan` is that of an earlier pass."""
    if x_TH.shape[0] == 0:
        return x_TH.clone()
    shared = _is_shared(gate_up_pairs, down_pairs)
    for pairs in (gate_up_pairs, down_pairs):
        check_precision(pairs, x_TH)
    if plan is None:
        plan = plan_moe(experts_TK, segments, experts=gate_up.shape[0], adapters=len(gate_up_pairs))
    assert plan.segments == segments, "a plan is of the segments it was made for"
    first, second = (adapter_table(pairs, x_TH.device) for pairs in (gate_up_pairs, down_pairs))
    block = _Block(plan, gate_up, down, first, second, shared, alignment_of(first, second))
    return _MoeLora.apply(x_TH, weights_TK, block)


def _is_shared(gate_up_pairs: Pairs, down_pairs: Pairs) -> bool:
    layouts = {pair.shares_a for pair in gate_up_pairs if pair is not None}
    layouts |= {pair.shares_b for pair in down_pairs if pair is not None}
    assert len(layouts) <= 1, "adapters of both expert layouts in one pass"
    return layouts == {True}


def _through_experts(x_PI: torch.Tensor, weight_EOI: torch.Tensor, plan: RoutePlan) -> torch.Tensor:
    """Every row through its expert, [P, O]; the weight may be a transposed view."""
    if x_PI.is_meta:
        return x_PI.new_empty(x_PI.shape[0], weight_EOI.shape[1])
    if x_PI.is_cuda:
        return functional.grouped_mm(x_PI, weight_EOI.transpose(1, 2), offs=plan.offsets)
    # Here one can look, and keep every adapter's rows to themselves.
    experts, slots = weight_EOI.shape[0], plan.groups.slots
    sizes = (plan.groups.rows[3] - plan.groups.rows[2]).view(experts, slots)
    rows = x_PI.split_with_sizes(sizes.sum(1).tolist())
    return joined(
        [
            frozen_product(x, weight_OI, of_slots)
            for x, weight_OI, of_slots in zip(rows, weight_EOI, sizes.tolist(), strict=True)
            if len(x)
        ]
    )


def _narrow(
    rows: int, table: AdapterTable, like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Memory for what rows have in the ranks of their adapters."""
    width = -(-max(table.rank_max, 1) // _NARROW_STEP) * _NARROW_STEP
    return like.new_empty(rows, width, dtype=dtype)


class _MoeLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, block: _Block
    ) -> torch.Tensor:
        x_TH, weights_TK = x_TH.contiguous(), weights_TK.contiguous()
        plan = block.plan
        weight_P = weights_TK.view(-1).index_select(0, plan.permutation)
        z_PF = _through_experts(x_TH.index_select(0, plan.token), dense_weight(block.gate_up), plan)
        v1 = _shrink_inputs(x_TH, block)
        h_PI = z_PF.new_empty(plan.rows, z_PF.shape[1] // 2)
        activate(
            z_PF, v1, h_PI, block.first, plan.tiles, alignment=block.alignment, token=block.token
        )
        y_PH = _through_experts(h_PI, dense_weight(block.down), plan)
        out_TH = torch.empty_like(x_TH)
        v2 = _combine_outputs(y_PH, h_PI, weight_P, weights_TK, out_TH, block)
        ctx.block = block
        ctx.save_for_backward(x_TH, weight_P, z_PF, v1, v2)
        return out_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        block: _Block = ctx.block
        x_TH, weight_P, z_PF, v1, v2 = ctx.saved_tensors
        dh_PI, dv2 = _experts_backward(grads[0].contiguous(), v2, weight_P, block)
        dz_PF, dv1_PR, dweights_TK = _activation_backward(dh_PI, z_PF, v1, dv2, weight_P, block)
        del dh_PI
        dx_TH = _inputs_backward(dz_PF, dv1_PR, x_TH, block)
        return dx_TH, dweights_TK if ctx.needs_input_grad[1] else None, None


def _shrink_inputs(x_TH: torch.Tensor, block: _Block) -> torch.Tensor:
    """`x A1^T`, of tokens or of rows."""
    if block.shared:
        v1 = _narrow(x_TH.shape[0], block.first, x_TH)
        tiles = block.token_tiles(x_TH.device)
        shrink(x_TH, v1, block.first, tiles, A, shared=True, alignment=block.alignment)
        return v1
    plan = block.plan
    v1 = _narrow(plan.rows, block.first, x_TH)
    shrink(
        x_TH, v1, block.first, plan.tiles, A,
        shared=False, alignment=block.alignment, rows=plan.token,
    )  # fmt: skip
    return v1


def _combine_outputs(
    y_PH: torch.Tensor,
    h_PI: torch.Tensor,
    weight_P: torch.Tensor,
    weights_TK: torch.Tensor,
    out_TH: torch.Tensor,
    block: _Block,
) -> torch.Tensor:
    """Writes the outputs of tokens; `h A2^T` of rows, or of tokens the weighted sum of it."""
    plan, table, alignment = block.plan, block.second, block.alignment
    if block.shared:
        v2_PR = _narrow(plan.rows, table, h_PI, torch.float32)
        shrink(
            h_PI, v2_PR, table, plan.tiles, A, shared=False, alignment=alignment, weight=weight_P
        )
        v2_TR = _narrow(plan.tokens, table, h_PI)
        expansion = Expansion(v2_PR, v2_TR, table, B, alignment)
        combine(y_PH, out_TH, plan, weights_TK=weights_TK, expansion=expansion)
        return v2_TR
    v2_PR = _narrow(plan.rows, table, h_PI)
    shrink(h_PI, v2_PR, table, plan.tiles, A, shared=False, alignment=alignment)
    expand_into_rows(y_PH, v2_PR, table, plan.tiles, B, alignment=alignment)
    combine(y_PH, out_TH, plan, weights_TK=weights_TK)
    return v2_PR


def _experts_backward(
    dout_TH: torch.Tensor, v2: torch.Tensor, weight_P: torch.Tensor, block: _Block
) -> tuple[torch.Tensor, torch.Tensor]:
    """The frozen experts' share of the gradient of h, and `dout B2` of tokens or of rows; neither weighted.

    Adds to the gradients of B2.
    """
    plan, table, alignment = block.plan, block.second, block.alignment
    dout_PH = dout_TH.index_select(0, plan.token)
    dh_PI = _through_experts(dout_PH, dense_weight(block.down).transpose(1, 2), plan)
    if block.shared:
        dv2 = _narrow(plan.tokens, table, dout_TH)
        tiles = block.token_tiles(dout_TH.device)
        shrink(dout_TH, dv2, table, tiles, B, shared=True, alignment=alignment)
        segment_gram(dout_TH, v2, table, plan.segments, B, alignment=alignment)
    else:
        dv2 = _narrow(plan.rows, table, dout_TH)
        shrink(dout_PH, dv2, table, plan.tiles, B, shared=False, alignment=alignment)
        group_gram(dout_PH, v2, table, plan.groups, B, alignment=alignment, weight=weight_P)
    return dh_PI, dv2


def _activation_backward(
    dh_PI: torch.Tensor,
    z_PF: torch.Tensor,
    v1: torch.Tensor,
    dv2: torch.Tensor,
    weight_P: torch.Tensor,
    block: _Block,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of z, of `x A1^T` of rows, and of the router's weights; adds to those of B1 and A2."""
    plan, alignment, token = block.plan, block.alignment, block.token
    dz_PF, weighted_h_PI = torch.empty_like(z_PF), torch.empty_like(dh_PI)
    dv1_PR = _narrow(plan.rows, block.first, z_PF, torch.float32 if block.shared else None)
    dweights_TK = weight_P.new_empty(plan.tokens, plan.chosen)
    activate_backward(
        dh_PI, z_PF, v1, dv2, weight_P, plan.permutation, dz_PF, weighted_h_PI, dv1_PR,
        dweights_TK, block.first, block.second, plan.tiles, alignment=alignment, token=token,
    )  # fmt: skip
    if block.first.rank_max > RANK_BLOCK:
        shrink(
            dz_PF, dv1_PR, block.first, plan.tiles, B,
            shared=False, alignment=alignment, rank_min=RANK_BLOCK + 1,
        )  # fmt: skip
    for wide, narrow, table, factor in (
        (dz_PF, v1, block.first, B),
        (weighted_h_PI, dv2, block.second, A),
    ):
        group_gram(wide, narrow, table, plan.groups, factor, alignment=alignment, narrow_rows=token)
    return dz_PF, dv1_PR, dweights_TK


def _inputs_backward(
    dz_PF: torch.Tensor, dv1_PR: torch.Tensor, x_TH: torch.Tensor, block: _Block
) -> torch.Tensor:
    """The gradient of x, [T, H]; adds to the gradients of A1."""
    plan, table, alignment = block.plan, block.first, block.alignment
    dx_PH = _through_experts(dz_PF, dense_weight(block.gate_up).transpose(1, 2), plan)
    dx_TH = torch.empty_like(x_TH)
    if block.shared:
        dv1_TR = _narrow(plan.tokens, table, x_TH)
        combine(dx_PH, dx_TH, plan, expansion=Expansion(dv1_PR, dv1_TR, table, A, alignment))
        segment_gram(x_TH, dv1_TR, table, plan.segments, A, alignment=alignment)
    else:
        expand_into_rows(dx_PH, dv1_PR, table, plan.tiles, A, alignment=alignment)
        combine(dx_PH, dx_TH, plan)
        group_gram(x_TH, dv1_PR, table, plan.groups, A, alignment=alignment, wide_rows=plan.token)
    return dx_TH
