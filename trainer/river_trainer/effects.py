"""What an operation does to the world outside the trainer, once it is done.

Effects of one operation happen in this order, the result last: an operation with a result needs nothing but its state
back when the journal is replayed, and one without is done again with the same identities, which makes the repetition a
no-op for everybody else.

    checkpoint or snapshot, adapter directory ─▶ LiveVersion ─▶ announcement, usage and catalog events ─▶ result

Effects of one run come one after another, those of different runs side by side, while the next batch is computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import KeyNotFoundError

from river_billing import streams as billing
from river_billing.events import AnyEvent, RunAdvanced, UsageEvent
from river_engine.protocol import publish_subject
from river_trainer import journal, limits
from river_trainer.adapter import Adapter
from river_trainer.checkpoints import Checkpoints
from river_trainer.errors import StoreError
from river_trainer.events import events_of
from river_trainer.protocol import LiveVersion, SaveWeights, TrainMessage, TrainResult
from river_trainer.runs import FailedRun, Run
from river_trainer.snapshots import Snapshots
from river_trainer.versions import Versions
from river_trainer.work import Outcome

logger = logging.getLogger("river.trainer")

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


class Disk:
    """Threads for files and the store, so that the event loop and the computing go on."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._running: set[asyncio.Future[Any]] = set()

    async def idle(self) -> None:
        """Waits for calls that go on in their threads though nobody waits for them any more."""
        while self._running:
            await asyncio.wait(self._running)

    async def run(
        self,
        function: Callable[Parameters, Answer],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Answer:
        """One call in a thread."""
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))
        self._running.add(call)
        call.add_done_callback(self._running.discard)
        # Cancelling the one who waits must not make the thread's work look as if it had ended.
        return await asyncio.shield(call)

    async def until_done(
        self,
        function: Callable[Parameters, Answer],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Answer:
        """The call again and again until the store, or the disk, takes it. For what must not be lost."""
        while True:
            try:
                return await self.run(function, *args, **kwargs)
            except (StoreError, OSError):
                logger.exception("the store does not answer")
                await asyncio.sleep(limits.RETRY_DELAY_MAX_S)


class Effects:
    """Tells outcomes, in order for each run.

    What goes to the store has threads of its own: it may be far away, and no step of anybody has to wait for it.
    """

    def __init__(
        self,
        client: Client,
        js: JetStreamContext,
        disk: Disk,
        store: Disk,
        *,
        base_model: str,
        context_length: int,
        versions: Versions,
        checkpoints: Checkpoints,
        snapshots: Snapshots,
        done: Callable[[], None],
    ) -> None:
        """`done` is called whenever an effect has happened."""
        self._client = client
        self._js = js
        self._disk = disk
        self._store = store
        self._base_model = base_model
        self._context_length = context_length
        self._versions = versions
        self._checkpoints = checkpoints
        self._snapshots = snapshots
        self._done = done
        self._tails: dict[str, asyncio.Task[None]] = {}
        self._pending: dict[str, int] = {}
        self._pending_bytes = 0
        self._fewer = asyncio.Event()

    # ---- Order -------------------------------------------------------------------------------------

    def submit(
        self,
        tasks: asyncio.TaskGroup,
        run_id: str,
        effect: Callable[[], Awaitable[None]],
        *,
        size_bytes: int = 0,
    ) -> None:
        """Lets `effect`, which holds so much memory, happen after everything submitted for the run before."""
        before = self._tails.get(run_id)
        self._pending[run_id] = self.pending_of(run_id) + 1
        self._pending_bytes += size_bytes
        task = tasks.create_task(self._after(before, effect))
        self._tails[run_id] = task
        task.add_done_callback(lambda done: self._ended(run_id, done, size_bytes))

    def pending_of(self, run_id: str) -> int:
        """How many effects of a run have not happened yet."""
        return self._pending.get(run_id, 0)

    async def _after(
        self, before: asyncio.Task[None] | None, effect: Callable[[], Awaitable[None]]
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        await effect()

    def _ended(self, run_id: str, task: asyncio.Task[None], size_bytes: int) -> None:
        self._pending[run_id] -= 1
        if not self._pending[run_id]:
            del self._pending[run_id]
        self._pending_bytes -= size_bytes
        self._fewer.set()
        self._done()
        if self._tails.get(run_id) is task:
            del self._tails[run_id]

    def settled(self, run_id: str) -> bool:
        """Whether everything of the run has been told."""
        return run_id not in self._tails

    async def all_told(self) -> None:
        """Waits until everything that was submitted has happened."""
        while self._pending:
            self._fewer.clear()
            await self._fewer.wait()

    async def room(self) -> None:
        """Waits while too much has not been told."""
        while (
            sum(self._pending.values()) >= limits.EFFECTS_PENDING_MAX
            or self._pending_bytes >= limits.EFFECTS_PENDING_MAX_BYTES
        ):
            self._fewer.clear()
            await self._fewer.wait()

    # ---- Effects -----------------------------------------------------------------------------------

    async def tell(self, outcome: Outcome) -> TrainResult:
        """Everything that an outcome means to others, the result last; returns that."""
        message, result = outcome.message, outcome.result
        if outcome.frozen is not None:
            if isinstance(message.task, SaveWeights):
                result = await self._store.run(
                    self._checkpoints.write, message, outcome.frozen, result
                )
            else:
                # The checkpoint that the run has read may be gone when the journal is replayed.
                await self._store.until_done(self._snapshots.write, outcome.frozen)
        live: LiveVersion | None = None
        if outcome.version is not None:
            live = await self.write_version(message.run_id, result.step, outcome.version)
        await self.tell_result(message, result, live)
        return result

    async def _publish(self, event: AnyEvent) -> None:
        await journal.retry(lambda: billing.publish(self._js, event), doing="publishing an event")

    async def tell_result(
        self, message: TrainMessage, result: TrainResult, live: LiveVersion | None
    ) -> None:
        """The live version, the events, and the result."""
        if live is not None:
            await self._put_live(live)
        events = events_of(message, result, context_length=self._context_length)
        # The credit that is held for an operation is let go at its end; its usage has to be known by then.
        usage = [event for event in events if isinstance(event, UsageEvent)]
        others = [event for event in events if not isinstance(event, UsageEvent)]
        await asyncio.gather(
            *([] if live is None else [self._announce(live)]), *map(self._publish, usage)
        )
        await asyncio.gather(*map(self._publish, others))
        await self.publish_result(result)
        logger.info(
            "operation %s",
            "done" if result.error is None else f"failed: {result.error.type}",
            extra={"operation": result.operation_id, "tenant": message.tenant_id},
        )

    async def tell_failure(self, result: TrainResult) -> None:
        """An operation that nobody has seen has failed: the catalog moves past it, and its result says why."""
        event = RunAdvanced(
            run_id=result.run_id, seq=result.seq, step=result.step, occurred_at=time.time()
        )
        await journal.retry(lambda: billing.publish(self._js, event), doing="publishing an event")
        await self.publish_result(result)

    async def publish_result(self, result: TrainResult) -> None:
        await journal.retry(
            lambda: journal.publish_result(self._js, result), doing="publishing a result"
        )

    async def find_result(self, operation: str) -> TrainResult | None:
        return await journal.retry(
            lambda: journal.find_result(self._js, operation), doing="looking for a result"
        )

    async def snapshot(self, run: Run | FailedRun) -> bool:
        """Whether a run could be stored; if not, the journal goes on holding what there is."""
        try:
            await self._store.run(self._snapshots.write, run)
        except StoreError:
            logger.exception("cannot snapshot", extra={"run": run.run_id})
            return False
        return True

    # ---- Versions ------------------------------------------------------------------------------

    async def write_version(self, run_id: str, step: int, adapter: Adapter) -> LiveVersion:
        """Writes an adapter where engines find it. What is done cannot be taken back: a full disk is waited for."""
        return await self._disk.until_done(self._versions.write, run_id, step, adapter)

    async def refresh_live(self, run_id: str, step: int) -> None:
        """Says again which version is live, if that has got lost."""
        ours = self._versions.live(run_id, step)
        known = await self.live(run_id)
        if known is None or (known.step == ours.step and known != ours):
            await self._put_live(ours)

    async def live(self, run_id: str) -> LiveVersion | None:
        """The version that others take for the newest."""

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

    async def _announce(self, live: LiveVersion) -> None:
        await journal.retry(
            lambda: self._client.publish(
                publish_subject(self._base_model), journal.encode(live.adapter)
            ),
            doing="announcing a version",
        )
