"""Peers by autograd alone: experts one after another, and in each one adapters one after another.

`Loop` is what everybody writes first. `SortedLoop` is as good as such a loop gets: rows are sorted once, gathered once
and added up once, every expert has one product for all of its rows, and parameters are cut before they are used, since
a slice of a parameter gets a gradient as large as the whole. In float64 it is what all contenders have to agree with.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from river_ops.bench.kernels.contender import Contender, clear_gradients, gradient_of
from river_ops.bench.kernels.workload import Factors, Workload


@dataclass(frozen=True, slots=True)
class _Factor:
    """A and B of one adapter at one projection, for every expert."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    scale: float


class SortedLoop(Contender):
    """One expert, then one adapter, after another, over sorted rows."""

    name = "sorted_loop"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._factors = [
            Factors(_leaf(f.a1), _leaf(f.b1), _leaf(f.a2), _leaf(f.b2))
            for f in (adapter.factors for adapter in workload.adapters)
        ]
        lengths = torch.tensor([segment.end - segment.start for segment in workload.segments])
        adapters = torch.arange(len(workload.segments))
        self._adapter_T = torch.repeat_interleave(adapters, lengths).to(workload.x_TH.device)

    def forward(self, index: int) -> torch.Tensor:
        part, workload = self.parts[index], self.workload
        experts, adapters = workload.base.sizes.experts, len(workload.adapters)
        chosen = part.experts_TK.shape[1]
        key_P = (part.experts_TK * adapters + self._adapter_T[:, None]).reshape(-1)
        order_P = torch.argsort(key_P, stable=True)
        token_P = order_P // chosen
        sizes = torch.bincount(key_P, minlength=experts * adapters).view(experts, adapters).tolist()
        x_PH = part.x_TH.index_select(0, token_P)
        y_PH = torch.cat(self._through_experts(x_PH, sizes))
        weight_P = part.weights_TK.reshape(-1)[order_P]
        return torch.zeros_like(part.x_TH).index_add(0, token_P, y_PH * weight_P[:, None])

    def _through_experts(self, x_PH: torch.Tensor, sizes: list[list[int]]) -> list[torch.Tensor]:
        base = self.workload.base
        first, second = self._cut()
        outputs: list[torch.Tensor] = []
        rows = x_PH.split([sum(of_adapters) for of_adapters in sizes])
        for expert, (x, of_adapters) in enumerate(zip(rows, sizes, strict=True)):
            if len(x):
                z_RF = _project(x, base.gate_up[expert], expert, of_adapters, first)
                gate_RI, up_RI = z_RF.chunk(2, dim=1)
                h_RI = functional.silu(gate_RI) * up_RI
                outputs.append(_project(h_RI, base.down[expert], expert, of_adapters, second))
        return outputs

    def _cut(self) -> tuple[list[_Factor], list[_Factor]]:
        experts = self.workload.base.sizes.experts

        def cut(factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return factor.unbind() if len(factor) == experts else (factor[0],) * experts

        adapters = list(zip(self.workload.adapters, self._factors, strict=True))
        return (
            [_Factor(cut(f.a1), cut(f.b1), adapter.gate_up.scale) for adapter, f in adapters],
            [_Factor(cut(f.a2), cut(f.b2), adapter.down.scale) for adapter, f in adapters],
        )

    def gradients(self) -> list[Factors]:
        return [
            Factors(gradient_of(f.a1), gradient_of(f.b1), gradient_of(f.a2), gradient_of(f.b2))
            for f in self._factors
        ]

    def clear_factors(self) -> None:
        for f in self._factors:
            clear_gradients(f.a1, f.b1, f.a2, f.b2)


class FrozenLoop(SortedLoop):
    """The experts alone."""

    name = "frozen_loop"
    frozen = True

    def _cut(self) -> tuple[list[_Factor], list[_Factor]]:
        return [], []

    def gradients(self) -> list[Factors]:
        return []


class Loop(SortedLoop):
    """One expert, then one adapter, after another, each with its own gather, products and scattered addition."""

    name = "loop"

    def forward(self, index: int) -> torch.Tensor:
        part, base = self.parts[index], self.workload.base
        out_TH = torch.zeros_like(part.x_TH)
        for expert in range(base.sizes.experts):
            token, choice = torch.where(part.experts_TK == expert)
            adapter_R = self._adapter_T[token]
            for number, adapter in enumerate(self.workload.adapters):
                mine = torch.where(adapter_R == number)[0]
                if not len(mine):
                    continue
                rows, f = token[mine], self._factors[number]
                first = _Factor(*_of_expert(expert, f.a1, f.b1), adapter.gate_up.scale)
                second = _Factor(*_of_expert(expert, f.a2, f.b2), adapter.down.scale)
                x_RH = part.x_TH[rows]
                gate_RI, up_RI = _project(
                    x_RH, base.gate_up[expert], 0, [len(rows)], [first]
                ).chunk(2, dim=1)
                h_RI = functional.silu(gate_RI) * up_RI
                y_RH = _project(h_RI, base.down[expert], 0, [len(rows)], [second])
                weight_R = part.weights_TK[rows, choice[mine]]
                out_TH.index_add_(0, rows, y_RH * weight_R[:, None])
        return out_TH


def _of_expert(
    expert: int, *factors: torch.Tensor
) -> tuple[tuple[torch.Tensor], tuple[torch.Tensor]]:
    a, b = (factor[0 if len(factor) == 1 else expert] for factor in factors)
    return (a,), (b,)


def _project(
    x_RI: torch.Tensor,
    weight_OI: torch.Tensor,
    expert: int,
    sizes: list[int],
    factors: list[_Factor],
) -> torch.Tensor:
    y_RO = functional.linear(x_RI, weight_OI)
    if not factors:
        return y_RO
    deltas = [
        functional.linear(functional.linear(x, factor.a[expert]), factor.b[expert]) * factor.scale
        for factor, x in zip(factors, x_RI.split(sizes), strict=True)
        if len(x)
    ]
    return y_RO + torch.cat(deltas)


def _leaf(factor: torch.Tensor) -> torch.Tensor:
    return factor.detach().clone().requires_grad_()
