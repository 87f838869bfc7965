"""How jobs are cut into pieces, pieces dealt to lanes, and put together into passes.

Each job is one operation's data on one adapter. Everything here that has an order is decided by the job alone, so that
what it gets does not depend on its company (`passes.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from river_trainer.adapter import Adapter, FlatTensors
from river_trainer.losses import Loss
from river_trainer.packing import TrainingSequence
from river_trainer.protocol import ComputeTask, ExpertLayout
from river_trainer.routing import Flips


@dataclass(frozen=True, slots=True)
class Job:
    """`sequences` through `loss` on `adapter`; a gradient if `backward`, the sampler's experts if `replay`.

    `task` is what it was made from.
    """

    adapter: Adapter
    sequences: Sequence[TrainingSequence]
    loss: Loss
    backward: bool
    replay: bool = False
    task: ComputeTask | None = None

    @property
    def tokens(self) -> int:
        return sum(sequence.tokens for sequence in self.sequences)


@dataclass(slots=True)
class Piece:
    """Some consecutive sequences of a job, and what came out of them."""

    sequences: list[TrainingSequence]
    logprobs: list[torch.Tensor] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict[str, float])
    flips: Flips = field(default_factory=Flips)

    @property
    def tokens(self) -> int:
        return sum(sequence.tokens for sequence in self.sequences)


@dataclass(slots=True)
class Strand:
    """Consecutive pieces of one job. `gradient` is there from the first backward pass on."""

    job: Job
    pieces: list[Piece]
    gradient: FlatTensors | None = None

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


Part = tuple[Strand, Piece]
"""One segment of a pass."""


# ---- Cutting and dealing -----------------------------------------------------------------------------


def cut(job: Job, tokens_max: int) -> Iterator[Piece]:
    """Whole groups of sequences that belong together, as many as fit."""
    piece = Piece([])
    size = job.loss.sequences_per_group
    for start in range(0, len(job.sequences), size):
        group = Piece(list(job.sequences[start : start + size]))
        if piece.sequences and piece.tokens + group.tokens > tokens_max:
            yield piece
            piece = Piece([])
        piece.sequences += group.sequences
    assert piece.sequences, "a job has data"
    yield piece


def shares_of(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """`pieces`, in their order, in at most `count` runs of about as many tokens."""
    total = sum(piece.tokens for piece in pieces)
    shares: list[list[Piece]] = [[] for _ in range(count)]
    before = 0
    for piece in pieces:
        middle = before + piece.tokens / 2
        shares[min(int(middle * count / total), count - 1)].append(piece)
        before += piece.tokens
    return [share for share in shares if share]


def deal(strands: Sequence[Strand], count: int) -> list[list[Strand]]:
    """`strands` to `count` lanes, the longest first to whoever has least; in each lane in their first order."""
    loads = [0] * count
    lane_of: dict[int, int] = {}
    by_tokens = sorted(range(len(strands)), key=lambda index: -strands[index].tokens)
    for index in by_tokens:
        lane = loads.index(min(loads))
        lane_of[index] = lane
        loads[lane] += strands[index].tokens
    lanes: list[list[Strand]] = [[] for _ in range(count)]
    for index, strand in enumerate(strands):
        lanes[lane_of[index]].append(strand)
    return lanes


# ---- Passes ------------------------------------------------------------------------------------------


def one_after_another(strands: Sequence[Strand], tokens_max: int) -> Iterator[list[Part]]:
    """Passes of the pieces of `strands` in their order, several of one strand in one pass where they fit."""
    parts: list[Part] = []
    tokens = 0
    for strand in strands:
        for piece in strand.pieces:
            if parts and tokens + piece.tokens > tokens_max:
                yield parts
                parts, tokens = [], 0
            parts.append((strand, piece))
            tokens += piece.tokens
    if parts:
        yield parts


def side_by_side(strands: Sequence[Strand], tokens_max: int) -> Iterator[list[Part]]:
    """Passes that have at most one piece of any strand, whose gradient then has one writer.

    Of each strand the pieces come in their order. Those that have most of them left go first, so that in the end there
    are others to fill the passes with.
    """
    left = {index: list(reversed(strand.pieces)) for index, strand in enumerate(strands)}
    while left:
        parts: list[Part] = []
        tokens = 0
        for index in sorted(left, key=lambda index: -len(left[index])):
            piece = left[index][-1]
            if parts and tokens + piece.tokens > tokens_max:
                continue
            parts.append((strands[index], left[index].pop()))
            tokens += piece.tokens
            if not left[index]:
                del left[index]
        yield parts


def by_expert_layout(strands: Sequence[Strand]) -> list[list[Strand]]:
    """`strands` whose adapters may share a pass of Triton's kernels: experts' factors lie in one layout.

    Adapters that leave the experts alone go with any.
    """
    groups: dict[ExpertLayout, list[Strand]] = {}
    anywhere: list[Strand] = []
    for strand in strands:
        layout = strand.job.adapter.layout
        if any(site.experts is not None for site in layout.sites):
            groups.setdefault(layout.experts, []).append(strand)
        else:
            anywhere.append(strand)
    if not groups:
        return [anywhere] if anywhere else []
    first, *others = (groups[layout] for layout in sorted(groups))
    return [anywhere + first, *others]
