"""The trainer as a service: takes operations from the journal, does them in batches, tells the world.

    journal ──▶ Follower ──▶ Scheduler ──▶ batch ──▶ Executor (worker thread, lanes) ──▶ Effects (side by side)
                              ▲ fair between tenants              │                         results, versions, events
                              └──────── trim ◀── Snapshotting ◀───┘

While a batch is computed, the next operations arrive and the effects of the last one happen; a batch takes what is
there when it begins.

The journal of a run is trimmed when a snapshot holds what it says, and only then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from river_billing import streams as billing
from river_engine.obeying import obey
from river_engine.problems import listening
from river_trainer import journal, limits
from river_trainer.assembly import Parts
from river_trainer.controls import Controls
from river_trainer.effects import Disk, Effects
from river_trainer.errors import (
    RestartAskedError,
    RunLostError,
)
from river_trainer.follower import Follower
from river_trainer.gaps import Gaps
from river_trainer.heartbeat import Heartbeat
from river_trainer.lease import Lease
from river_trainer.metrics import TrainerMetrics
from river_trainer.preparing import Preparing
from river_trainer.protocol import (
    TRAIN_STREAM,
    TaskError,
    TrainResult,
    Unload,
    operation_id,
    trainer_control_subject,
)
from river_trainer.queue_state import QueueStates
from river_trainer.runs import FailedRun, Run
from river_trainer.scheduling import Entry, Scheduler
from river_trainer.settings import TrainerSettings
from river_trainer.snapshotting import Snapshotting
from river_trainer.token_counts import TokenCounts
from river_trainer.work import LOADING, Outcome, Report, Work

logger = logging.getLogger("river.trainer")

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class _Copy:
    """A second message of an operation, and its body's object."""

    entry: Entry
    body_name: str | None


class Service:
    """One trainer of one base model."""

    def __init__(
        self,
        settings: TrainerSettings,
        parts: Parts,
        client: Client,
        worker: ThreadPoolExecutor,
        disk: ThreadPoolExecutor,
        store: ThreadPoolExecutor,
    ) -> None:
        """`worker` has the one thread that computes, `disk` those for files here, `store` those for the store."""
        self.metrics = TrainerMetrics()
        self.ready = False
        self._settings = settings
        self._client = client
        self._js: JetStreamContext = client.jetstream(timeout=limits.NATS_REQUEST_TIMEOUT_S)
        self._executor = parts.executor
        self._batch_tokens = parts.batch_tokens
        self._residency = parts.residency
        self._snapshots = parts.snapshots
        self._checkpoints = parts.checkpoints
        self._versions = parts.versions
        self._worker = worker
        self._disk, self._store = Disk(disk), Disk(store)
        self._follower = Follower(self._js, settings.base_model)
        self._scheduler = Scheduler()
        self._arrived = asyncio.Event()
        self._effects = Effects(
            client,
            self._js,
            self._disk,
            self._store,
            base_model=settings.base_model,
            context_length=parts.executor.context_length,
            versions=parts.versions,
            checkpoints=parts.checkpoints,
            snapshots=parts.snapshots,
            done=self._arrived.set,
        )
        self._snapshotting = Snapshotting(
            self._js,
            self._effects,
            self._scheduler,
            base_model=settings.base_model,
            every_steps=settings.snapshot_every_steps,
            interval_s=settings.snapshot_interval_s,
            idle_s=settings.snapshot_idle_s,
        )
        self._queue_states = QueueStates(client, settings.base_model, self._scheduler)
        self._preparing = Preparing(
            self._js,
            self._effects,
            parts.checkpoints,
            self._store,
            base_model=settings.base_model,
            done=self._arrived.set,
        )
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._gaps = Gaps(
            self._scheduler,
            self._effects,
            self._executor,
            self._snapshotting,
            self._preparing,
            gap_max_s=settings.gap_max_s,
            load=self._load,
            pass_over=lambda run_id, seq: self._in_worker(self._pass_over, run_id, seq),
        )
        self._tasks = asyncio.TaskGroup()
        self._trainer_id = f"trainer_{time.time_ns():x}"
        self._lease = Lease(client, settings.base_model, self._trainer_id)
        self._counts = TokenCounts(
            self._js, self._trainer_id, settings.base_model, lambda: self.metrics.tokens
        )

        self._controls = Controls(self._arrived.set)
        self._heartbeat = Heartbeat(
            self._js,
            settings,
            self._trainer_id,
            self._executor,
            self._residency,
            self._scheduler,
            self._snapshotting,
            self.metrics,
            self._controls,
            listening(logger.name),
        )

    async def run(self) -> None:
        """Works until cancelled, or until it is to be started again.

        Raises:
            ExceptionGroup: of a `LeaseLostError`, when another trainer of the base has taken over.
        """
        await journal.retry(lambda: journal.ensure_streams(self._js), doing="making the streams")
        await journal.retry(lambda: billing.ensure_streams(self._js), doing="making the streams")
        await self._lease.take()
        await obey(self._client, trainer_control_subject(self._trainer_id), self._controls.do)
        try:
            async with self._tasks as tasks:
                tasks.create_task(self._lease.keep())
                tasks.create_task(self._queue_states.answer())
                await self._recover()
                tasks.create_task(self._listen())
                tasks.create_task(self._work())
                tasks.create_task(self._heartbeat.keep())
                tasks.create_task(self._counts.tell())
        except* RestartAskedError:
            logger.info("leaving, to be started again")
        finally:
            # What the threads are still at may write files, which no other trainer should meet.
            await self._in_worker(lambda: None)
            await self._disk.idle()
            await self._store.idle()
            await self._counts.tell_last()
            await self._lease.release()

    # ---- Start -----------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Finds out which runs there are, and makes sure that their live versions can be loaded."""
        info = await journal.retry(
            lambda: self._js.stream_info(TRAIN_STREAM), doing="asking for the journal's end"
        )
        self._preparing.replay_end = info.state.last_seq
        known = await self._store.until_done(self._snapshots.newest)
        for run_id, seq in known.items():
            self._scheduler.open(run_id, done_seq=seq)
            self._snapshotting.of(run_id).snapshot_seq = seq
        for run_id, seq in known.items():
            live = await self._effects.live(run_id)
            loadable = live is not None and live == self._versions.live(run_id, live.step)
            if live is None or not loadable or not self._versions.exists(run_id, live.step):
                await self._load(run_id)
                await self._restore_live(run_id)
            if await self._effects.find_result(operation_id(run_id, seq)) is None:
                await self._tell_snapshotted(run_id, seq)
        logger.info("recovered %d runs", len(known))

    async def _restore_live(self, run_id: str) -> None:
        run = self._executor.runs.get(run_id)
        if not isinstance(run, Run):
            return
        live = await self._effects.live(run_id)
        # What has been told since the snapshot is rebuilt from the journal, and its adapter with it.
        if live is None or live.step <= run.step:
            await self._effects.write_version(run_id, run.step, run.adapter.host_copy())
            await self._effects.refresh_live(run_id, run.step)

    async def _tell_snapshotted(self, run_id: str, seq: int) -> None:
        """A process died between the snapshot of an operation that loaded a checkpoint and its result.

        Any other operation is told before it is in a snapshot; its result has faded, and its message has gone.
        """
        message = await journal.retry(
            lambda: journal.find_message(self._js, self._settings.base_model, run_id, seq),
            doing="looking for an operation that was not told",
        )
        if message is None:
            return
        await self._load(run_id)
        run = self._executor.runs[run_id]
        if isinstance(run, Run) and run.last_seq == seq:
            operation = operation_id(run_id, seq)
            result = TrainResult(operation_id=operation, run_id=run_id, seq=seq, step=run.step)
            live = await self._effects.write_version(run_id, run.step, run.adapter.host_copy())
            await self._effects.tell_result(message, result, live)
            self.metrics.count(message, result)

    async def _load(self, run_id: str) -> None:
        """Brings a run from its snapshot, if it has one and is not here; one that is gone says so from now on."""
        progress = self._snapshotting.of(run_id)
        if self._residency.holds(run_id) or progress.snapshot_seq < 0:
            return
        try:
            sites, newest = self._executor.base.sites, progress.snapshot_seq
            run = await self._store.until_done(self._snapshots.load_at, run_id, sites, newest)
        except RunLostError as error:
            run = FailedRun(run_id, error.as_task_error(), progress.snapshot_seq)
            logger.critical("a run is lost", extra={"run": run_id, "reason": str(error)})
        progress.snapshot_step = run.step if isinstance(run, Run) else 0
        await self._in_worker(self._residency.admit, run)

    # ---- Following and working -------------------------------------------------------------------

    async def _listen(self) -> None:
        async for entry in self._follower.entries():
            self._scheduler.add(entry, time.monotonic())
            self._preparing.expect(self._tasks, entry)
            self._arrived.set()

    async def _work(self) -> None:
        next_scan = 0.0
        while True:
            await self._effects.room()
            now = time.monotonic()
            if now >= next_scan:
                next_scan = now + limits.SCAN_INTERVAL_S
                await self._look_at_gaps(now)
                await self._snapshot_idle_runs()
                await self._drop_runs()
            self._arrived.clear()
            self._queue_states.drain(draining=self._controls.draining)
            if self._controls.draining:
                await self._stand_still()
                continue
            batch = self._scheduler.take(
                self._batch_tokens, now, ready=self._is_ready, admit=self._admission()
            )
            self.metrics.waiting(len(self._scheduler), self._scheduler.tokens)
            if batch:
                await self._perform(batch)
                continue
            await self._rest()

    async def _rest(self) -> None:
        """Nothing is being computed: waits for news."""
        self.ready |= self._follower.caught_up
        self._queue_states.running([])
        with suppress(TimeoutError):
            async with asyncio.timeout(limits.SCAN_INTERVAL_S):
                await self._arrived.wait()

    async def _stand_still(self) -> None:
        """Begins nothing; raises RestartAskedError when all has been told and the trainer is to leave."""
        if self._controls.leaving:
            await self._effects.all_told()
            raise RestartAskedError
        await self._rest()

    def _is_ready(self, entry: Entry) -> bool:
        """Whether an operation can be done now; if not, it is seen to that it can be soon."""
        run_id = entry.run_id
        if self._effects.pending_of(run_id) >= limits.EFFECTS_OF_RUN_MAX:
            return False
        if run_id in self._loading:
            return False
        if not self._residency.holds(run_id) and self._snapshotting.of(run_id).snapshot_seq >= 0:
            if len(self._loading) < limits.IO_THREADS:
                self._loading[run_id] = self._tasks.create_task(self._load_beside(run_id))
            return False
        return self._preparing.ready(self._tasks, entry)

    async def _load_beside(self, run_id: str) -> None:
        """Loads a run while others are being trained."""
        try:
            await self._load(run_id)
        finally:
            del self._loading[run_id]
            self._arrived.set()

    def _admission(self) -> Callable[[str], bool]:
        """Lets runs into a batch as long as all of them fit into memory together."""
        admitted_bytes = 0

        def admit(run_id: str) -> bool:
            nonlocal admitted_bytes
            size_bytes = self._residency.size_bytes(run_id)
            if not self._residency.fits(admitted_bytes + size_bytes):
                return False
            admitted_bytes += size_bytes
            return True

        return admit

    async def _perform(self, batch: list[Entry]) -> None:
        """A batch of operations, to their effects, which go on after this."""
        self._queue_states.running(batch)
        works: list[tuple[Entry, Work]] = []
        started = time.perf_counter()
        for entry in batch:
            prepared = await self._preparing.take(entry)
            message = prepared.work.message
            if entry.duplicate:
                copy = _Copy(entry, prepared.body_name)
                self._effects.submit(
                    self._tasks, entry.run_id, lambda copy=copy: self._answer_again(copy)
                )
            elif message.base_model != self._settings.base_model:
                logger.error("an operation on another base model", extra={"run": entry.run_id})
            else:
                if prepared.body_name is not None:
                    self._snapshotting.of(entry.run_id).bodies.append(prepared.body_name)
                works.append((entry, prepared.work))
        if not works:
            return
        self.metrics.spent("load", time.perf_counter() - started)
        started = time.perf_counter()
        outcomes, report = await self._in_worker(self._compute, [work for _, work in works])
        self.metrics.batch(
            report,
            operations=len(works),
            budget=self._batch_tokens,
            seconds=time.perf_counter() - started,
        )
        for (entry, _), outcome in zip(works, outcomes, strict=True):
            progress = self._snapshotting.of(entry.run_id)
            progress.stream_seq = max(progress.stream_seq, entry.stream_seq)
            progress.used_at = time.monotonic()
            asked_to = isinstance(outcome.message.task, Unload)
            progress.leaving = asked_to and outcome.result.error is None
            self._conclude(outcome)
        for run_id in {entry.run_id for entry, _ in works}:
            self._consider_snapshot(run_id)
        self.metrics.runs(
            device=self._residency.device_runs,
            memory=len(self._executor.runs) - self._residency.device_runs,
            spilled=self._residency.spilled,
            resident_bytes=self._residency.resident_bytes,
        )

    def _compute(self, works: list[Work]) -> tuple[list[Outcome], Report]:
        """In the worker, at one go: between bringing runs and working on them another could push them out again."""
        started = time.perf_counter()
        self._residency.bring({work.message.run_id for work in works})
        brought_s = time.perf_counter() - started
        outcomes, report = self._executor.execute(works)
        report.add("load", brought_s)
        return outcomes, report

    def _consider_snapshot(self, run_id: str, *, idle: bool = False) -> None:
        run = self._executor.runs.get(run_id)
        if (
            run is not None
        ):  # Otherwise it has been moved to disk meanwhile, and comes back for it when idle.
            self._snapshotting.consider(self._tasks, run, idle=idle)

    def _conclude(self, outcome: Outcome) -> None:
        """Submits what an outcome means to others, unless an earlier process has told them."""
        work, run_id = outcome.work, outcome.message.run_id
        if work.is_over:
            return
        effect = self._tell if work.told is None else self._show_again
        if work.told is None or outcome.version is not None:
            self._effects.submit(
                self._tasks, run_id, lambda: effect(outcome), size_bytes=outcome.size_bytes
            )

    async def _tell(self, outcome: Outcome) -> None:
        started = time.perf_counter()
        result = await self._effects.tell(outcome)
        self.metrics.spent("publish", time.perf_counter() - started)
        if outcome.frozen is not None and isinstance(outcome.message.task, LOADING):
            self._snapshotting.snapshotted(outcome.frozen)
        self.metrics.count(outcome.message, result)

    async def _show_again(self, outcome: Outcome) -> None:
        """A version that was told before: its adapter has to be where engines find it."""
        assert outcome.version is not None
        run_id, step = outcome.message.run_id, outcome.result.step
        await self._effects.write_version(run_id, step, outcome.version)
        await self._effects.refresh_live(run_id, step)

    # ---- What went wrong -------------------------------------------------------------------------

    async def _answer_again(self, copy: _Copy) -> None:
        """A second copy of an operation: its first result is published once more, and the copy goes."""
        entry = copy.entry
        operation = operation_id(entry.run_id, entry.seq)
        told = await self._effects.find_result(operation)
        if told is None:
            error = TaskError(
                type="result_gone", message="it was done; its result is no longer kept"
            )
            told = TrainResult(
                operation_id=operation, run_id=entry.run_id, seq=entry.seq, step=0, error=error
            )
        await self._effects.publish_result(told)
        await journal.retry(
            lambda: self._forget(entry.stream_seq, copy.body_name), doing="removing a copy"
        )

    async def _look_at_gaps(self, now: float) -> None:
        if not self._client.is_connected:
            # What is missing cannot come.
            self._scheduler.restart_gaps(now)
        elif self._follower.caught_up:
            await self._gaps.look(self._tasks, now, loading=self._loading)

    def _pass_over(self, run_id: str, seq: int) -> int:
        """In the worker: the run's operations up to `seq` count as done; returns its step."""
        self._residency.reach({run_id})
        self._executor.pass_seq(run_id, seq)
        run = self._executor.runs.get(run_id)
        return run.step if isinstance(run, Run) else 0

    async def _forget(self, stream_seq: int, body_name: str | None) -> None:
        with suppress(NotFoundError):  # Trimmed already.
            await self._js.delete_msg(TRAIN_STREAM, stream_seq)
        if body_name is not None:
            await journal.delete_body(self._js, body_name)

    # ---- Beside the work -------------------------------------------------------------------------

    async def _snapshot_idle_runs(self) -> None:
        for run_id in self._snapshotting.idle():
            if self._snapshotting.busy:
                return
            if self._effects.settled(run_id) and self._residency.holds(run_id):
                await self._in_worker(self._residency.reach, {run_id})
                self._consider_snapshot(run_id, idle=True)

    async def _drop_runs(self) -> None:
        """Lets runs go that were unloaded and are snapshotted; their next operation loads them again."""
        for run_id in self._snapshotting.gone():
            self._snapshotting.of(run_id).leaving = False
            if isinstance(self._executor.runs.get(run_id), FailedRun):
                continue
            await self._in_worker(self._residency.drop, run_id)
            logger.info("unloaded", extra={"run": run_id})

    async def _in_worker(
        self,
        function: Callable[Parameters, Answer],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Answer:
        """What touches runs, off the event loop, so that heartbeats go on; one thing at a time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, lambda: function(*args, **kwargs))
