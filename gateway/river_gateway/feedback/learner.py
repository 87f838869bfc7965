"""Training runs on feedback as it comes: the gateways' work, each run one gateway's at a time.

Every gateway looks for runs that nobody works on, leases them and renews its leases. When one dies its leases lapse,
and another goes on with what the rows say (`learning.py`).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from river_client import wire
from river_gateway.bus import BusError
from river_gateway.database import POSTGRES_AWAY, POSTGRES_FAILED
from river_gateway.errors import (
    GatewayError,
    InvalidFieldError,
    NotFoundError,
    RateLimitedError,
    StorageFullError,
    UnavailableError,
)
from river_gateway.feedback import learning, rewards
from river_gateway.feedback.lessons import lesson
from river_gateway.ids import new_id
from river_gateway.limits import (
    LEARNING_IDLE_MAX_S,
    LEARNING_IDLE_MIN_S,
    LEARNING_RENEWAL_S,
    LEARNING_RESULT_S,
    LEARNING_RETRY_S,
    LEARNINGS_MAX,
)
from river_gateway.tenancy.auth import principal_of_key
from river_gateway.training import operations
from river_trainer import journal, protocol

if TYPE_CHECKING:
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.feedback.learning import Batch, Leased
    from river_gateway.services import Services

logger = logging.getLogger("river.gateway")

_IN_PASSING = (
    RateLimitedError,
    StorageFullError,
    UnavailableError,
    BusError,
    TimeoutError,
    *POSTGRES_FAILED,
)
"""What is tried again for as long as it takes; any other `GatewayError` ends a run's learning."""
_BUG = "an internal error of the gateway; the batch at hand is left out when the run learns again"


class Learner:
    """The runs that this gateway works on."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.gateway_id = new_id("gwy")
        self._working: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Takes runs and works on them, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    await self._keep_leases()
                    await self._take_more(tasks)
                except POSTGRES_FAILED as error:
                    logger.warning("runs that learn cannot be looked after: %r", error)
                wake = self._services.learning_wake
                with suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), LEARNING_RENEWAL_S)
                wake.clear()

    async def close(self) -> None:
        """Leaves the runs to others at once. Without Postgres the leases lapse by themselves."""
        try:
            await learning.release(self._services.pool, self.gateway_id)
        except POSTGRES_AWAY as error:
            logger.warning("runs that learn are left to be found: %r", error)

    async def _keep_leases(self) -> None:
        """Lets go of those that have become somebody else's."""
        if self._working:
            mine = await learning.renew(self._services.pool, self.gateway_id, [*self._working])
            for run_id in self._working.keys() - mine:
                self._working.pop(run_id).cancel()

    async def _take_more(self, tasks: asyncio.TaskGroup) -> None:
        room = LEARNINGS_MAX - len(self._working)
        if room <= 0 or self._services.stopping.is_set():
            return
        for run_id in await learning.lease(self._services.pool, self.gateway_id, room):
            # Of a lease that had lapsed unnoticed there may be an older task.
            older = self._working.pop(run_id, None)
            if older is not None:
                older.cancel()
            worker = _Worker(self._services, self.gateway_id, run_id)
            task = tasks.create_task(worker.run(), name=f"learning of {run_id}")
            self._working[run_id] = task
            task.add_done_callback(lambda done, run_id=run_id: self._forget(run_id, done))

    def _forget(self, run_id: str, done: asyncio.Task[None]) -> None:
        if self._working.get(run_id) is done:
            del self._working[run_id]


class _Worker:
    """One run's learning, for as long as this gateway has its lease. The names in the log are ids, never texts."""

    def __init__(self, services: Services, gateway_id: str, run_id: str) -> None:
        self._services = services
        self._gateway_id = gateway_id
        self._run_id = run_id
        self._taken_here: str | None = None
        """The batch that was claimed here: of any other nobody knows whether its operation was accepted."""

    async def run(self) -> None:
        """Works until the learning has ended or is somebody else's."""
        try:
            await self._work()
        except Exception:  # a supervisor: a bug in one run's learning must not end the gateway
            logger.exception("learning failed by a bug", extra={"run": self._run_id})
            await self._give_up()

    async def _give_up(self) -> None:
        """Ends the learning, whose batch may be what cannot be worked on; or leaves it to whoever leases it next."""
        try:
            work = await learning.leased(self._services.pool, self._run_id, self._gateway_id)
            if work is None:
                return
            submitted = False
            if work.batch is not None:
                run = await self._services.runs.find(work.run_id, work.tenant_id)
                submitted = await self._was_accepted(run, work.batch)
            await self._fail(work, _BUG, submitted=submitted, give_back=False)
        except Exception:  # the same
            logger.exception("learning is left as it is", extra={"run": self._run_id})

    async def _work(self) -> None:
        idle_s = LEARNING_IDLE_MIN_S
        while not self._services.stopping.is_set():
            try:
                work = await learning.leased(self._services.pool, self._run_id, self._gateway_id)
                if work is None:
                    return
                busy = await self._go_on(work)
            except _IN_PASSING as error:
                logger.warning("learning waits: %r", error, extra={"run": self._run_id})
                self._taken_here = None  # The operation may have been accepted before that.
                wait_s = getattr(error, "retry_after_s", None) or LEARNING_RETRY_S
                await asyncio.sleep(min(wait_s, LEARNING_IDLE_MAX_S))
                continue
            idle_s = LEARNING_IDLE_MIN_S if busy else min(2 * idle_s, LEARNING_IDLE_MAX_S)
            if not busy:
                await asyncio.sleep(idle_s)

    async def _go_on(self, work: Leased) -> bool:
        """One batch, if there is one; what is wrong for good ends the learning, in words that a user reads."""
        submitted = False
        try:
            if work.batch is None:
                taken = await self._take(work)
                if taken is None:
                    return False
                work = taken
            assert work.batch is not None
            run = await self._services.runs.find(work.run_id, work.tenant_id)
            if self._taken_here != work.batch.batch_id:
                submitted = await self._was_accepted(run, work.batch)
            await self._apply(work, run, submitted=submitted)
        except GatewayError as error:
            if isinstance(error, _IN_PASSING):
                raise
            # What can never be trained on would only fail again; anything else has nothing to do with the batch.
            give_back = not submitted and not isinstance(error, InvalidFieldError)
            await self._fail(work, error.message, submitted=submitted, give_back=give_back)
        return True

    async def _take(self, work: Leased) -> Leased | None:
        """The next batch, once there is enough for one.

        Raises:
            GatewayError: there will never be one again.
        """
        settings = work.state.settings
        await self._check_alias(work)
        await principal_of_key(self._services.pool, work.key_id)
        run = await self._services.runs.find(work.run_id, work.tenant_id)
        asked = learning.next_batch(run.run_id, run.base_model, settings)
        pool = self._services.pool
        if not await rewards.is_enough(pool, tenant_id=work.tenant_id, asked=asked):
            return None
        # One that was accepted just before its gateway knew of the learning may be done, and out of the journal: then
        # nothing would tell it from the batch's own.
        seq = await operations.next_seq(self._services, run, at_least=work.state.next_seq)
        taken = await learning.take_batch(pool, work.run_id, self._gateway_id, asked, seq)
        if taken is not None and taken.batch is not None:
            self._taken_here = taken.batch.batch_id
        return taken

    async def _check_alias(self, work: Leased) -> None:
        alias = work.state.alias
        if alias in self._services.engines.bases():
            return
        if await self._services.names.alias(alias, work.tenant_id) is None:
            raise NotFoundError(f"the alias {alias!r} is gone")

    async def _apply(self, work: Leased, run: RunRow, *, submitted: bool) -> None:
        """Submits the batch at hand, unless that is done, and writes its result down."""
        assert work.batch is not None
        services, batch = self._services, work.batch
        rows = await learning.batch_rows(services.pool, work)
        if not submitted:
            # Millions of numbers must not hold up everybody else's requests.
            data = await asyncio.to_thread(lesson, rows, run, work.state.settings.baseline)
            if not data:
                await self._settle(work, completions=len(rows))
                return
            if not await self._submit(work, run, data):
                await learning.skip_seq(services.pool, work.run_id, self._gateway_id, batch.seq)
                return
        result = await self._result(run, batch)
        if result is None:
            return
        if result.error is not None:
            reason = f"the trainer could not do a step: {result.error.message}"
            await self._fail(work, reason, submitted=True, give_back=False)
            return
        await self._settle(
            work, completions=len(rows), step=result.step, metrics=dict(result.metrics)
        )

    async def _submit(self, work: Leased, run: RunRow, data: list[wire.Datum]) -> bool:
        """Stores the operation; False when its seq is that of somebody else's.

        Raises:
            GatewayError: it cannot be accepted, now or ever.
        """
        assert work.batch is not None
        services, settings, seq = self._services, work.state.settings, work.batch.seq
        principal = await principal_of_key(services.pool, work.key_id)
        operation = wire.TrainStep(
            data=data,
            adam=settings.adam,
            loss_fn=settings.loss_fn,
            loss_config=settings.loss_config,
        )
        submitted = wire.SubmitOperation(seq=seq, operation=operation)
        task = await operations.make_task(services, run, work.tenant_id, submitted)
        tokens = protocol.task_tokens(task)
        message = operations.message_of(
            run, principal, seq, task, work.batch.claimed_at.timestamp()
        )
        with services.quotas.admit(principal, tokens) as ticket:
            await services.credit.hold_operation(principal, run, seq, tokens)
            new = await operations.publish_new(services, message)
            ticket.settle(tokens)
        return new or await self._was_accepted(run, work.batch)

    async def _was_accepted(self, run: RunRow, batch: Batch) -> bool:
        """Whether the batch's own operation is in the journal, or has left it because it is done."""
        self._services.bus.require()
        jetstream = self._services.bus.jetstream
        message = await journal.find_message(jetstream, run.base_model, run.run_id, batch.seq)
        if message is not None:
            return message.submitted_at == batch.claimed_at.timestamp()
        operation = protocol.operation_id(run.run_id, batch.seq)
        return await journal.find_result(jetstream, operation) is not None

    async def _result(self, run: RunRow, batch: Batch) -> protocol.TrainResult | None:
        """The operation's result; None when this gateway is to end first."""
        operation = protocol.operation_id(run.run_id, batch.seq)
        while not self._services.stopping.is_set():
            result = await self._services.results.result(operation, LEARNING_RESULT_S)
            if result is not None:
                return result
        return None

    async def _settle(
        self,
        work: Leased,
        *,
        completions: int,
        step: int | None = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        assert work.batch is not None
        ended = await learning.settle(
            self._services.pool,
            work.run_id,
            self._gateway_id,
            work.batch,
            completions=completions,
            step=step,
            metrics=metrics,
        )
        if ended:
            await self._tell(work)

    async def _fail(self, work: Leased, reason: str, *, submitted: bool, give_back: bool) -> None:
        logger.warning("learning failed: %s", reason, extra={"run": work.run_id})
        await learning.fail(
            self._services.pool,
            work,
            self._gateway_id,
            reason,
            submitted=submitted,
            give_back=give_back,
        )
        await self._tell(work)

    async def _tell(self, work: Leased) -> None:
        """The run is its tenant's again, on all gateways."""
        await self._services.names.changed(work.tenant_id, learning.name_of(work.run_id))
