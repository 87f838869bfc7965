"""Routed batches for tests of single kernels of the mixture, and what each row's adapter is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from support.moe_batches import Batch

from river_kernels import NO_ADAPTER, LoraPair
from river_kernels.gpu.configs import Alignment, alignment_of
from river_kernels.gpu.moe import plan_moe
from river_kernels.gpu.route import RoutePlan
from river_kernels.gpu.tables import AdapterTable, adapter_table

RANKS = (1, 3, 4, 8, 16, 64, 128)
TOKENS = [(4, 9), (0, 2), (NO_ADAPTER, 3), (6, 5), (1, 4), (2, 0), (5, 6), (3, 7)]


@dataclass(frozen=True)
class Routed:
    """A batch with its plan and tables."""

    batch: Batch
    plan: RoutePlan
    gate_up: AdapterTable
    down: AdapterTable
    alignment: Alignment

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Of every row in order: its number, its slot, -1 if it has no adapter, and its expert."""
        slots = self.plan.groups.slots
        for slot, expert, start, end in self.plan.groups.rows.T.tolist():
            for row in range(start, end):
                yield row, NO_ADAPTER if slot == slots - 1 else slot, expert

    def tokens(self) -> Iterator[tuple[int, int]]:
        """Every token and its slot."""
        for segment in self.batch.segments:
            for token in range(segment.start, segment.end):
                yield token, segment.slot


def routed(batch: Batch) -> Routed:
    """`batch` with all that its kernels are started with."""
    experts = batch.gate_up.shape[0]
    plan = plan_moe(
        batch.experts_TK, batch.segments, experts=experts, adapters=len(batch.gate_up_pairs)
    )
    gate_up, down = (
        adapter_table(pairs, torch.device("cpu"))
        for pairs in (batch.gate_up_pairs, batch.down_pairs)
    )
    return Routed(batch, plan, gate_up, down, alignment_of(gate_up, down))


def factors_of(pair: LoraPair, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of an expert, in float64."""
    return (
        pair.a[0 if pair.shares_a else expert].double(),
        pair.b[0 if pair.shares_b else expert].double(),
    )
