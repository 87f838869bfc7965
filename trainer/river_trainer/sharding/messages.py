"""What rank 0 says to the others between batches."""

from __future__ import annotations

from dataclasses import dataclass

from river_trainer.protocol import AdapterShape, ComputeTask


@dataclass(frozen=True, slots=True)
class Idle:
    """Rank 0 is there, and has nothing to be done."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Rank 0 is about to end, and so shall everybody."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs to be computed: each a task and the place of its adapter among `shapes`, whose weights come next.

    `tokens_max` and `piece_tokens` are how rank 0 cuts them.
    """

    shapes: list[AdapterShape]
    jobs: list[tuple[int, ComputeTask]]
    tokens_max: int
    piece_tokens: int


Message = Idle | Stop | Batch
