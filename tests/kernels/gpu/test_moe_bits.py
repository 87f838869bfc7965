"""The same work has the same bits, every time and in any company."""

from __future__ import annotations

import pytest
import torch
from support.moe_batches import Batch, Results, check_same_bits, make_batch, run

from river_kernels import NO_ADAPTER
from river_kernels.device import triton_on_cpu

LAYOUTS = pytest.mark.parametrize("shared", [True, False], ids=["shared_outer", "per_expert"])
TOKENS = [(0, 11), (NO_ADAPTER, 4), (1, 45), (2, 30)]
RANKS = (4, 40, 16)
EXPERTS, CHOSEN = 3, 2


def interpreted(batch: Batch) -> Results:
    with triton_on_cpu():
        return run(batch)


@LAYOUTS
def test_twice_the_same_bits(*, shared: bool) -> None:
    """Outputs and all gradients."""
    batch = make_batch(RANKS, TOKENS, shared=shared, experts=EXPERTS, chosen=CHOSEN)
    check_same_bits(interpreted(batch.cloned()), interpreted(batch.cloned()))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_and_mixed_the_same_bits(*, shared: bool, dtype: torch.dtype) -> None:
    """Each adapter gets what it would get alone: outputs, and gradients of everything."""
    batch = make_batch(RANKS, TOKENS, shared=shared, dtype=dtype, experts=EXPERTS, chosen=CHOSEN)
    mixed = interpreted(batch)
    for segment in batch.segments:
        if segment.slot == NO_ADAPTER:
            continue
        tokens = slice(segment.start, segment.end)
        # The gradients of A and B of gate and up come first, then those of down.
        first, second = 2 * segment.slot, 2 * (len(RANKS) + segment.slot)
        check_same_bits(
            interpreted(batch.only(segment.slot)),
            Results(
                mixed.out_TH[tokens],
                mixed.dx_TH[tokens],
                mixed.dweights_TK[tokens],
                (*mixed.factors[first : first + 2], *mixed.factors[second : second + 2]),
            ),
        )
