"""The operations of one run on their way: each with the next seq, one at a time, and never twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from river_client import exceptions, limits, wire
from river_client.async_learning import AsyncLearning, AsyncRunsLearning
from river_client.learning_wire import LearningState, StartLearning
from river_client.pending import AsyncPendingOp
from river_client.transport import Transport

logger = logging.getLogger("river.client")

Result = TypeVar("Result")


class Submissions:
    """Gives out seqs. `step` is that of the newest policy version that an answered operation has made.

    Pickled, it goes on elsewhere after what was submitted here, which therefore has to be all.
    """

    def __init__(self, transport: Transport, run: wire.Run) -> None:
        self.run_id = run.run_id
        self.step = run.step
        self._transport = transport
        self._seq = 1  # of the next operation
        self._submitting = asyncio.Lock()
        self._unsettled: bytes | None = None
        self._shared = False  # Whether the server may have used seqs of this run.

    def __getstate__(self) -> dict[str, Any]:
        if self._submitting.locked():
            raise TypeError(
                "an operation is just being submitted; pickle the model before or after"
            )
        return {name: value for name, value in vars(self).items() if name != "_submitting"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._submitting = asyncio.Lock()

    async def submit(
        self, operation: wire.AnyOperation, convert: Callable[[wire.OperationResult], Result]
    ) -> AsyncPendingOp[Result]:
        """Gives the operation the next seq and submits it.

        One at a time, since a refused operation gives its seq back. When a submission ends without an answer, it may
        have been accepted: it keeps its seq, and is submitted again, unchanged, before anything else. If what comes
        next is the same operation, it is that one.
        """
        async with self._submitting:
            if self._shared:
                await self._take_back()
            body = self._encode(operation)
            if self._unsettled is not None and self._unsettled != body:
                await self._settle(self._unsettled)
                body = self._encode(operation)
            operation_id, early = await self._post(body)
        return AsyncPendingOp(
            self._transport, operation_id, convert, on_done=self._advance, early=early
        )

    async def leave_to_server(self, settings: StartLearning) -> AsyncLearning:
        """Tells the server to train the run, after everything that was submitted here.

        Raises:
            InvalidRequestError: a setting is wrong, or the run is learning something else already.
        """
        async with self._submitting:
            if self._unsettled is not None:
                await self._settle(self._unsettled)
            self._shared = True
            state = await AsyncRunsLearning(self._transport).start(self.run_id, settings)
        return AsyncLearning(self._transport, state, on_state=self._saw_learning)

    async def _take_back(self) -> None:
        """Goes on after the server's own operations.

        Raises:
            InvalidRequestError: the server is training the model.
        """
        try:
            state = await AsyncRunsLearning(self._transport).get(self.run_id)
        except exceptions.NotFoundError:
            self._shared = False  # It has never begun.
            return
        self._saw_learning(state)
        if state.active:
            raise exceptions.InvalidRequestError(
                f"{self.run_id} is learning from {state.alias!r}, so nobody else trains it; stop that first",
                param="run_id",
            )
        # It may be an earlier learning, when the last one was refused.
        self._seq = max(self._seq, state.next_seq)
        self._shared = False

    def _saw_learning(self, state: LearningState) -> None:
        self.step = max(self.step, int(state.policy_version.rpartition("@")[2]))

    def _encode(self, operation: wire.AnyOperation) -> bytes:
        return msgspec.msgpack.encode(wire.SubmitOperation(seq=self._seq, operation=operation))

    async def _settle(self, body: bytes) -> None:
        try:
            await self._post(body)
        except exceptions.RiverError as error:
            if self._unsettled is not None:
                raise
            logger.warning("an earlier operation of %s was refused: %s", self.run_id, error)

    async def _post(
        self, body: bytes
    ) -> tuple[str, asyncio.Task[wire.OperationAccepted | None] | None]:
        """The accepted operation's id, and the rest of the answer if that is to come."""
        may_be_done = self._unsettled == body
        self._unsettled = body
        try:
            answer = await self._transport.call_early(
                "POST",
                f"/runs/{self.run_id}/operations",
                wire.OperationAccepted,
                body=body,
                wait_s=limits.LONG_POLL_FIRST_S,
            )
        except exceptions.InvalidRequestError:
            self._unsettled = None  # So would every attempt have been: it was never accepted.
            raise
        except exceptions.RiverError as error:
            if not (may_be_done or error.may_be_done):
                self._unsettled = None
            raise
        self._unsettled = None
        self._seq += 1
        if isinstance(answer, wire.OperationAccepted):
            return answer.operation_id, None
        return answer.location.rpartition("/")[2], answer.body

    def _advance(self, result: wire.OperationResult) -> None:
        run_id, _, step = (result.policy_version or "").rpartition("@")
        if run_id == self.run_id and step.isdigit():
            self.step = max(self.step, int(step))
