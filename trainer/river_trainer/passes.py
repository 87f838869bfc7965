"""Forward and backward over the jobs of many runs, in packed passes of bounded size.

Each job is one operation's data on one adapter. What a job gets must not depend, to the last bit, on which other jobs
share its passes, so everything that has an order is decided by the job alone (`strands.py`):

* a job is cut into *pieces* of whole sequences, of at most `piece_tokens` tokens (or one longer group);
* its pieces are dealt to a few *strands*, as many as there are lanes; the pieces of a strand are computed one after
  another in one lane and add to the strand's own gradient;
* the strands' gradients are added in their order.

Between those decisions all is free: strands of all jobs are dealt to the lanes, and a lane packs pieces of several
strands into one pass. Within a pass every piece is a segment, and segments are computed by themselves.

On an accelerator there is one lane, which starts all passes of a batch without waiting for any; what came out of them
is fetched at the end. Two more rules hold for its kernels: a pass has at most one piece of a strand, and the adapters
of a pass have one expert layout.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from river_kernels import Segments
from river_trainer.adapter import FlatTensors
from river_trainer.base_model import BaseModel, SlotPairs
from river_trainer.devices import fetched, moved
from river_trainer.gradients import GradientPool
from river_trainer.lanes import Lanes
from river_trainer.loss_specs import TEMPERATURE
from river_trainer.losses import Loss, LossData, Sums, loss_data, metrics_of
from river_trainer.packing import PackedBatch, pack, split_logprobs
from river_trainer.pass_times import Moments, PassTimes, moment
from river_trainer.routing import Flips
from river_trainer.strands import (
    Job,
    Part,
    Strand,
    by_expert_layout,
    cut,
    deal,
    one_after_another,
    shares_of,
    side_by_side,
)


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


@dataclass(frozen=True, slots=True)
class Cargo:
    """All tensors of a pass that come from the host: they go to the device together."""

    batch: PackedBatch
    data: list[LossData]


@dataclass(frozen=True, slots=True)
class Started:
    """What will come out of a pass that a device may still be at; by part but for `logprobs` [T] or [T, K].

    `sums` holds those of the loss, and under `_DIFFERENT` and `_SLOTS` how often a router chose other experts than the
    sampler's, and how many. Of those a token goes to `per_token`.
    """

    parts: Sequence[Part]
    segments: Segments
    logprobs: torch.Tensor
    sums: list[Sums]
    compared: Sequence[int]
    per_token: int
    moments: Moments | None = None


_DIFFERENT = "different experts"
_SLOTS = "different slots"


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
        assert base.home.is_host or lanes.count == 1, "a device has one lane"
        self._base = base
        self._lanes = lanes
        self._pool = pool
        self._tokens_max = tokens_max
        self._piece_tokens = piece_tokens
        self._width = lanes.count
        self.times = PassTimes()

    def run(self, jobs: Sequence[Job]) -> list[JobOutput]:
        """The outputs of `jobs`, in their order."""
        strands = self.strands(jobs)
        by_lane = deal([strand for of_job in strands for strand in of_job], self._width)
        self._lanes.map(lambda share: self._finish(self.start(share)), by_lane)
        return self._lanes.map(self._conclude, strands)

    def _finish(self, passes: Sequence[Started]) -> None:
        """Waits for `passes`, writes what came out of them into their pieces, and how long they took into `times`."""
        note(passes)
        self.times.add([started.moments for started in passes if started.moments])

    def strands(self, jobs: Sequence[Job]) -> list[list[Strand]]:
        """What each job is cut into."""
        return [
            [
                Strand(job, part)
                for part in shares_of(list(cut(job, self._piece_tokens)), self._width)
            ]
            for job in jobs
        ]

    def start(self, strands: Sequence[Strand]) -> list[Started]:
        """Computes `strands` in this lane, or has the device begin with it."""
        return [
            self._run_pass(parts)
            for group in self._groups(strands)
            for parts in self._passes(group)
        ]

    def _groups(self, strands: Sequence[Strand]) -> list[list[Strand]]:
        """Strands that may share passes."""
        return [list(strands)] if self._base.home.is_host else by_expert_layout(strands)

    def _passes(self, strands: Sequence[Strand]) -> Iterator[list[Part]]:
        """What of `strands`, which are computed in one lane, goes into each pass."""
        form = one_after_another if self._base.home.is_host else side_by_side
        return form(strands, self._tokens_max)

    def _run_pass(self, parts: Sequence[Part]) -> Started:
        cargo, slots = self._load(parts), self._slots(parts)
        begun = moment(self._base.home.device)
        with torch.set_grad_enabled(any(strand.job.backward for strand, _ in parts)):
            logprobs, entropy_T = self._base.token_logprobs(cargo.batch, slots)
            started, losses = self._losses(parts, cargo, logprobs, entropy_T)
        middle = moment(self._base.home.device)
        if losses:
            torch.autograd.backward(losses)
        return replace(started, moments=(begun, middle, moment(self._base.home.device)))

    def _load(self, parts: Sequence[Part]) -> Cargo:
        batch = pack(
            [piece.sequences for _, piece in parts],
            [strand.job.replay for strand, _ in parts],
            [strand.job.loss.config.get(TEMPERATURE, 1.0) for strand, _ in parts],
        )
        data = [loss_data(strand.job.loss, piece.sequences) for strand, piece in parts]
        return moved(Cargo(batch, data), self._base.home.device)

    def _slots(self, parts: Sequence[Part]) -> list[SlotPairs]:
        """What the adapter of each part does; backward passes add to the gradient of its strand."""
        for strand, _ in parts:
            if strand.job.backward and strand.gradient is None:
                strand.gradient = self._pool.take(strand.job.adapter.layout)
        return [strand.job.adapter.pairs(strand.gradient) for strand, _ in parts]

    def _losses(
        self,
        parts: Sequence[Part],
        cargo: Cargo,
        logprobs: torch.Tensor,
        entropy_T: torch.Tensor,
    ) -> tuple[Started, list[torch.Tensor]]:
        """What comes out of each part, and the losses that want a backward pass."""
        losses: list[torch.Tensor] = []
        of_parts: list[Sums] = []
        batch, routing = cargo.batch, cargo.batch.routing
        for index, (strand, _) in enumerate(parts):
            segment = batch.segments[index]
            rows = slice(segment.start, segment.end)
            data = cargo.data[index].with_outputs(logprobs[rows], entropy_T[rows])
            loss, sums = strand.job.loss.function(data)
            if routing is not None and routing.compared[index]:
                different, slots = routing.different(segment)
                sums = {**sums, _DIFFERENT: different, _SLOTS: slots}
            of_parts.append(sums)
            if strand.job.backward:
                losses.append(loss)
        compared = [0] * len(parts) if routing is None else routing.compared
        per_token = 1 if routing is None else routing.per_token
        found = Started(parts, batch.segments, logprobs.detach(), of_parts, compared, per_token)
        return found, losses

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


def note(passes: Sequence[Started]) -> None:
    """Waits for `passes` and writes what came out of them into their pieces."""
    on_device = [
        [
            value.double()
            for sums in started.sums
            for value in sums.values()
            if isinstance(value, torch.Tensor)
        ]
        for started in passes
    ]
    # All of a batch at once, so that the device is waited for once.
    here = iter(
        fetched(
            [
                tensor
                for started, values in zip(passes, on_device, strict=True)
                for tensor in (started.logprobs, *([torch.stack(values)] if values else []))
            ]
        )
    )
    for started, values in zip(passes, on_device, strict=True):
        logprobs = next(here)
        numbers = iter(next(here).tolist() if values else [])
        for index, (_, piece) in enumerate(started.parts):
            segment = started.segments[index]
            piece.sums = {
                name: next(numbers) if isinstance(value, torch.Tensor) else float(value)
                for name, value in started.sums[index].items()
            }
            different, slots = (int(piece.sums.pop(name, 0)) for name in (_DIFFERENT, _SLOTS))
            if started.compared[index]:
                piece.flips = Flips(different, slots, started.compared[index], started.per_token)
            piece.logprobs = split_logprobs(logprobs[segment.start : segment.end], piece.sequences)


def is_finite(flat: torch.Tensor) -> bool:
    """Whether every element is; one pass without a temporary."""
    return all(bool(bound.isfinite()) for bound in torch.aminmax(flat))
