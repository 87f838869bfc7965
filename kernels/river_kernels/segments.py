"""How the tokens of a packed batch are divided between adapters, and what an adapter does at one place of the model.

    tokens   0 ........ 40 ...... 70 ............ 128
    segment  slot 0     slot 2    NO_ADAPTER

Tokens are laid out adapter by adapter, so that an adapter's share of any per-token matrix is one slice and needs no
permutation. What a segment gets has the same bits whoever else is in the batch: its adapter's products are its own, and
the frozen ones are shared only where that cannot change a bit (`frozen.py`).

Adapters are no inputs of autograd. A backward pass adds each segment's gradient, in the order of the segments, to the
buffers that its `LoraPair` names: many steps and many requests add up without allocating anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

NO_ADAPTER = -1

Pair = TypeVar("Pair")


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `end` (exclusive) belong to the adapter in `slot`, or to none (`NO_ADAPTER`)."""

    slot: int
    start: int
    end: int


Segments = tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One adapter at one place: the update is `scale * B (A x)`.

    Dense layers have `a` [r, in] and `b` [out, r]; experts have `a` [E, r, in] and `b` [E, out, r]. A factor that all
    experts share (`shares_a`, `shares_b`) is stored once, with one in the place of E. Backward adds the gradients to
    `a_grad` and `b_grad`, of the same shapes; None where nobody wants them.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    a_grad: torch.Tensor | None = None
    b_grad: torch.Tensor | None = None
    shares_a: bool = False
    shares_b: bool = False

    @property
    def rank(self) -> int:
        return self.b.shape[-1]


Pairs = Sequence[LoraPair | None]
"""By slot, what each adapter does at one place; None where it does nothing."""


def check_segments(segments: Segments, *, tokens: int, slots: int) -> None:
    """Asserts that `segments` cover `tokens` tokens without a gap and name existing slots."""
    position = 0
    for segment in segments:
        assert segment.start == position, f"segment starts at {segment.start}, not at {position}"
        assert segment.end >= segment.start
        assert NO_ADAPTER <= segment.slot < slots, f"slot {segment.slot} of {slots}"
        position = segment.end
    assert position == tokens, f"segments cover {position} of {tokens} tokens"


def sizes_of(segments: Segments) -> list[int]:
    """The tokens of each segment."""
    return [segment.end - segment.start for segment in segments]


def pair_at(pairs: Sequence[Pair | None], slot: int) -> Pair | None:
    """What is in `slot`, None if the slot is `NO_ADAPTER` or has nothing here."""
    return None if slot == NO_ADAPTER else pairs[slot]


def add_product(
    grad: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0
) -> None:
    """Adds `scale * left @ right` to a gradient, if anybody wants it; in the gradient's precision."""
    if grad is not None:
        grad.addmm_(left.to(grad.dtype), right.to(grad.dtype), alpha=scale)
