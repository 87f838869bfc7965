"""When a run is snapshotted and its journal trimmed."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field

from nats.js import JetStreamContext

from river_trainer import journal, limits
from river_trainer.effects import Effects
from river_trainer.protocol import TRAIN_STREAM, train_subject
from river_trainer.runs import FailedRun, Run
from river_trainer.scheduling import Scheduler


@dataclass(slots=True)
class Progress:
    """Where a run stands between memory, snapshot and journal. Times are monotonic, in seconds.

    `saved_at` is when its newest snapshot was made; of a run without one, when it was first heard of.

    `stream_seq` is the place in the stream of the newest operation done, 0 once nothing is left to be trimmed. A run
    that is `leaving` was asked to be unloaded by its newest operation.
    """

    snapshot_seq: int = -1
    snapshot_step: int = 0
    tried_at: float = -math.inf
    stream_seq: int = 0
    used_at: float = 0.0
    saved_at: float = field(default_factory=time.monotonic)
    bodies: list[str] = field(default_factory=list[str])
    writing: bool = False
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class _Kept:
    """A run to be snapshotted, the newest message it holds, and what of the journal goes then."""

    run: Run | FailedRun
    stream_seq: int
    stream_end: int
    bodies: list[str]


class Snapshotting:
    """The progress of every run of one base model.

    A snapshot counts as told what it holds: it is written only after everything of its run has been told.
    """

    def __init__(
        self,
        js: JetStreamContext,
        effects: Effects,
        scheduler: Scheduler,
        *,
        base_model: str,
        every_steps: int,
        interval_s: float,
        idle_s: float,
    ) -> None:
        self._js = js
        self._effects = effects
        self._scheduler = scheduler
        self._base_model = base_model
        self._every_steps = every_steps
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._progress: dict[str, Progress] = {}
        self._writing = 0

    @property
    def busy(self) -> bool:
        """Whether enough copies of runs are on their way to the store."""
        return self._writing >= limits.SNAPSHOTS_WRITING_MAX

    def __len__(self) -> int:
        return len(self._progress)

    def of(self, run_id: str) -> Progress:
        return self._progress.setdefault(run_id, Progress())

    def idle(self) -> list[str]:
        """Runs that have been left alone for a while and are not safe without their journal."""
        now = time.monotonic()
        return [
            run_id
            for run_id, progress in self._progress.items()
            if progress.stream_seq
            and (progress.leaving or now - progress.used_at >= self._idle_s)
            and not progress.writing
        ]

    def gone(self) -> list[str]:
        """Runs that were to be unloaded and are safe without their memory and without their journal."""
        return [
            run_id
            for run_id, progress in self._progress.items()
            if progress.leaving and not progress.stream_seq and not progress.writing
        ]

    def unsaved(self) -> tuple[int, float]:
        """How many runs have operations that only the journal holds, and the oldest age of their newest snapshots."""
        now = time.monotonic()
        ages = [
            now - progress.saved_at for progress in self._progress.values() if progress.stream_seq
        ]
        return len(ages), max(ages, default=0.0)

    def consider(
        self, tasks: asyncio.TaskGroup, run: Run | FailedRun, *, idle: bool = False
    ) -> None:
        """Snapshots a run after enough steps, or when idle; then trims its journal. Call it between batches."""
        progress = self.of(run.run_id)
        if progress.writing or not progress.stream_seq:
            return
        if isinstance(run, FailedRun) and not run.durable:
            return
        due = idle or self._is_due(run, progress)
        if progress.snapshot_seq < run.last_seq and not due:
            return
        frozen = run.frozen() if isinstance(run, Run) else run
        # All of it as it is now: what comes while the snapshot is being written is not in it.
        end = progress.stream_seq + 1
        waiting = self._scheduler.oldest_waiting(run.run_id)
        if waiting is not None:
            # It came before others that are done, and is not done.
            end = min(end, waiting)
        bodies, progress.bodies = progress.bodies, []
        progress.writing = True
        progress.tried_at = time.monotonic()
        self._writing += 1
        kept = _Kept(frozen, progress.stream_seq, end, bodies)
        self._effects.submit(tasks, run.run_id, lambda: self._keep(kept))

    def _is_due(self, run: Run | FailedRun, progress: Progress) -> bool:
        if time.monotonic() - progress.tried_at < self._interval_s:
            return False
        if isinstance(run, Run) and run.gradient is not None:
            # It is written along, which is dear; but a run that never steps must not keep its journal for ever.
            return run.last_seq - progress.snapshot_seq >= limits.SNAPSHOT_OPERATIONS_MAX
        step = run.step if isinstance(run, Run) else 0
        return step - progress.snapshot_step >= self._every_steps

    def snapshotted(self, run: Run | FailedRun) -> None:
        """A snapshot of the run as it is here is in the store."""
        progress = self.of(run.run_id)
        progress.snapshot_seq = run.last_seq
        progress.snapshot_step = run.step if isinstance(run, Run) else 0
        progress.saved_at = time.monotonic()

    async def _keep(self, kept: _Kept) -> None:
        run, progress = kept.run, self.of(kept.run.run_id)
        try:
            if progress.snapshot_seq < run.last_seq:
                if not await self._effects.snapshot(run):
                    # The next attempt is one idle time away.
                    progress.used_at = time.monotonic()
                    progress.bodies = kept.bodies + progress.bodies
                    return
                self.snapshotted(run)
            await journal.retry(lambda: self._trim(kept), doing="trimming the journal")
            if progress.stream_seq == kept.stream_seq:
                progress.stream_seq = 0
        finally:
            progress.writing = False
            self._writing -= 1

    async def _trim(self, kept: _Kept) -> None:
        """Drops from the journal what a snapshot holds."""
        subject = train_subject(self._base_model, kept.run.run_id)
        await self._js.purge_stream(TRAIN_STREAM, seq=kept.stream_end, subject=subject)
        while kept.bodies:
            await journal.delete_body(self._js, kept.bodies[-1])
            kept.bodies.pop()
