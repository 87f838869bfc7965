"""Operations that have been accepted, and how their results come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from river_client import exceptions, limits, wire
from river_client.progress import waiting
from river_client.transport import Transport

Result = TypeVar("Result")


class AsyncPendingOp(Generic[Result]):
    """An accepted operation. It is durable: it will be carried out whether anybody waits for it or not."""

    def __init__(
        self,
        transport: Transport,
        operation_id: str,
        convert: Callable[[wire.OperationResult], Result],
        *,
        on_done: Callable[[wire.OperationResult], None] | None = None,
        early: asyncio.Task[wire.OperationAccepted | None] | None = None,
    ) -> None:
        self.operation_id = operation_id
        self._transport = transport
        self._convert = convert
        self._on_done = on_done
        self._early = early  # the rest of the answer to the submission: the first poll, as it were
        self._finished: wire.OperationResult | None = None
        self._queue_state: wire.QueueState | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is under way belongs to this process; in another one the operation is asked about anew.
        return vars(self) | {"_early": None, "_on_done": None}

    @property
    def queue_state(self) -> wire.QueueState | None:
        """What the operation was waiting for when the server was last asked; None when done, or not known yet."""
        return self._queue_state

    async def result(self, timeout: float | None = None) -> Result:  # noqa: ASYNC109 - as futures have it
        """Waits for the operation and returns what it did; again and again if you like.

        Raises:
            TimeoutError: `timeout` seconds passed; the operation goes on, and this may be called again.
            OperationFailedError: the trainer could not do it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poll_max_s = limits.LONG_POLL_FIRST_S
        async with waiting(f"waiting for {self.operation_id}", self._reason):
            while self._finished is None:
                poll_s, poll_max_s = poll_max_s, limits.LONG_POLL_S
                if deadline is not None:
                    poll_s = max(0.0, min(poll_s, deadline - time.monotonic()))
                if self._early is None:
                    await self._poll(poll_s)
                else:
                    await self._await_early(self._early, poll_s)
                if self._finished is None and deadline is not None and time.monotonic() >= deadline:
                    raise exceptions.TimeoutError(
                        f"{self.operation_id} is not done after {timeout} s",
                        operation_id=self.operation_id,
                    )
        if self._finished.status == "failed":
            error = self._finished.error
            assert error is not None
            raise exceptions.OperationFailedError(
                error.message, operation_id=self.operation_id, type=error.type, param=error.param
            )
        return self._convert(self._finished)

    async def done(self) -> bool:
        """Whether the operation has been carried out or has failed."""
        if self._finished is None and self._early is not None:
            await self._await_early(self._early, 0.0)
        if self._finished is None:
            await self._poll(0.0)
        return self._finished is not None

    def _reason(self) -> str:
        return self._queue_state.reason if self._queue_state else ""

    async def _poll(self, poll_s: float) -> None:
        result = await self._transport.call(
            "GET",
            f"/operations/{self.operation_id}",
            wire.OperationResult,
            params={"timeout_s": f"{poll_s:.3f}"},
            timeout_s=poll_s + limits.LONG_POLL_GRACE_S,
        )
        self._take(result)

    async def _await_early(
        self, early: asyncio.Task[wire.OperationAccepted | None], wait_s: float
    ) -> None:
        """Waits for the answer to the submission; once it is there, or lost, polling takes over."""
        done, _ = await asyncio.wait([early], timeout=wait_s)
        if done:
            self._early = None
            accepted = None if early.cancelled() else early.result()
            if accepted is not None and accepted.result is not None:
                self._take(accepted.result)

    def _take(self, result: wire.OperationResult) -> None:
        if result.status == "pending":
            self._queue_state = result.queue or self._queue_state
        else:
            self._finished, self._queue_state = result, None
            if self._on_done is not None:
                self._on_done(result)
