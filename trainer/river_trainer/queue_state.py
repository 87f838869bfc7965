"""Answers what an operation without a result is waiting for."""

from __future__ import annotations

from collections.abc import Sequence

from nats.aio.client import Client
from nats.aio.msg import Msg

from river_trainer import journal
from river_trainer.protocol import QueueState, operation_id, queue_subject
from river_trainer.scheduling import Entry, Scheduler


class QueueStates:
    """`recovering` until the first batch; `running` knows the batch that is being done."""

    def __init__(self, client: Client, base_model: str, scheduler: Scheduler) -> None:
        self._client = client
        self._subject = queue_subject(base_model)
        self._scheduler = scheduler
        self._running: frozenset[str] | None = None
        self._draining = False

    def running(self, batch: Sequence[Entry]) -> None:
        """These operations are being done from now on, and those before no more."""
        self._running = frozenset(operation_id(entry.run_id, entry.seq) for entry in batch)

    def drain(self, *, draining: bool) -> None:
        """Whether anything new is begun."""
        self._draining = draining

    async def answer(self) -> None:
        """Answers requests until cancelled; the connection makes the subscription anew after a loss."""
        subscription = await self._client.subscribe(self._subject)
        async for request in subscription.messages:
            await self._respond(request)

    async def _respond(self, request: Msg) -> None:
        if request.reply:
            state = self.of(request.data.decode(errors="replace"))
            await self._client.publish(request.reply, journal.encode(state))

    def of(self, operation: str) -> QueueState:
        """The state of an operation."""
        if self._running is None:
            return QueueState(
                state="recovering", reason="the trainer has just started and reads its journal"
            )
        if operation in self._running:
            return QueueState(state="running", reason="it is being computed")
        run_id, _, text = operation.rpartition("-")
        seq = int(text) if text.isdigit() else -1
        missing = self._scheduler.missing_before(run_id, seq)
        if missing is not None:
            return QueueState(
                state="waiting_for_gap", reason=f"operation {missing} of its run has not arrived"
            )
        ahead = self._scheduler.ahead_of(run_id, seq)
        if ahead is not None:
            reason = f"{ahead} other operations are waiting too"
            if self._draining:
                reason = "an admin has told the trainer to begin nothing new for now"
            return QueueState(state="queued", reason=reason, ahead=ahead)
        return QueueState(
            state="unknown", reason="the trainer has not seen it, or has just done it"
        )
