"""Follows the journal of one base model: tells of every operation in it, from the oldest, once or more.

Only headers are fetched: the message id says which operation it is, and bodies are read when their turn comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from river_engine.protocol import subject_token
from river_trainer import limits
from river_trainer.errors import TrainerError
from river_trainer.journal import MESSAGE_ID_HEADER
from river_trainer.protocol import ADVANCES_HEADER, TENANT_HEADER, TOKENS_HEADER, TRAIN_STREAM
from river_trainer.scheduling import Entry

logger = logging.getLogger("river.trainer")


class _MissedError(TrainerError):
    """The server has delivered something that did not arrive: what follows must not be taken for the next."""


class Follower:
    """`caught_up` once everything that was in the journal at the start has been told."""

    def __init__(self, js: JetStreamContext, base_model: str) -> None:
        self.caught_up = False
        self._js = js
        self._filter = f"train.{subject_token(base_model)}.*"
        self._next_stream_seq = 1

    async def entries(self) -> AsyncIterator[Entry]:
        """Every operation of the journal, for ever. NATS may go away and come back in between."""
        while True:
            try:
                async for entry in self._follow():
                    yield entry
            except (nats.errors.Error, OSError, _MissedError) as error:
                logger.warning("following the journal: %r", error)
                await asyncio.sleep(limits.RETRY_DELAY_MIN_S)

    async def _follow(self) -> AsyncIterator[Entry]:
        """Until the consumer is lost."""
        subscription = await self._js.pull_subscribe(
            self._filter,
            stream=TRAIN_STREAM,
            config=ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=self._next_stream_seq,
                ack_policy=AckPolicy.NONE,
                headers_only=True,
                inactive_threshold=limits.CONSUMER_INACTIVE_S,
                mem_storage=True,
            ),
        )
        delivered = 0
        try:
            self.caught_up |= not (await subscription.consumer_info()).num_pending
            while True:
                try:
                    messages = await subscription.fetch(
                        limits.FETCH_BATCH, timeout=limits.FETCH_TIMEOUT_S
                    )
                except TimeoutError:
                    # An error if a restart of the server has lost the consumer.
                    info = await subscription.consumer_info()
                    if info.delivered is not None and info.delivered.consumer_seq > delivered:
                        raise _MissedError(
                            "messages went into a connection that was lost"
                        ) from None
                    continue
                for message in messages:
                    if message.metadata.sequence.consumer != delivered + 1:
                        raise _MissedError("messages went into a connection that was lost")
                    delivered += 1
                    self._next_stream_seq = message.metadata.sequence.stream + 1
                    entry = _entry_of(message)
                    if entry is not None:
                        yield entry
                    self.caught_up |= not message.metadata.num_pending
        finally:
            if self._js._nc.is_connected:  # noqa: SLF001  # there is no other way to ask
                await subscription.unsubscribe()


def _entry_of(message: Msg) -> Entry | None:
    headers = message.headers or {}
    run_id, _, seq = headers.get(MESSAGE_ID_HEADER, "").rpartition(":")
    if not run_id or not seq.isdigit():
        logger.error("message without an operation's identity", extra={"subject": message.subject})
        return None
    tokens = headers.get(TOKENS_HEADER, "0")
    return Entry(
        run_id,
        int(seq),
        message.metadata.sequence.stream,
        tenant_id=headers.get(TENANT_HEADER, ""),
        tokens=max(int(tokens) if tokens.isdigit() else 0, limits.OPERATION_TOKENS_MIN),
        # Not knowing is no reason to let something overtake.
        advances=headers.get(ADVANCES_HEADER, "1") != "0",
    )
