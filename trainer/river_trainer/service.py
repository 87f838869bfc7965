"""The trainer as a service: takes operations from the journal, executes them, tells the world.

    journal ──▶ Follower ──▶ Ordering ──▶ execute (worker thread) ──▶ adapter directory
                                                                  ──▶ LiveVersion, announcement
                                                                  ──▶ usage and catalog events
                                                                  ──▶ result

Effects happen in that order and the result comes last: an operation with a result needs nothing but its state back when
the journal is replayed, and one without is done again with the same identities, which makes the repetition a no-op for
everybody else.

The journal of a run is trimmed when a snapshot holds what it says. A checkpoint that was loaded may be gone by the time
of a replay, so such an operation is snapshotted before its result is published, however long the store is away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import KeyNotFoundError, NotFoundError

from river_billing import streams as billing
from river_engine.protocol import publish_subject
from river_trainer import journal, limits
from river_trainer.errors import StoreError
from river_trainer.events import events_of
from river_trainer.executor import ADVANCING, LOADING, PURE, Executor, reads_checkpoint
from river_trainer.follower import Follower
from river_trainer.lease import Lease
from river_trainer.metrics import TrainerMetrics
from river_trainer.ordering import Entry, Ordering
from river_trainer.protocol import (
    BODY_HEADER,
    HEARTBEAT_INTERVAL_S,
    TRAIN_STREAM,
    CreateRun,
    LiveVersion,
    TaskError,
    TrainerRecord,
    TrainMessage,
    TrainResult,
    operation_id,
    train_subject,
)
from river_trainer.runs import FailedRun, Run
from river_trainer.settings import TrainerSettings
from river_trainer.snapshots import Snapshots
from river_trainer.versions import Versions

logger = logging.getLogger("river.trainer")

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Progress:
    """Where a run stands between memory, snapshot and journal. `used_at` is monotonic time in seconds."""

    snapshot_seq: int = -1
    snapshot_step: int = 0
    stream_seq: int = 0
    used_at: float = 0.0
    bodies: list[str] = field(default_factory=list)


class Service:
    """One trainer of one base model."""

    def __init__(
        self,
        settings: TrainerSettings,
        client: Client,
        executor: Executor,
        snapshots: Snapshots,
        versions: Versions,
        worker: ThreadPoolExecutor,
    ) -> None:
        self.metrics = TrainerMetrics()
        self.ready = False
        self._settings = settings
        self._client = client
        self._js: JetStreamContext = client.jetstream(timeout=limits.NATS_REQUEST_TIMEOUT_S)
        self._executor = executor
        self._snapshots = snapshots
        self._versions = versions
        self._worker = worker
        self._follower = Follower(self._js, settings.base_model)
        self._ordering = Ordering()
        self._arrived = asyncio.Event()
        self._progress: dict[str, _Progress] = {}
        self._replay_end = 0
        self._trainer_id = f"trainer_{time.time_ns():x}"
        self._lease = Lease(client, settings.base_model, self._trainer_id)

    async def run(self) -> None:
        """Works until cancelled.

        Raises:
            ExceptionGroup: of a `LeaseLostError`, when another trainer of the base has taken over.
        """
        await journal.retry(lambda: journal.ensure_streams(self._js), doing="making the streams")
        await journal.retry(lambda: billing.ensure_streams(self._js), doing="making the streams")
        await self._lease.take()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._lease.keep())
                await self._recover()
                tasks.create_task(self._listen())
                tasks.create_task(self._work())
                tasks.create_task(self._beat())
        finally:
            # What the worker thread is still at may write files, which no other trainer should meet.
            await self._in_worker(lambda: None)
            await self._lease.release()

    # ---- Start ---------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Finds out which runs there are, and makes sure that their live versions can be loaded."""
        info = await journal.retry(
            lambda: self._js.stream_info(TRAIN_STREAM), doing="asking for the journal's end"
        )
        self._replay_end = info.state.last_seq
        for run_id, seq in (await self._from_store(self._snapshots.newest)).items():
            self._ordering.open(run_id, done_seq=seq)
            self._progress[run_id] = _Progress(snapshot_seq=seq)
            live = await self._live(run_id)
            loadable = live is not None and live == self._versions.live(run_id, live.step)
            if live is None or not loadable or not self._versions.exists(run_id, live.step):
                await self._load(run_id)
        logger.info("recovered %d runs", len(self._progress))

    async def _load(self, run_id: str) -> None:
        """Brings a run back from its snapshot, if it has one and is not in memory."""
        progress = self._progress.setdefault(run_id, _Progress())
        if run_id in self._executor.runs or progress.snapshot_seq < 0:
            return
        run = await self._from_store(
            lambda: self._snapshots.load(run_id, self._executor.base.sites)
        )
        assert run is not None, f"the snapshot of {run_id} has vanished"
        assert run.last_seq == progress.snapshot_seq
        self._executor.runs[run_id] = run
        if isinstance(run, Run):
            progress.snapshot_step = run.step
            await self._write_version(run)
            await self._refresh_live(run)

    async def _refresh_live(self, run: Run) -> None:
        """Corrects where the live version lies, if that has moved; never makes an older version live."""
        ours = self._versions.live(run.run_id, run.step)
        known = await self._live(run.run_id)
        if known is None or (known.step == ours.step and known != ours):
            await self._put_live(ours)

    # ---- Following and working -----------------------------------------------------------------

    async def _listen(self) -> None:
        async for entry in self._follower.entries():
            self._ordering.add(entry.run_id, entry.seq, entry.stream_seq)
            self.metrics.waiting(len(self._ordering))
            self._arrived.set()

    async def _work(self) -> None:
        while True:
            entry = self._ordering.take()
            if entry is not None:
                await self._perform(entry)
                continue
            self.ready |= self._follower.caught_up
            self._arrived.clear()
            try:
                async with asyncio.timeout(limits.SNAPSHOT_SCAN_INTERVAL_S):
                    await self._arrived.wait()
            except TimeoutError:
                self.ready |= self._follower.caught_up
                await self._snapshot_idle_runs()

    async def _perform(self, entry: Entry) -> None:
        """One operation, from its message to its result."""
        operation = operation_id(entry.run_id, entry.seq)
        message, body_name = await self._read(entry)
        if message is None:
            logger.error("an operation's message is gone", extra={"operation": operation})
            return
        if message.base_model != self._settings.base_model:
            logger.error("an operation on another base model", extra={"operation": operation})
            return
        if entry.duplicate:
            await self._answer_again(entry, message, body_name)
            return
        await self._load(entry.run_id)
        # Only what an earlier process accepted can have a result already.
        replayed = entry.stream_seq <= self._replay_end
        stored = await self._find_result(operation) if replayed else None
        if stored is not None and (stored.error is not None or isinstance(message.task, PURE)):
            self._executor.skip(message, stored)
        else:
            await self._execute(message, stored)
        progress = self._progress[entry.run_id]
        progress.stream_seq = max(progress.stream_seq, entry.stream_seq)
        progress.used_at = time.monotonic()
        if body_name is not None:
            progress.bodies.append(body_name)
        await self._snapshot_if_due(entry.run_id)
        self.metrics.waiting(len(self._ordering))

    async def _execute(self, message: TrainMessage, stored: TrainResult | None) -> None:
        started = time.perf_counter()
        result = await self._in_worker(self._executor.execute, message)
        if stored is not None:
            result = await self._rebuild(message, result, stored)
        busy_s = time.perf_counter() - started
        run = self._executor.runs[message.run_id]
        live: LiveVersion | None = None
        if result.error is None and isinstance(message.task, ADVANCING) and isinstance(run, Run):
            live = await self._write_version(run)
            if reads_checkpoint(message.task):
                await self._from_store(lambda: self._snapshots.write(run))
                self._snapshotted(run)
        if stored is None:
            await self._tell(message, result, live)
            self.metrics.count(message, result, busy_s=busy_s)
        elif live is not None:
            assert isinstance(run, Run)
            await self._refresh_live(run)

    async def _rebuild(
        self, message: TrainMessage, result: TrainResult, stored: TrainResult
    ) -> TrainResult:
        """The result of doing again what was told to have succeeded, which has to succeed in the same way."""
        while result.error is not None and result.error.type == StoreError.type:
            logger.error("the store does not answer", extra={"operation": result.operation_id})
            await asyncio.sleep(limits.RETRY_DELAY_MAX_S)
            if isinstance(message.task, CreateRun):
                self._executor.runs.pop(message.run_id, None)
            result = await self._in_worker(self._executor.execute, message)
        if result.error is not None or result.step != stored.step:
            reason = result.error.message if result.error else f"step {result.step}"
            extra = {"operation": result.operation_id, "told_step": stored.step}
            logger.critical("cannot rebuild a run: %s", reason, extra=extra)
            if isinstance(self._executor.runs[message.run_id], Run):
                self._executor.give_up(message)
        return result

    async def _answer_again(
        self, entry: Entry, message: TrainMessage, body_name: str | None
    ) -> None:
        """A second copy of an operation: its first result is published once more, and the copy goes."""
        stored = await self._find_result(operation_id(entry.run_id, entry.seq))
        if stored is not None:
            await journal.retry(
                lambda: journal.publish_result(self._js, stored), doing="repeating a result"
            )
        elif isinstance(message.task, LOADING):
            await self._tell_snapshotted(message)
        await journal.retry(
            lambda: self._forget(entry.stream_seq, body_name), doing="removing a copy"
        )

    async def _tell_snapshotted(self, message: TrainMessage) -> None:
        """A process died between the snapshot of an operation that loaded a checkpoint and its result."""
        await self._load(message.run_id)
        run = self._executor.runs.get(message.run_id)
        if isinstance(run, Run) and run.last_seq == message.seq:
            operation = operation_id(message.run_id, message.seq)
            result = TrainResult(
                operation_id=operation, run_id=run.run_id, seq=message.seq, step=run.step
            )
            await self._tell(message, result, await self._write_version(run))
            self.metrics.count(message, result, busy_s=0.0)

    # ---- Effects -------------------------------------------------------------------------------

    async def _tell(
        self, message: TrainMessage, result: TrainResult, live: LiveVersion | None
    ) -> None:
        """Every effect of an operation that others see, the result last."""
        if live is not None:
            await self._put_live(live)
            await journal.retry(
                lambda: self._client.publish(
                    publish_subject(self._settings.base_model), journal.encode(live.adapter)
                ),
                doing="announcing a version",
            )
        for event in events_of(message, result, context_length=self._executor.context_length):
            await journal.retry(
                lambda event=event: billing.publish(self._js, event), doing="publishing an event"
            )
        await journal.retry(
            lambda: journal.publish_result(self._js, result), doing="publishing a result"
        )
        logger.info(
            "operation %s",
            "done" if result.error is None else f"failed: {result.error.type}",
            extra={"operation": result.operation_id, "tenant": message.tenant_id},
        )

    async def _write_version(self, run: Run) -> LiveVersion:
        while True:
            try:
                return await self._in_worker(self._versions.write, run)
            except OSError:
                # The step is done and cannot be taken back; it is told when the disk has room again.
                logger.exception("cannot write an adapter", extra={"run": run.run_id})
                await asyncio.sleep(limits.RETRY_DELAY_MAX_S)

    async def _live(self, run_id: str) -> LiveVersion | None:
        async def attempt() -> LiveVersion | None:
            try:
                entry = await (await journal.live_bucket(self._js)).get(run_id)
            except KeyNotFoundError:
                return None
            return journal.decode_live(entry.value or b"")

        return await journal.retry(attempt, doing="reading the live version")

    async def _put_live(self, live: LiveVersion) -> None:
        async def attempt() -> None:
            bucket = await journal.live_bucket(self._js)
            await bucket.put(live.run_id, journal.encode(live))

        await journal.retry(attempt, doing="writing the live version")

    # ---- Snapshots -----------------------------------------------------------------------------

    async def _snapshot_idle_runs(self) -> None:
        for run_id, progress in list(self._progress.items()):
            if time.monotonic() - progress.used_at >= self._settings.snapshot_idle_s:
                await self._snapshot_if_due(run_id, idle=True)

    async def _snapshot_if_due(self, run_id: str, *, idle: bool = False) -> None:
        """Snapshots a run after enough steps, or when idle; then trims its journal."""
        run = self._executor.runs.get(run_id)
        progress = self._progress[run_id]
        if run is None or (isinstance(run, Run) and run.gradients is not None):
            return
        if progress.snapshot_seq < run.last_seq:
            step = run.step if isinstance(run, Run) else 0
            if not idle and step - progress.snapshot_step < self._settings.snapshot_every_steps:
                return
            if not await self._snapshot(run):
                return
        if progress.stream_seq:
            await journal.retry(lambda: self._trim(run_id), doing="trimming the journal")

    async def _snapshot(self, run: Run | FailedRun) -> bool:
        """Whether it could be stored; if not, the journal goes on holding what there is."""
        try:
            await self._in_worker(self._snapshots.write, run)
        except StoreError:
            logger.exception("cannot snapshot", extra={"run": run.run_id})
            # The next attempt is one idle time away.
            self._progress[run.run_id].used_at = time.monotonic()
            return False
        self._snapshotted(run)
        return True

    def _snapshotted(self, run: Run | FailedRun) -> None:
        progress = self._progress[run.run_id]
        progress.snapshot_seq = run.last_seq
        progress.snapshot_step = run.step if isinstance(run, Run) else 0

    async def _trim(self, run_id: str) -> None:
        """Drops what a snapshot holds from the journal, but nothing that came early and still waits."""
        progress = self._progress[run_id]
        end = progress.stream_seq + 1
        waiting = self._ordering.oldest_waiting(run_id)
        if waiting is not None:
            end = min(end, waiting)
        subject = train_subject(self._settings.base_model, run_id)
        await self._js.purge_stream(TRAIN_STREAM, seq=end, subject=subject)
        while progress.bodies:
            await journal.delete_body(self._js, progress.bodies[-1])
            progress.bodies.pop()
        progress.stream_seq = 0

    async def _forget(self, stream_seq: int, body_name: str | None) -> None:
        with suppress(NotFoundError):  # Trimmed already.
            await self._js.delete_msg(TRAIN_STREAM, stream_seq)
        if body_name is not None:
            await journal.delete_body(self._js, body_name)

    # ---- Reading -------------------------------------------------------------------------------

    async def _read(self, entry: Entry) -> tuple[TrainMessage | None, str | None]:
        """An operation's message and the name of its body's object, if it has one."""

        async def attempt() -> tuple[TrainMessage | None, str | None]:
            try:
                found = await self._js.get_msg(TRAIN_STREAM, seq=entry.stream_seq, direct=True)
                body = await journal.read_body(self._js, found.data, found.headers)
            except NotFoundError:
                return None, None
            return journal.decode_message(body), (found.headers or {}).get(BODY_HEADER)

        message, body_name = await journal.retry(attempt, doing="reading an operation")
        if message is None and not entry.duplicate:
            await self._give_up(entry)
        return message, body_name

    async def _give_up(self, entry: Entry) -> None:
        """Somebody removed an operation from the journal: the run goes on without it."""
        await self._load(entry.run_id)
        run = self._executor.runs.get(entry.run_id)
        error = TaskError(type="lost", message="the operation's data is gone")
        if isinstance(run, Run):
            run.last_seq = entry.seq
        else:
            self._executor.runs[entry.run_id] = FailedRun(entry.run_id, error, entry.seq)
        result = TrainResult(
            operation_id=operation_id(entry.run_id, entry.seq),
            run_id=entry.run_id,
            seq=entry.seq,
            step=run.step if isinstance(run, Run) else 0,
            error=error,
        )
        await journal.retry(
            lambda: journal.publish_result(self._js, result), doing="publishing a result"
        )

    async def _find_result(self, operation: str) -> TrainResult | None:
        return await journal.retry(
            lambda: journal.find_result(self._js, operation), doing="looking for a result"
        )

    async def _beat(self) -> None:
        """Keeps the record by which gateways find this trainer."""
        while True:
            record = TrainerRecord(
                trainer_id=self._trainer_id,
                base_model=self._settings.base_model,
                context_length=self._executor.context_length,
                vocab_size=self._executor.base.vocab_size,
                max_lora_rank=self._settings.max_lora_rank,
                heartbeat_at=time.time(),
                runs=len(self._progress),
            )

            async def attempt(record: TrainerRecord = record) -> None:
                bucket = await journal.trainers_bucket(self._js)
                await bucket.put(record.trainer_id, journal.encode(record))

            await journal.retry(attempt, doing="renewing the trainer's record")
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    async def _from_store(self, attempt: Callable[[], Answer]) -> Answer:
        """Works with the store in the worker thread, until it answers."""
        while True:
            try:
                return await self._in_worker(attempt)
            except StoreError:
                logger.exception("the store does not answer")
                await asyncio.sleep(limits.RETRY_DELAY_MAX_S)

    async def _in_worker(
        self,
        function: Callable[Parameters, Answer],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Answer:
        """Torch and disk work, off the event loop, so that heartbeats go on; one thing at a time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, lambda: function(*args, **kwargs))
