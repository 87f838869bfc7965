"""What every contender computes: one mixture of experts with adapters, forward and backward, on random numbers."""

# Tensors carry their shape in capitals.
# ruff: noqa: N806, N815

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from river_kernels import LoraPair, Segment, Segments

ExpertLayout = Literal["shared_outer", "per_expert"]
Routing = Literal["uniform", "zipf"]
ALPHA = 32.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The frozen block: width of the model, of an expert, and how many there are and are chosen."""

    hidden: int
    inner: int
    experts: int
    chosen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One place of the grid. Every adapter has as many tokens; `ranks` are theirs, one after another."""

    tokens: int
    adapters: int
    ranks: tuple[int, ...]
    layout: ExpertLayout
    routing: Routing = "uniform"

    @property
    def adapter_ranks(self) -> list[int]:
        return [self.ranks[index % len(self.ranks)] for index in range(self.adapters)]


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen experts: `gate_up` [E, 2I, H], `down` [E, H, I]."""

    sizes: Sizes
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter of the block; neither pair has anywhere to put gradients."""

    gate_up: LoraPair
    down: LoraPair

    @property
    def factors(self) -> Factors:
        return Factors(self.gate_up.a, self.gate_up.b, self.down.a, self.down.b)


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B of gate and up, then of down, or their gradients; in the shapes of `LoraPair`."""

    a1: torch.Tensor
    b1: torch.Tensor
    a2: torch.Tensor
    b2: torch.Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens that go through the block together; `x` and `weights` are leaves of autograd, `dout` comes back."""

    x_TH: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    dout_TH: torch.Tensor


@dataclass(frozen=True, slots=True)
class Workload:
    """A cell with its numbers. Segment i belongs to adapter i."""

    cell: Cell
    base: Base
    adapters: tuple[Adapter, ...]
    segments: Segments
    x_TH: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    dout_TH: torch.Tensor

    def part(self, start: int = 0, end: int | None = None) -> Part:
        """Tokens `start` to `end` (exclusive, all without it), with leaves of their own."""
        rows = slice(start, end)
        return Part(
            self.x_TH[rows].detach().clone().requires_grad_(),
            self.experts_TK[rows],
            self.weights_TK[rows].detach().clone().requires_grad_(),
            self.dout_TH[rows],
        )

    def double(self) -> Workload:
        """The same in float64."""
        adapters = tuple(
            Adapter(_double(adapter.gate_up), _double(adapter.down)) for adapter in self.adapters
        )
        base = replace(self.base, gate_up=self.base.gate_up.double(), down=self.base.down.double())
        return replace(
            self,
            base=base,
            adapters=adapters,
            x_TH=self.x_TH.double(),
            weights_TK=self.weights_TK.double(),
            dout_TH=self.dout_TH.double(),
        )


def make_base(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Base:
    """Random experts; the same every time on one kind of device."""
    torch.manual_seed(0)
    gate_up = _random(sizes.experts, 2 * sizes.inner, sizes.hidden, device=device, dtype=dtype)
    down = _random(sizes.experts, sizes.hidden, sizes.inner, device=device, dtype=dtype)
    return Base(sizes, gate_up, down)


def make_workload(cell: Cell, base: Base) -> Workload:
    """Random tokens, routing and adapters for `cell`, where `base` is."""
    torch.manual_seed(1)
    assert cell.tokens % cell.adapters == 0, "every adapter has as many tokens"
    share = cell.tokens // cell.adapters
    segments = tuple(
        Segment(index, index * share, (index + 1) * share) for index in range(cell.adapters)
    )
    device, dtype = base.gate_up.device, base.gate_up.dtype
    sizes = base.sizes
    scores_TK = torch.randn(cell.tokens, sizes.chosen, device=device)
    return Workload(
        cell,
        base,
        tuple(make_adapter(rank, cell.layout, base) for rank in cell.adapter_ranks),
        segments,
        torch.randn(cell.tokens, sizes.hidden, device=device, dtype=dtype),
        choose_experts(cell.tokens, sizes, cell.routing, device),
        scores_TK.softmax(1).to(dtype),
        torch.randn(cell.tokens, sizes.hidden, device=device, dtype=dtype),
    )


def make_adapter(rank: int, layout: ExpertLayout, base: Base) -> Adapter:
    """Random factors, A as large as at the start of training, B as after some of it."""
    sizes = base.sizes
    shares = layout == "shared_outer"
    outer = 1 if shares else sizes.experts
    device, dtype = base.gate_up.device, base.gate_up.dtype

    def factor(experts: int, rows: int, columns: int) -> torch.Tensor:
        return _random(experts, rows, columns, device=device, dtype=dtype)

    scale = ALPHA / rank
    gate_up = LoraPair(
        factor(outer, rank, sizes.hidden),
        factor(sizes.experts, 2 * sizes.inner, rank).mul_(0.1),
        scale,
        shares_a=shares,
    )
    down = LoraPair(
        factor(sizes.experts, rank, sizes.inner),
        factor(outer, sizes.hidden, rank).mul_(0.1),
        scale,
        shares_b=shares,
    )
    return Adapter(gate_up, down)


def choose_experts(
    tokens: int, sizes: Sizes, routing: Routing, device: torch.device
) -> torch.Tensor:
    """Different experts for every token, [T, K]; with `zipf` the n-th most popular one is wanted 1/n as often."""
    uniform_TE = torch.rand(tokens, sizes.experts, device=device)
    if routing == "zipf":
        # The largest of log p + Gumbel noise is a draw without replacement with odds p.
        order_E = torch.arange(1, sizes.experts + 1, device=device)
        uniform_TE = -(-uniform_TE.clamp_min(1e-20).log()).log() - order_E.log()
    return uniform_TE.topk(sizes.chosen, dim=1).indices


def lora_flops(cell: Cell, sizes: Sizes) -> float:
    """Multiplications and additions, counted singly, that all adapters add to a forward pass."""
    outer = 1 if cell.layout == "shared_outer" else sizes.chosen
    per_rank = 2 * outer * sizes.hidden + sizes.chosen * (2 * sizes.inner + sizes.inner)
    return 2.0 * cell.tokens / cell.adapters * per_rank * sum(cell.adapter_ranks)


def base_flops(cell: Cell, sizes: Sizes) -> float:
    """Those of the frozen experts; a backward pass has as many."""
    return 2.0 * cell.tokens * sizes.chosen * 3 * sizes.hidden * sizes.inner


def _random(
    experts: int, rows: int, columns: int, *, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Of a size that keeps products of unit rows at unit size."""
    return torch.randn(experts, rows, columns, device=device, dtype=dtype).mul_(columns**-0.5)


def _double(pair: LoraPair) -> LoraPair:
    return replace(pair, a=pair.a.double(), b=pair.b.double())


def cells_of(
    tokens: Sequence[int],
    adapters: Sequence[int],
    ranks: Sequence[tuple[int, ...]],
    layouts: Sequence[ExpertLayout],
    routings: Sequence[Routing],
) -> list[Cell]:
    """The grid, with a single adapter only where all have one rank."""
    return [
        Cell(tokens=count, adapters=many, ranks=rank, layout=layout, routing=routing)
        for routing in routings
        for rank in ranks
        for layout in layouts
        for count in tokens
        for many in adapters
        if many > 1 or len(rank) == 1
    ]
