"""Reads the bodies of operations from the journal, some of them before their turn comes."""

from __future__ import annotations

import asyncio

from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from river_trainer import journal, limits
from river_trainer.protocol import BODY_HEADER, TRAIN_STREAM, TrainMessage
from river_trainer.scheduling import Entry

Body = tuple[TrainMessage | None, str | None]
"""An operation's message, None if it is gone, and the name of its body's object, if it has one."""


class Reader:
    """The journal's bodies, each read once."""

    def __init__(self, js: JetStreamContext) -> None:
        self._js = js
        self._early: dict[int, asyncio.Task[Body]] = {}

    def expect(self, tasks: asyncio.TaskGroup, entry: Entry) -> None:
        """Begins to read an operation that will have its turn, unless it is big or enough are being read."""
        if (
            len(self._early) < limits.READ_AHEAD_OPERATIONS
            and entry.tokens <= limits.READ_AHEAD_TOKENS_MAX
            and entry.stream_seq not in self._early
        ):
            self._early[entry.stream_seq] = tasks.create_task(self._read(entry))

    async def read(self, entry: Entry) -> Body:
        """What an operation asks for."""
        early = self._early.pop(entry.stream_seq, None)
        return await (self._read(entry) if early is None else early)

    async def _read(self, entry: Entry) -> Body:
        async def attempt() -> Body:
            try:
                found = await self._js.get_msg(TRAIN_STREAM, seq=entry.stream_seq, direct=True)
                body = await journal.read_body(self._js, found.data, found.headers)
            except NotFoundError:
                return None, None
            return journal.decode_message(body), (found.headers or {}).get(BODY_HEADER)

        return await journal.retry(attempt, doing="reading an operation")
