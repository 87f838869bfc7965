"""Learning from feedback: by the server, which goes on when this process has ended, or by a loop of one's own here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from urllib.parse import quote

from river_client import exceptions, feedback_wire, limits
from river_client.async_feedback import acknowledge_feedback, claim_feedback
from river_client.learning_wire import LearningPage, LearningState, StartLearning
from river_client.transport import Transport

logger = logging.getLogger("river.client")


class AsyncRunsLearning:
    """`client.learning`: the runs that the server trains on feedback."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def list(self) -> list[LearningState]:
        """What your runs learn and have learnt, newest first."""
        page = await self._transport.call("GET", "/learning", LearningPage)
        return page.learning

    async def get(self, run_id: str) -> LearningState:
        """What a run learns, or has learnt last.

        Raises:
            NotFoundError: it has never learnt from feedback.
        """
        return await self._transport.call("GET", _path(run_id), LearningState)

    async def start(self, run_id: str, settings: StartLearning) -> LearningState:
        """Tells a run to learn; the same again while it does is a no-op.

        Raises:
            InvalidRequestError: a setting is wrong, or the run is learning something else.
        """
        return await self._transport.call("PUT", _path(run_id), LearningState, body=settings)

    async def stop(self, run_id: str) -> LearningState:
        """Tells a run to stop learning, once the batch at hand has been applied."""
        return await self._transport.call("DELETE", _path(run_id), LearningState)


class AsyncLearning:
    """A run that the server trains on feedback. It goes on whether anybody looks or not.

    `state` is how far it had come when the server was last asked.
    """

    def __init__(
        self,
        transport: Transport,
        state: LearningState,
        *,
        on_state: Callable[[LearningState], None] = lambda _: None,
    ) -> None:
        self.state = state
        self.run_id = state.run_id
        self._runs = AsyncRunsLearning(transport)
        self._on_state = on_state

    async def refresh(self) -> LearningState:
        """How far it has come now."""
        return self._saw(await self._runs.get(self.run_id))

    async def stop(self) -> LearningState:
        """Ends it; returns once the batch at hand has been applied, and others may train the run again."""
        self._saw(await self._runs.stop(self.run_id))
        while self.state.active:
            await asyncio.sleep(limits.LEARNING_POLL_S)
            await self.refresh()
        return self.state

    async def wait(
        self,
        *,
        steps: int = 0,
        completions: int = 0,
        timeout: float | None = None,  # noqa: ASYNC109 - as in `PendingOp.result`
    ) -> LearningState:
        """Waits until it has taken so many steps, on so many completions, since it began.

        Raises:
            TimeoutError: `timeout` seconds passed; it goes on.
            OperationFailedError: it ended before; the message says why.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.state.steps < steps or self.state.completions < completions:
            self._check_active()
            if deadline is not None and time.monotonic() >= deadline:
                raise exceptions.TimeoutError(
                    f"{self.run_id} has taken {self.state.steps} steps on {self.state.completions} completions"
                )
            await asyncio.sleep(limits.LEARNING_POLL_S)
            await self.refresh()
        return self.state

    async def steps(self) -> AsyncGenerator[LearningState]:
        """The state after each step, or after several if they come fast, until it ends.

        Raises:
            OperationFailedError: it failed; the message says why.
        """
        seen = self.state.steps
        while True:
            await self.refresh()
            if self.state.steps > seen:
                seen = self.state.steps
                yield self.state
            elif self.state.active:
                await asyncio.sleep(limits.LEARNING_POLL_S)
            elif self.state.status == "failed":
                self._check_active()
            else:
                return

    def _saw(self, state: LearningState) -> LearningState:
        self.state = state
        self._on_state(state)
        return state

    def _check_active(self) -> None:
        if not self.state.active:
            reason = self.state.reason or "it was stopped"
            raise exceptions.OperationFailedError(
                f"{self.run_id} learns no more from {self.state.alias!r}: {reason}",
                type="learning_ended",
            )


class AsyncLocalLearning:
    """A loop in this process; `error` is what ended it, if something did."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.steps = 0
        self.completions = 0
        self.error: exceptions.RiverError | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def active(self) -> bool:
        """Whether it goes on."""
        return self._task is not None and not self._task.done()

    async def stop(self) -> None:
        """Ends it, once the batch at hand has been applied."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    def begin(
        self,
        transport: Transport,
        asked: feedback_wire.ClaimFeedback,
        train: Callable[[feedback_wire.FeedbackBatch], Awaitable[bool]],
    ) -> None:
        """Lets `train` have each batch as it comes; it says whether that was a step."""
        self._task = asyncio.create_task(self._learn(transport, asked, train))

    async def _learn(
        self,
        transport: Transport,
        asked: feedback_wire.ClaimFeedback,
        train: Callable[[feedback_wire.FeedbackBatch], Awaitable[bool]],
    ) -> None:
        """A batch is acknowledged once it has been applied: if this process dies before, it is handed out again."""
        try:
            while not self._stopping.is_set():
                batch = await claim_feedback(transport, asked)
                if batch.batch_id is None:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), limits.LEARNING_POLL_S)
                    continue
                self.steps += await train(batch)
                await acknowledge_feedback(transport, batch.batch_id)
                self.completions += len(batch.data)
        except exceptions.RiverError as error:
            logger.warning("learning from %s ended: %s", self.alias, error)
            self.error = error


def _path(run_id: str) -> str:
    return f"/runs/{quote(run_id, safe='')}/learning"
