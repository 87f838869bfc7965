"""Forward and backward over the jobs of many runs, in packed passes of bounded size.

Each job is one operation's data on one adapter. What a job gets must not depend, to the last bit, on which other jobs
share its passes, so everything that has an order is decided by the job alone:

* a job is cut into *pieces* of whole sequences, of at most `piece_tokens` tokens (or one longer group);
* its pieces are dealt to a few *strands*, as many as there are lanes; the pieces of a strand are computed one after
  another in one lane and add to the strand's own gradient;
* the strands' gradients are added in their order.

Between those decisions all is free: strands of all jobs are dealt to the lanes, and a lane packs pieces of several
strands into one pass. Within a pass every piece is a segment, and segments are computed by themselves.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from river_trainer.adapter import Adapter, FlatTensors
from river_trainer.base_model import BaseModel, SlotPairs
from river_trainer.gradients import GradientPool
from river_trainer.lanes import Lanes
from river_trainer.losses import Loss, make_input, metrics_of
from river_trainer.packing import PackedBatch, TrainingSequence, pack, split_logprobs
from river_trainer.protocol import ComputeTask
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
class JobOutput:
    """`logprobs` has one [T] or [T, K] per sequence, zero at the ignored index; `gradient` is None after a forward.

    `finite` is false if a sum or a gradient is not; the rest then means nothing.
    """

    logprobs: list[torch.Tensor] = field(default_factory=list)
    gradient: FlatTensors | None = None
    sums: dict[str, float] = field(default_factory=dict)
    flips: Flips = field(default_factory=Flips)
    finite: bool = True

    def metrics(self, loss: Loss) -> dict[str, float]:
        return metrics_of(loss, self.sums) | self.flips.metrics()


@dataclass(slots=True)
class Piece:
    """Some consecutive sequences of a job, and what came out of them."""

    sequences: list[TrainingSequence]
    logprobs: list[torch.Tensor] = field(default_factory=list)
    sums: Mapping[str, float] = field(default_factory=dict)
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


class Passes:
    """Runs jobs on a base model. One caller at a time.

    `tokens_max` bounds a packed pass, unless one piece alone is longer.
    """

    def __init__(
        self,
        base: BaseModel,
        lanes: Lanes,
        pool: GradientPool,
        *,
        tokens_max: int,
        piece_tokens: int,
    ) -> None:
        assert 0 < piece_tokens <= tokens_max
        self._base = base
        self._lanes = lanes
        self._pool = pool
        self._tokens_max = tokens_max
        self._piece_tokens = piece_tokens
        self._width = lanes.count

    def run(self, jobs: Sequence[Job]) -> list[JobOutput]:
        """The outputs of `jobs`, in their order."""
        strands = [self._strands(job) for job in jobs]
        by_lane = deal([strand for of_job in strands for strand in of_job], self._width)
        self._lanes.map(self._run_lane, by_lane)
        return self._lanes.map(self._conclude, strands)

    def _strands(self, job: Job) -> list[Strand]:
        pieces = list(_pieces(job, self._piece_tokens))
        return [Strand(job, part) for part in _shares(pieces, self._width)]

    def _run_lane(self, strands: Sequence[Strand]) -> None:
        for parts in self._passes(strands):
            self._run_pass(parts)

    def _passes(self, strands: Sequence[Strand]) -> Iterator[list[Part]]:
        """What of `strands`, which are computed in one lane, goes into each pass."""
        parts: list[Part] = []
        tokens = 0
        for strand in strands:
            for piece in strand.pieces:
                if parts and tokens + piece.tokens > self._tokens_max:
                    yield parts
                    parts, tokens = [], 0
                parts.append((strand, piece))
                tokens += piece.tokens
        if parts:
            yield parts

    def _run_pass(self, parts: Sequence[Part]) -> None:
        batch, slots = self._pack(parts), self._slots(parts)
        with torch.set_grad_enabled(any(strand.job.backward for strand, _ in parts)):
            logprobs, entropy_T = self._base.token_logprobs(batch, slots)
            losses = self._losses(parts, batch, logprobs, entropy_T)
        if losses:
            torch.autograd.backward(losses)

    def _pack(self, parts: Sequence[Part]) -> PackedBatch:
        return pack(
            [piece.sequences for _, piece in parts], [strand.job.replay for strand, _ in parts]
        )

    def _slots(self, parts: Sequence[Part]) -> list[SlotPairs]:
        """What the adapter of each part does; backward passes add to the gradient of its strand."""
        for strand, _ in parts:
            if strand.job.backward and strand.gradient is None:
                strand.gradient = self._pool.take(strand.job.adapter.layout)
        return [strand.job.adapter.pairs(strand.gradient) for strand, _ in parts]

    def _losses(
        self,
        parts: Sequence[Part],
        batch: PackedBatch,
        logprobs: torch.Tensor,
        entropy_T: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Notes what came out of each part; returns the losses that want a backward pass."""
        losses: list[torch.Tensor] = []
        for index, (strand, piece) in enumerate(parts):
            segment = batch.segments[index]
            rows = slice(segment.start, segment.end)
            if batch.routing is not None:
                piece.flips = batch.routing.flips(index)
            chosen = strand.job.loss
            data = make_input(chosen, piece.sequences, logprobs[rows], entropy_T[rows])
            loss, sums = chosen.function(data)
            piece.sums = {name: float(value) for name, value in sums.items()}
            piece.logprobs = split_logprobs(logprobs[rows].detach(), piece.sequences)
            if strand.job.backward:
                losses.append(loss)
        return losses

    def _conclude(self, strands: Sequence[Strand]) -> JobOutput:
        output = JobOutput()
        for piece in (piece for strand in strands for piece in strand.pieces):
            output.logprobs += piece.logprobs
            output.flips += piece.flips
            for name, value in piece.sums.items():
                output.sums[name] = output.sums.get(name, 0.0) + value
        for strand in strands:
            if strand.gradient is None:
                continue
            if output.gradient is None:
                output.gradient = strand.gradient
            else:
                output.gradient.flat.add_(strand.gradient.flat)
                self._pool.give(strand.gradient)
        output.finite = all(math.isfinite(value) for value in output.sums.values()) and (
            output.gradient is None or is_finite(output.gradient.flat)
        )
        return output


def is_finite(flat: torch.Tensor) -> bool:
    """Whether every element is; one pass without a temporary."""
    return all(bool(bound.isfinite()) for bound in torch.aminmax(flat))


def _pieces(job: Job, tokens_max: int) -> Iterator[Piece]:
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


def _shares(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
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
