"""What requests have used when they are over, kept for a while: for whoever bills one that was cut in the middle.

A stream's own last word, or a comment in it, says as much as its reader has read. What was produced for a reader that
has left in between is known here alone, and only once the request has ended.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from river_engine.limits import FINAL_COUNT_WAIT_S, FINAL_COUNTS_MAX
from river_engine.protocol import StreamUsage
from river_engine.stream_usage import counting


class FinalCounts:
    """By the request's own id, as its sender called it; the oldest are forgotten."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, asyncio.Future[StreamUsage]] = OrderedDict()

    @contextmanager
    def kept(self, request_id: str) -> Iterator[None]:
        """In the block the current task answers that request; at its end nothing more is produced for it."""
        final: asyncio.Future[StreamUsage] = asyncio.get_running_loop().create_future()
        self._counts[request_id] = final
        while len(self._counts) > FINAL_COUNTS_MAX:
            self._counts.popitem(last=False)
        with counting() as so_far:
            try:
                yield
            finally:
                final.set_result(so_far.usage())

    async def of(self, request_id: str) -> StreamUsage | None:
        """What a request has used, once it has ended; None if it is unknown or does not end in time."""
        final = self._counts.get(request_id)
        if final is None:
            return None
        await asyncio.wait([final], timeout=FINAL_COUNT_WAIT_S)
        return final.result() if final.done() else None
