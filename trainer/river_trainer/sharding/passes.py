"""Passes that all processes of a group run together, each over its own share of the data."""

# Tensors carry their shape in capitals.
# ruff: noqa: N806

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from river_kernels import NO_ADAPTER, Segment
from river_trainer.adapter import Adapter, FlatTensors, layout_of
from river_trainer.base_model import BaseModel
from river_trainer.devices import moved
from river_trainer.errors import PassFailedError
from river_trainer.gradients import GradientPool
from river_trainer.jobs import make_job
from river_trainer.lanes import Lanes
from river_trainer.packing import TrainingSequence, pack
from river_trainer.pass_times import moment
from river_trainer.passes import Cargo, JobOutput, Passes, Started
from river_trainer.protocol import AdapterShape, ComputeTask
from river_trainer.sharding.group import Group, in_step
from river_trainer.sharding.messages import Batch
from river_trainer.strands import Job, Part, Piece, Strand, deal

logger = logging.getLogger("river.trainer")


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a process has computed: the outputs of its pieces, in the order of strands; and what went wrong."""

    pieces: list[dict[str, Any]]
    failure: str | None


class ShardedPasses(Passes):
    """The passes of one process of a group; its other half is a `ShardedPasses` in each of the others.

    A strand belongs to one process, which computes its pieces. Every process has a gradient for every strand, as its
    experts serve them all.
    """

    def __init__(
        self,
        base: BaseModel,
        lanes: Lanes,
        pool: GradientPool,
        *,
        group: Group,
        tokens_max: int,
        piece_tokens: int,
    ) -> None:
        super().__init__(base, lanes, pool, tokens_max=tokens_max, piece_tokens=piece_tokens)
        self._group = group
        self._width = group.size

    # ---- Rank 0 ----------------------------------------------------------------------------------

    def run(self, jobs: Sequence[Job]) -> list[JobOutput]:
        """The outputs of `jobs`, in their order, in rank 0.

        Raises:
            PassFailedError: they could not be computed, and the group can go on.
            GroupBrokenError: the group cannot go on.
        """
        adapters = list({id(job.adapter): job.adapter for job in jobs}.values())
        places = {id(adapter): index for index, adapter in enumerate(adapters)}
        asked: list[tuple[int, ComputeTask]] = []
        for job in jobs:
            assert job.task is not None, "only what can be told to the others can be shared"
            asked.append((places[id(job.adapter)], job.task))
        shapes = [adapter.shape for adapter in adapters]
        with self._group.turn:
            self._group.say(Batch(shapes, asked, self._tokens_max, self._piece_tokens))
            for adapter in adapters:
                self._group.share(adapter.weights.flat)
            strands = self.strands(jobs)
            failures = self._in_lane(strands)
        if failures:
            raise PassFailedError("; ".join(failures))
        return self._lanes.map(self._conclude, strands)

    # ---- The others ------------------------------------------------------------------------------

    def take_part(self, batch: Batch, *, context_length: int) -> None:
        """Does this process's share of what rank 0 runs.

        Raises:
            GroupBrokenError: the group cannot go on.
        """
        with in_step():
            sizes = (self._tokens_max, self._piece_tokens)
            assert sizes == (batch.tokens_max, batch.piece_tokens), "the settings differ"
            adapters = [self._receive(shape) for shape in batch.shapes]
            jobs = [
                make_job(task, adapters[index], self._base, context_length=context_length)
                for index, task in batch.jobs
            ]
        strands = self.strands(jobs)
        self._in_lane(strands)
        for strand in (strand for of_job in strands for strand in of_job):
            if strand.gradient is not None:
                self._pool.give(strand.gradient)

    def _receive(self, shape: AdapterShape) -> Adapter:
        home = self._base.home
        weights = FlatTensors.zeros(layout_of(self._base.sites, shape), home.device)
        self._group.share(weights.flat)
        return Adapter(shape, weights).at(home)

    # ---- Everybody -------------------------------------------------------------------------------

    def _in_lane(self, strands: Sequence[Sequence[Strand]]) -> list[str]:
        """Computes the strands of all jobs; in rank 0 they then hold what came out, and what failed is returned."""
        everything = [strand for of_job in strands for strand in of_job]
        with in_step():
            (failures,) = self._lanes.run([lambda: self._compute(everything)])
        return failures

    def _compute(self, strands: Sequence[Strand]) -> list[str]:
        shares = deal(strands, self._group.size)
        failure = self._run_share(shares)
        own = [_outcome(piece) for strand in shares[self._group.rank] for piece in strand.pieces]
        answers: list[_Answer] = self._group.collect(_Answer(own, failure))
        for strand in strands:
            if strand.gradient is not None:
                self._group.sum_up(strand.gradient.flat)
        for share, answer in zip(shares, answers, strict=False):  # Only rank 0 has answers.
            pieces = [piece for strand in share for piece in strand.pieces]
            for piece, outcome in zip(pieces, answer.pieces, strict=True):
                for name, value in outcome.items():
                    setattr(piece, name, value)
        return [answer.failure for answer in answers if answer.failure is not None]

    def _run_share(self, shares: Sequence[Sequence[Strand]]) -> str | None:
        """All passes; returns what went wrong in this process's share, with which the passes went on without loss."""
        failure: str | None = None
        own: list[Started] = []
        for group in self._groups([strand for share in shares for strand in share]):
            members = {id(strand) for strand in group}
            by_rank = [
                list(self._passes([strand for strand in share if id(strand) in members]))
                for share in shares
            ]
            for index in range(max(len(passes) for passes in by_rank)):
                together = [passes[index] if index < len(passes) else [] for passes in by_rank]
                outcome = self._run_together(together)
                if isinstance(outcome, Started):
                    own.append(outcome)
                failure = outcome if isinstance(outcome, str) else failure
        self._finish(own)
        return failure

    def _run_together(self, by_rank: Sequence[Sequence[Part]]) -> Started | str | None:
        """One pass of every process: the parts of all are its slots, and this one's are its segments.

        Returns what will come out of this one's, or what went wrong with it.
        """
        everything = [part for parts in by_rank for part in parts]
        own = by_rank[self._group.rank]
        first_slot = sum(len(parts) for parts in by_rank[: self._group.rank])
        slots = self._slots(everything)
        backward = any(strand.job.backward for strand, _ in everything)
        cargo = _numbered(self._load(own), first_slot) if own else self._filler()
        outcome: Started | str | None = None
        begun = moment(self._base.home.device)
        with torch.set_grad_enabled(backward):
            logprobs, entropy_T = self._base.token_logprobs(cargo.batch, slots)
            losses: list[torch.Tensor] = []
            try:
                if own:
                    outcome, losses = self._losses(own, cargo, logprobs, entropy_T)
            except Exception as error:  # a supervisor: the others are in the backward pass already
                logger.exception("a share of a pass failed")
                outcome = f"{type(error).__name__} in rank {self._group.rank}"
            middle = moment(self._base.home.device)
            if backward:
                # Who has no loss of its own still has experts, and weights to gather, for the others' backward.
                torch.autograd.backward(losses or [logprobs.sum() * 0.0])
        if isinstance(outcome, Started):
            end = moment(self._base.home.device)
            outcome = replace(outcome, moments=(begun, middle, end))
        return outcome

    def _filler(self) -> Cargo:
        """One token without an adapter."""
        token, nothing = torch.zeros(1, dtype=torch.long), torch.zeros(1)
        batch = pack([[TrainingSequence(token, token, nothing, None, None, None)]])
        batch = replace(batch, segments=(Segment(NO_ADAPTER, 0, 1),))
        return moved(Cargo(batch, []), self._base.home.device)


def _outcome(piece: Piece) -> dict[str, Any]:
    """What a pass has added to a piece."""
    names = [item.name for item in fields(piece) if item.name != "sequences"]
    return {name: getattr(piece, name) for name in names}


def _numbered(cargo: Cargo, first_slot: int) -> Cargo:
    segments = tuple(
        Segment(segment.slot + first_slot, segment.start, segment.end)
        for segment in cargo.batch.segments
    )
    return replace(cargo, batch=replace(cargo.batch, segments=segments))
