"""How the tokens of a packed batch are divided between adapters, and what an adapter does at one place of the model.

    tokens   0 ........ 40 ...... 70 ............ 128
    segment  slot 0     slot 2    NO_ADAPTER

Tokens are laid out adapter by adapter, so that an adapter's share of any per-token matrix is one slice and needs no
permutation. Segments are computed one by one: what an adapter gets never depends on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_ADAPTER = -1


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

    Dense layers have `a` [r, in] and `b` [out, r]; experts have `a` [E, r, in] and `b` [E, out, r].
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def check_segments(segments: Segments, *, tokens: int, slots: int) -> None:
    """Asserts that `segments` cover `tokens` tokens without a gap and name existing slots."""
    position = 0
    for segment in segments:
        assert segment.start == position, f"segment starts at {segment.start}, not at {position}"
        assert segment.end >= segment.start
        assert NO_ADAPTER <= segment.slot < slots, f"slot {segment.slot} of {slots}"
        position = segment.end
    assert position == tokens, f"segments cover {position} of {tokens} tokens"


def flatten_pairs(pairs: Sequence[LoraPair | None]) -> list[torch.Tensor | None]:
    """A and B of every slot one after the other, as autograd functions take them; None where a slot has none."""
    flat: list[torch.Tensor | None] = []
    for pair in pairs:
        flat += [None, None] if pair is None else [pair.a, pair.b]
    return flat


def scales_of(pairs: Sequence[LoraPair | None]) -> tuple[float, ...]:
    return tuple(0.0 if pair is None else pair.scale for pair in pairs)
