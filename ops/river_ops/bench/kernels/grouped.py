"""Peers made of torch's grouped products alone: the frozen experts, and split LoRA over groups of (expert, adapter).

Split LoRA is what finished trainers run on a GPU today: beside each frozen product two small ones, whose result is
scaled and added. One stack holds the factors of all adapters, padded to the largest rank and ready in the order of the
groups: that it has to be made is left out, in the peer's favour.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from river_ops.bench.kernels.contender import Contender, clear_gradients, gradient_of
from river_ops.bench.kernels.workload import Factors, Workload

GROUPS_MAX = 1023
"""More groups a grouped product refuses on GPUs."""


@dataclass(frozen=True, slots=True)
class Sorted:
    """Rows sorted by expert and adapter: `order` of the pairs, `token` of each row, ends of experts and of groups."""

    order: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    expert_ends: torch.Tensor
    group_ends: torch.Tensor


class FrozenGrouped(Contender):
    """The experts alone."""

    name = "frozen_grouped"
    frozen = True

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        slots = torch.arange(len(workload.segments), device=workload.x_TH.device)
        share = workload.cell.tokens // workload.cell.adapters
        self.adapter_T = slots.repeat_interleave(share, output_size=workload.cell.tokens)

    def sorted(self, index: int) -> Sorted:
        experts_TK = self.parts[index].experts_TK
        adapters, experts = len(self.workload.segments), self.workload.base.sizes.experts
        key_P = (experts_TK * adapters + self.adapter_T[:, None]).reshape(-1)
        sorted_P, order = torch.sort(key_P, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        ends = torch.arange(1, experts * adapters + 1, device=order.device)
        group_ends = torch.searchsorted(sorted_P, ends, out_int32=True)
        token = order // experts_TK.shape[1]
        return Sorted(
            order, inverse, token, group_ends[adapters - 1 :: adapters].contiguous(), group_ends
        )

    def forward(self, index: int) -> torch.Tensor:
        part, base = self.parts[index], self.workload.base
        rows = self.sorted(index)
        x_PH = part.x_TH.index_select(0, rows.token)
        z_PF = grouped_product(x_PH, base.gate_up, rows.expert_ends)
        gate_PI, up_PI = z_PF.chunk(2, dim=1)
        y_PH = grouped_product(functional.silu(gate_PI) * up_PI, base.down, rows.expert_ends)
        return weighted_sum(y_PH, part.weights_TK, rows)

    def gradients(self) -> list[Factors]:
        return []

    def clear_factors(self) -> None:
        """There are none."""


class SplitLora(FrozenGrouped):
    """All adapters in grouped products over (expert, adapter)."""

    name = "split_lora"
    frozen = False

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.stacks = stack_factors(workload)

    def forward(self, index: int) -> torch.Tensor:
        part, base = self.parts[index], self.workload.base
        rows, stacks = self.sorted(index), self.stacks
        x_PH = part.x_TH.index_select(0, rows.token)
        shared = self.workload.cell.layout == "shared_outer"
        if shared:
            v1_PR = grouped_product(part.x_TH, stacks.a1, self._token_ends()).index_select(
                0, rows.token
            )
        else:
            v1_PR = grouped_product(x_PH, stacks.a1, rows.group_ends)
        z_PF = grouped_product(x_PH, base.gate_up, rows.expert_ends)
        z_PF = z_PF + grouped_product(v1_PR, stacks.b1, rows.group_ends)
        gate_PI, up_PI = z_PF.chunk(2, dim=1)
        h_PI = functional.silu(gate_PI) * up_PI
        y_PH = grouped_product(h_PI, base.down, rows.expert_ends)
        v2_PR = grouped_product(h_PI, stacks.a2, rows.group_ends)
        if not shared:
            y_PH = y_PH + grouped_product(v2_PR, stacks.b2, rows.group_ends)
            return weighted_sum(y_PH, part.weights_TK, rows)
        u_TR = weighted_sum(v2_PR, part.weights_TK, rows)
        out_TH = weighted_sum(y_PH, part.weights_TK, rows)
        return out_TH + grouped_product(u_TR, stacks.b2, self._token_ends())

    def _token_ends(self) -> torch.Tensor:
        share = self.workload.cell.tokens // self.workload.cell.adapters
        ends = range(share, self.workload.cell.tokens + 1, share)
        return torch.tensor(ends, dtype=torch.int32).to(self.adapter_T.device, non_blocking=True)

    def gradients(self) -> list[Factors]:
        stacks = self.stacks
        return unstacked(
            self.workload,
            Factors(
                *(gradient_of(stack) for stack in (stacks.a1, stacks.b1, stacks.a2, stacks.b2))
            ),
        )

    def clear_factors(self) -> None:
        stacks = self.stacks
        clear_gradients(stacks.a1, stacks.b1, stacks.a2, stacks.b2)


def grouped_product(
    x_PI: torch.Tensor,
    weight_GOI: torch.Tensor,
    ends_G: torch.Tensor,
    groups_max: int = GROUPS_MAX,
) -> torch.Tensor:
    """`x W^T` of each group with its own matrix, [P, O]."""
    groups = weight_GOI.shape[0]
    if groups <= groups_max:
        return functional.grouped_mm(x_PI, weight_GOI.transpose(1, 2), offs=ends_G)
    # The host has to know where the blocks of groups begin.
    ends = [*ends_G[groups_max - 1 :: groups_max].tolist(), x_PI.shape[0]]
    starts = [0, *ends[:-1]]
    rows = x_PI.split([end - start for start, end in zip(starts, ends, strict=True)])
    blocks = zip(starts, rows, weight_GOI.split(groups_max), ends_G.split(groups_max), strict=False)
    products = [
        functional.grouped_mm(x, weights.transpose(1, 2), offs=ends_of_block - start)
        for start, x, weights, ends_of_block in blocks
    ]
    return torch.cat(products)


def weighted_sum(y_PH: torch.Tensor, weights_TK: torch.Tensor, rows: Sorted) -> torch.Tensor:
    """Rows by token, [T, H], each times its router's weight."""
    weight_P = weights_TK.reshape(-1)[rows.order]
    weighted_PH = (y_PH * weight_P[:, None]).index_select(0, rows.inverse)
    return weighted_PH.view(*weights_TK.shape, y_PH.shape[1]).sum(1)


def stack_factors(workload: Workload) -> Factors:
    """One leaf for each factor, [groups, rows, columns], padded to the largest rank; B with its scale in it.

    Groups are (expert, adapter), or adapters where experts share the factor.
    """
    rank = max(workload.cell.adapter_ranks)

    def stacked(name: str, dimension: int) -> torch.Tensor:
        padded: list[torch.Tensor] = []
        for adapter in workload.adapters:
            factor = getattr(adapter.factors, name)
            missing = rank - factor.shape[dimension]
            padding = (0, missing) if dimension == 2 else (0, 0, 0, missing)  # noqa: PLR2004
            scale = adapter.gate_up.scale if dimension == 2 else 1.0  # noqa: PLR2004
            padded.append(functional.pad(factor, padding) * scale)
        return torch.stack(padded, dim=1).flatten(0, 1).requires_grad_()

    return Factors(stacked("a1", 1), stacked("b1", 2), stacked("a2", 1), stacked("b2", 2))


def unstacked(workload: Workload, grads: Factors) -> list[Factors]:
    """The gradients of each adapter's factors, from those of the stacks."""
    adapters = len(workload.adapters)

    def own(stack: torch.Tensor, factor: torch.Tensor, index: int, scale: float) -> torch.Tensor:
        of_adapter = stack.unflatten(0, (-1, adapters))[:, index]
        return of_adapter[:, : factor.shape[1], : factor.shape[2]] * scale

    found: list[Factors] = []
    for index, adapter in enumerate(workload.adapters):
        f, scale = adapter.factors, adapter.gate_up.scale
        found.append(
            Factors(
                own(grads.a1, f.a1, index, 1.0),
                own(grads.b1, f.b1, index, scale),
                own(grads.a2, f.a2, index, 1.0),
                own(grads.b2, f.b2, index, scale),
            )
        )
    return found
