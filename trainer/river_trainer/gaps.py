"""Operations that are missing while later ones of their run wait: how long that may last, and what it may mean."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container

from river_trainer.effects import Effects
from river_trainer.errors import GapError, RunLostError
from river_trainer.executor import Executor
from river_trainer.preparing import Preparing
from river_trainer.protocol import TrainResult, operation_id
from river_trainer.scheduling import Gap, Scheduler
from river_trainer.snapshotting import Snapshotting

logger = logging.getLogger("river.trainer")


class Gaps:
    """Looks after the gaps of all runs. `load` brings a run here, `pass_over` counts its operations as done."""

    def __init__(
        self,
        scheduler: Scheduler,
        effects: Effects,
        executor: Executor,
        snapshotting: Snapshotting,
        preparing: Preparing,
        *,
        gap_max_s: float,
        load: Callable[[str], Awaitable[None]],
        pass_over: Callable[[str, int], Awaitable[int]],
    ) -> None:
        self._scheduler = scheduler
        self._effects = effects
        self._executor = executor
        self._snapshotting = snapshotting
        self._preparing = preparing
        self._gap_max_s = gap_max_s
        self._load = load
        self._pass_over = pass_over

    async def look(self, tasks: asyncio.TaskGroup, now: float, *, loading: Container[str]) -> None:
        """Fails what has waited too long for an operation that is missing; the run goes on after it.

        A missing operation that was done, says its result, means that what it did is gone. Call it between batches,
        and only when everything that is in the journal has been heard of.
        """
        for gap in self._scheduler.gaps():
            told = await self._effects.find_result(operation_id(gap.run_id, gap.seq))
            if self._scheduler.gap_of(gap.run_id) != gap or gap.run_id in loading:
                continue  # Something has come meanwhile.
            overdue = now - gap.since >= self._gap_max_s
            done = told is not None and (gap.seq == 0 or told.error is None)
            if done or (gap.seq == 0 and overdue):
                self._lose(gap, now)
            elif told is not None and told.error is not None:
                # An earlier process has waited for it already, and told so.
                self._scheduler.continue_at(gap.run_id, gap.seq + 1, now)
                await self._load(gap.run_id)
                await self._pass_over(gap.run_id, gap.seq)
            elif overdue:
                await self._close(tasks, gap, now)

    def _lose(self, gap: Gap, now: float) -> None:
        """Neither a snapshot nor the journal holds what came before a gap: what the run had learned is gone."""
        error = RunLostError(
            f"neither a snapshot nor the journal holds its operation {gap.seq}, which was done"
        )
        logger.critical("a run is lost", extra={"run": gap.run_id, "reason": str(error)})
        first = gap.waiting[0].seq
        self._executor.give_up(gap.run_id, error.as_task_error(), first - 1)
        self._scheduler.continue_at(gap.run_id, first, now)

    async def _close(self, tasks: asyncio.TaskGroup, gap: Gap, now: float) -> None:
        """The missing operation and those that wait for it fail, and say why."""
        last = gap.waiting[-1].seq
        # First of all, so that whatever still arrives is answered by these failures.
        dropped = self._scheduler.continue_at(gap.run_id, last + 1, now)
        for entry in dropped:
            self._preparing.forget(entry)
        await self._load(gap.run_id)
        step = await self._pass_over(gap.run_id, last)
        logger.error("operations are missing", extra={"run": gap.run_id, "seq": gap.seq})
        error = GapError(
            f"operation {gap.seq} of the run did not come within {self._gap_max_s:.0f} s; "
            "operations after it were not done"
        )
        for seq in range(gap.seq, last + 1):
            result = TrainResult(
                operation_id=operation_id(gap.run_id, seq),
                run_id=gap.run_id,
                seq=seq,
                step=step,
                error=error.as_task_error(),
            )
            self._effects.submit(
                tasks, gap.run_id, lambda result=result: self._effects.tell_failure(result)
            )
        progress = self._snapshotting.of(gap.run_id)
        progress.stream_seq = max(progress.stream_seq, *(entry.stream_seq for entry in dropped))
        progress.used_at = now
