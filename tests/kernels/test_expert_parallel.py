"""`moe_lora_parallel` in two processes against `moe_lora` in one."""

# Tensors carry their shape in capitals.
# ruff: noqa: N806, N815

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from river_kernels import NO_ADAPTER, LoraPair, Segment, Segments, moe_lora, moe_lora_parallel

SIZE = 2
EXPERTS, CHOSEN, HIDDEN, INNER = 6, 2, 32, 24
RANKS = (3, 2, 1)
SEGMENTS: tuple[Segments, ...] = (
    (Segment(0, 0, 4), Segment(NO_ADAPTER, 4, 7), Segment(1, 7, 40)),
    (Segment(2, 0, 1),),
)
"""Of each process; slots are counted through, tokens anew."""
TOGETHER: Segments = (*SEGMENTS[0], Segment(2, 40, 41))
TOKENS = (40, 1)


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of both processes, one behind the other, and the gradient of the output."""

    x_TH: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    pairs: tuple[list[LoraPair], list[LoraPair]]
    dy_TH: torch.Tensor


CASES = ("mixed", "one-sided", "shared")


def make_case(name: str) -> Case:
    """Fresh tensors, the same in every process; `one-sided` sends all tokens to the first process's experts.

    In `shared` the experts of the slots 0 and 2 share the outer factors.
    """
    generator = torch.Generator().manual_seed(5)
    tokens, within = sum(TOKENS), EXPERTS // SIZE if name == "one-sided" else EXPERTS

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def pair(rank: int, inputs: int, outputs: int) -> LoraPair:
        is_shared = name == "shared" and rank != RANKS[1]
        shares_a, shares_b = is_shared and inputs == HIDDEN, is_shared and outputs == HIDDEN
        a = normal(1 if shares_a else EXPERTS, rank, inputs)
        b = normal(1 if shares_b else EXPERTS, outputs, rank)
        grads = torch.zeros_like(a), torch.zeros_like(b)
        return LoraPair(a, b, 2.0 / rank, *grads, shares_a, shares_b)

    order = torch.rand(tokens, within, generator=generator).argsort(1)
    return Case(
        normal(tokens, HIDDEN).requires_grad_(),
        order[:, :CHOSEN].contiguous(),
        torch.rand(tokens, CHOSEN, generator=generator).requires_grad_(),
        normal(EXPERTS, 2 * INNER, HIDDEN),
        normal(EXPERTS, HIDDEN, INNER),
        ([pair(r, HIDDEN, 2 * INNER) for r in RANKS], [pair(r, INNER, HIDDEN) for r in RANKS]),
        normal(tokens, HIDDEN),
    )


def grads_of(case: Case) -> list[torch.Tensor]:
    grads = [grad for pairs in case.pairs for pair in pairs for grad in (pair.a_grad, pair.b_grad)]
    return [grad for grad in grads if grad is not None]


def run_process(rank: int, directory: Path) -> None:
    """Does every case in a group of processes; leaves what came out here."""
    dist.init_process_group(
        "gloo",
        init_method=(directory / "store").as_uri(),
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=60),
    )
    assert dist.group.WORLD is not None
    own = EXPERTS // SIZE
    experts = slice(rank * own, (rank + 1) * own)
    for name in CASES:
        case = make_case(name)
        x, chosen, weights, dy = (
            tensor.detach().split(TOKENS)[rank]
            for tensor in (case.x_TH, case.experts_TK, case.weights_TK, case.dy_TH)
        )
        x.requires_grad_()
        weights.requires_grad_()
        y = moe_lora_parallel(
            x,
            chosen,
            weights,
            case.gate_up[experts].clone(),
            case.down[experts].clone(),
            SEGMENTS[rank],
            *case.pairs,
            process_group=dist.group.WORLD,
        )
        y.backward(dy)
        torch.save((y.detach(), x.grad, weights.grad, grads_of(case)), directory / f"{name}_{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left their results."""
    directory = tmp_path_factory.mktemp("processes")
    spawn(run_process, (directory,), nprocs=SIZE)
    return directory


@pytest.mark.parametrize("name", CASES)
def test_divided_experts_compute_the_same_bits(directory: Path, name: str) -> None:
    """Outputs, input gradients, and the sum of the adapters' gradients, wherever the experts are; some have no row."""
    case = make_case(name)
    y_TH = moe_lora(
        case.x_TH,
        case.experts_TK,
        case.weights_TK,
        case.gate_up,
        case.down,
        TOGETHER,
        *case.pairs,
    )
    y_TH.backward(case.dy_TH)
    parts = [torch.load(directory / f"{name}_{rank}") for rank in range(SIZE)]
    expected = (y_TH.detach(), case.x_TH.grad, case.weights_TK.grad)
    for index, whole in enumerate(expected):
        assert whole is not None
        assert torch.equal(torch.cat([part[index] for part in parts]), whole)
    for whole, *shares in zip(grads_of(case), *(part[3] for part in parts), strict=True):
        assert whole.abs().sum() > 0
        assert torch.equal(torch.stack(shares).sum(0), whole)
        if len(whole) == 1:
            continue  # A shared factor's gradients arise where the tokens are.
        half = EXPERTS // SIZE
        assert not shares[0][half:].any(), "an expert's gradients arise where the expert is"
        assert not shares[1][:half].any()
