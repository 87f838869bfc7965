"""Rewards of stored completions, the training data made of them, and a loop that learns from them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

from river_client import exceptions, feedback_wire, wire
from river_client.transport import Transport

logger = logging.getLogger("river.client")

Baseline = Literal["prompt", "batch", "none"]


async def give_feedback(transport: Transport, given: Sequence[feedback_wire.Feedback]) -> None:
    """Attaches rewards to stored completions: all or none of them."""
    await transport.tell("POST", "/feedback", body=feedback_wire.GiveFeedback(feedback=[*given]))


async def claim_feedback(
    transport: Transport, asked: feedback_wire.ClaimFeedback
) -> feedback_wire.FeedbackBatch:
    """Training data of what the consumer has not had yet."""
    return await transport.call(
        "POST", "/feedback/batches", feedback_wire.FeedbackBatch, body=asked
    )


async def acknowledge_feedback(transport: Transport, batch_id: str) -> None:
    """Says that a batch has been learnt from."""
    await transport.tell("POST", f"/feedback/batches/{quote(batch_id, safe='')}/ack")


@dataclass(slots=True)
class Learning:
    """How far a model has come that learns from an alias; `error` is what ended it, if something did."""

    alias: str
    steps: int = 0
    completions: int = 0
    error: exceptions.RiverError | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def active(self) -> bool:
        """Whether it goes on."""
        return self.task is not None and not self.task.done()


async def learn_forever(
    transport: Transport,
    learning: Learning,
    asked: feedback_wire.ClaimFeedback,
    train: Callable[[list[wire.Datum]], Awaitable[object]],
    *,
    poll_s: float,
) -> None:
    """Trains on each batch of feedback as it comes, until told to stop.

    A batch is acknowledged once it has been applied: if this process dies in between, it is handed out again when its
    claim ends.
    """
    try:
        while not learning.stopping.is_set():
            batch = await claim_feedback(transport, asked)
            if batch.batch_id is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(learning.stopping.wait(), poll_s)
                continue
            if any(_teaches(datum) for datum in batch.data):
                await train(batch.data)
                learning.steps += 1
            await acknowledge_feedback(transport, batch.batch_id)
            learning.completions += len(batch.data)
    except exceptions.RiverError as error:
        logger.warning("learning from %s ended: %s", learning.alias, error)
        learning.error = error


def _teaches(datum: wire.Datum) -> bool:
    """Whether a sequence was better or worse than what it is compared with; Adam would move without a gradient too."""
    assert not isinstance(datum.advantages, wire.Tensor)
    return any(datum.advantages or ())
