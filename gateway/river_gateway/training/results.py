"""Results of operations as the trainers publish them: heard once by each gateway, handed to whoever waits for one.

One subscription hears every result, and the latest are kept for a while, so that a result that comes before its client
asks is at hand. JetStream is asked only about operations that were not seen from their beginning to their end: those of
other gateways, of an earlier life, or from before the connection was last lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from river_gateway.limits import (
    LOOK_AGAIN_S,
    OPERATIONS_WATCHED_MAX,
    RESULTS_KEPT_MAX,
    RESULTS_KEPT_MAX_BYTES,
)
from river_trainer import journal, protocol

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from river_gateway.bus import Bus

_EVERY_RESULT = protocol.result_subject("*")
_PREFIX = protocol.result_subject("")


class Results:
    """What this gateway has heard, and who waits for more."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._kept: OrderedDict[str, Msg] = OrderedDict()
        self._kept_bytes = 0
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        # Operations accepted here and not heard of yet, by the number of losses of the connection at that time.
        self._watched: OrderedDict[str, int] = OrderedDict()
        self._stopped = False

    async def listen(self) -> None:
        """Begins to listen; the subscription lasts as long as the connection, and returns with it."""
        await self._bus.hear(_EVERY_RESULT, self._hear)

    async def stop_with(self, stopping: asyncio.Event) -> None:
        """Ends all waits once `stopping` is set."""
        await stopping.wait()
        self._stopped = True
        for operation in list(self._waiting):
            self._wake(operation)

    def watch(self, operation: str) -> None:
        """Says that an operation has just been accepted here for the first time: its result cannot be older."""
        if operation in self._kept:
            return
        self._watched[operation] = self._bus.losses
        while len(self._watched) > OPERATIONS_WATCHED_MAX:
            self._watched.popitem(last=False)

    async def result(self, operation: str, timeout_s: float) -> protocol.TrainResult | None:
        """The result of an operation, waiting up to `timeout_s` for it.

        Raises:
            UnavailableError: the connection is down.
            BusError: it went down meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        ask = not self._is_watched(operation)
        while True:
            self._bus.require()
            found = await self._at_hand(operation)
            if found is None and ask:
                found = await journal.find_result(self._bus.jetstream, operation)
            wait_s = min(LOOK_AGAIN_S, deadline - time.monotonic())
            if found is not None or wait_s <= 0 or self._stopped:
                return found
            # What the subscription has missed, in a reconnection or by being too slow, is found by asking.
            ask = not await self._heard(operation, wait_s)

    def _is_watched(self, operation: str) -> bool:
        return self._watched.get(operation) == self._bus.losses

    async def _at_hand(self, operation: str) -> protocol.TrainResult | None:
        message = self._kept.get(operation)
        if message is None:
            return None
        body = await journal.read_body(self._bus.jetstream, message.data, message.headers)
        return journal.decode_result(body)

    async def _heard(self, operation: str, wait_s: float) -> bool:
        """Whether the result came, or all waits ended, within `wait_s`."""
        if operation in self._kept:
            return True
        arriving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(operation, set())
        waiters.add(arriving)
        try:
            done, _ = await asyncio.wait((arriving,), timeout=wait_s)
            return bool(done)
        finally:
            waiters.discard(arriving)
            if not waiters and self._waiting.get(operation) is waiters:
                del self._waiting[operation]

    async def _hear(self, message: Msg) -> None:
        operation = message.subject.removeprefix(_PREFIX)
        self._watched.pop(operation, None)
        self._keep(operation, message)
        self._wake(operation)

    def _keep(self, operation: str, message: Msg) -> None:
        replaced = self._kept.pop(operation, None)
        if replaced is not None:
            self._kept_bytes -= len(replaced.data)
        self._kept[operation] = message
        self._kept_bytes += len(message.data)
        while len(self._kept) > RESULTS_KEPT_MAX or self._kept_bytes > RESULTS_KEPT_MAX_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped.data)

    def _wake(self, operation: str) -> None:
        for arriving in self._waiting.pop(operation, ()):
            if not arriving.done():
                arriving.set_result(None)
