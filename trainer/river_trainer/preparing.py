"""Gets what operations need before their turn comes: their bodies, checkpoints, and what has been told of them.

An operation is taken into a batch only when all of it is there, so that nobody's training waits for somebody else's
download, and a store that is away stops those alone who need it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from river_trainer import journal, limits
from river_trainer.checkpoints import Checkpoints
from river_trainer.effects import Disk, Effects
from river_trainer.errors import CorruptError, MissingError, StoreError, TaskFailedError
from river_trainer.protocol import (
    BODY_HEADER,
    TRAIN_STREAM,
    Forward,
    TaskError,
    TrainMessage,
    operation_id,
)
from river_trainer.scheduling import Entry
from river_trainer.work import LOADING, Work

logger = logging.getLogger("river.trainer")


@dataclass(frozen=True, slots=True)
class Prepared:
    """An operation's work, and the name of its body's object, if it has one."""

    work: Work
    body_name: str | None = None


class Preparing:
    """Prepares operations, each once. `done` is called whenever one is ready."""

    def __init__(
        self,
        js: JetStreamContext,
        effects: Effects,
        checkpoints: Checkpoints,
        store: Disk,
        *,
        base_model: str,
        done: Callable[[], None],
    ) -> None:
        self._js = js
        self._effects = effects
        self._checkpoints = checkpoints
        self._store = store
        self._base_model = base_model
        self._done = done
        self._tasks: dict[int, asyncio.Task[Prepared]] = {}
        self.replay_end = 0
        """Only what lies in the stream up to here can have been told by an earlier process."""

    def expect(self, tasks: asyncio.TaskGroup, entry: Entry) -> None:
        """Begins with an operation that will have its turn, unless it is big or enough are being prepared."""
        if (
            len(self._tasks) < limits.READ_AHEAD_OPERATIONS
            and entry.tokens <= limits.READ_AHEAD_TOKENS_MAX
        ):
            self._begin(tasks, entry)

    def ready(self, tasks: asyncio.TaskGroup, entry: Entry) -> bool:
        """Whether an operation whose turn it is can be done; if not, it soon will be."""
        if len(self._tasks) < 2 * limits.READ_AHEAD_OPERATIONS:
            self._begin(tasks, entry)
        task = self._tasks.get(entry.stream_seq)
        return task is not None and task.done()

    async def take(self, entry: Entry) -> Prepared:
        """What has been prepared, or is now."""
        task = self._tasks.pop(entry.stream_seq, None)
        return await (self._prepare(entry) if task is None else task)

    def forget(self, entry: Entry) -> None:
        """An operation will not be done after all."""
        task = self._tasks.pop(entry.stream_seq, None)
        if task is not None:
            task.cancel()

    def _begin(self, tasks: asyncio.TaskGroup, entry: Entry) -> None:
        if entry.stream_seq in self._tasks:
            return
        task = tasks.create_task(self._prepare(entry))
        task.add_done_callback(lambda _: self._done())
        self._tasks[entry.stream_seq] = task

    async def _prepare(self, entry: Entry) -> Prepared:
        prepared = await self._read(entry)
        work = prepared.work
        if entry.stream_seq <= self.replay_end:
            told = await self._effects.find_result(operation_id(entry.run_id, entry.seq))
            work = replace(work, told=told)
        if work.gone is None and not work.is_over and isinstance(work.message.task, LOADING):
            work = replace(work, files=await self._checkpoint_files(work))
        return replace(prepared, work=work)

    async def _read(self, entry: Entry) -> Prepared:
        async def attempt() -> Prepared:
            try:
                found = await self._js.get_msg(TRAIN_STREAM, seq=entry.stream_seq, direct=True)
                body = await journal.read_body(self._js, found.data, found.headers)
                message = journal.decode_message(body)
            except NotFoundError:
                return self._gone(entry, "the operation's data is gone")
            except msgspec.DecodeError as error:
                return self._gone(entry, f"the operation cannot be read: {error}")
            return Prepared(Work(message), (found.headers or {}).get(BODY_HEADER))

        return await journal.retry(attempt, doing="reading an operation")

    def _gone(self, entry: Entry, reason: str) -> Prepared:
        extra = {"operation": operation_id(entry.run_id, entry.seq)}
        logger.error("an operation is gone: %s", reason, extra=extra)
        message = TrainMessage(
            run_id=entry.run_id,
            seq=entry.seq,
            tenant_id=entry.tenant_id,
            key_id="",
            session_id="",
            base_model=self._base_model,
            submitted_at=time.time(),
            task=Forward(data=[], loss_fn="", loss_config={}),
        )
        return Prepared(Work(message, gone=TaskError(type="lost", message=reason)))

    async def _checkpoint_files(self, work: Work) -> dict[str, bytes] | TaskFailedError | None:
        """The files that an operation reads; what was told to have been done has to find them, sooner or later."""
        while True:
            files = await self._store.run(self._checkpoints.read_for, work.message.task)
            transient = isinstance(files, StoreError) and not isinstance(
                files, MissingError | CorruptError
            )
            if work.told is None or not transient:
                return files
            logger.error("the store does not answer", extra={"run": work.message.run_id})
            await asyncio.sleep(limits.RETRY_DELAY_MAX_S)
