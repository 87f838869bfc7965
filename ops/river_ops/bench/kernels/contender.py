"""What takes part in the comparison, and ours."""

# Tensors carry their shape in capitals.
# ruff: noqa: N806

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch

from river_kernels import NO_ADAPTER, LoraPair, Segment, Segments, moe_lora
from river_ops.bench.kernels.workload import Adapter, Factors, Part, Workload


class AbsentError(Exception):
    """A peer cannot take part here; the message says why."""


class Contender(ABC):
    """One way of computing a workload. A step takes `parts` one after another, each forward and backward."""

    name: ClassVar[str]
    frozen: ClassVar[bool] = False
    """Whether it leaves the adapters out."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.parts: list[Part] = [workload.part()]

    @abstractmethod
    def forward(self, index: int) -> torch.Tensor:
        """The output of part `index`, [T, H], ready for a backward pass."""

    @abstractmethod
    def gradients(self) -> list[Factors]:
        """What has been added up for each adapter, unless it is `frozen`, in the shapes of the workload."""

    @abstractmethod
    def clear_factors(self) -> None:
        """Sets the gradients of the adapters to zero; their memory stays."""

    def clear_inputs(self) -> None:
        for part in self.parts:
            part.x_TH.grad = part.weights_TK.grad = None


def step(contender: Contender, mark: Callable[[], None] = lambda: None) -> None:
    """Forward and backward of every part; `mark` is called before, between and after the two."""
    contender.clear_inputs()
    for index, part in enumerate(contender.parts):
        mark()
        out_TH = contender.forward(index)
        mark()
        out_TH.backward(part.dout_TH)
        mark()


def gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def clear_gradients(*leaves: torch.Tensor) -> None:
    for leaf in leaves:
        if leaf.grad is not None:
            leaf.grad.zero_()


class River(Contender):
    """All adapters in one call of `moe_lora`."""

    name = "river"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        adapters = [_with_gradients(adapter) for adapter in workload.adapters]
        self._gate_up = [adapter.gate_up for adapter in adapters]
        self._down = [adapter.down for adapter in adapters]

    def forward(self, index: int) -> torch.Tensor:
        return self._through(index, self.workload.segments, self._gate_up, self._down)

    def _through(
        self, index: int, segments: Segments, gate_up: list[LoraPair], down: list[LoraPair]
    ) -> torch.Tensor:
        part, base = self.parts[index], self.workload.base
        return moe_lora(
            part.x_TH,
            part.experts_TK,
            part.weights_TK,
            base.gate_up,
            base.down,
            segments,
            gate_up,
            down,
        )

    def gradients(self) -> list[Factors]:
        return [
            Factors(*(grad for grad in (first.a_grad, first.b_grad, second.a_grad, second.b_grad)
                      if grad is not None))
            for first, second in zip(self._gate_up, self._down, strict=True)
        ]  # fmt: skip

    def clear_factors(self) -> None:
        for pair in (*self._gate_up, *self._down):
            for grad in (pair.a_grad, pair.b_grad):
                if grad is not None:
                    grad.zero_()


class RiverOneByOne(River):
    """Our own kernels, called for one adapter after another."""

    name = "one_by_one"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.parts = [workload.part(segment.start, segment.end) for segment in workload.segments]

    def forward(self, index: int) -> torch.Tensor:
        segments = (Segment(0, 0, self.parts[index].x_TH.shape[0]),)
        return self._through(index, segments, [self._gate_up[index]], [self._down[index]])


class FrozenRiver(Contender):
    """Our own kernels for tokens that have no adapter."""

    name = "frozen_river"
    frozen = True

    def forward(self, index: int) -> torch.Tensor:
        part, base = self.parts[index], self.workload.base
        return moe_lora(
            part.x_TH,
            part.experts_TK,
            part.weights_TK,
            base.gate_up,
            base.down,
            (Segment(NO_ADAPTER, 0, part.x_TH.shape[0]),),
            [],
            [],
        )

    def gradients(self) -> list[Factors]:
        return []

    def clear_factors(self) -> None:
        """There are none."""


def _with_gradients(adapter: Adapter) -> Adapter:
    def with_gradients(pair: LoraPair) -> LoraPair:
        a_grad, b_grad = (
            torch.zeros(factor.shape, dtype=torch.float32, device=factor.device)
            for factor in (pair.a, pair.b)
        )
        return replace(pair, a_grad=a_grad, b_grad=b_grad)

    return Adapter(with_gradients(adapter.gate_up), with_gradients(adapter.down))
