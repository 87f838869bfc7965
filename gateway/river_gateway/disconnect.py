"""Never working for a client that has left.

No ASGI server cancels a handler whose client has gone, so the disconnect message is waited for beside the work.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from river_gateway.errors import ClientGoneError
from river_gateway.limits import CLIENT_WATCHED_AFTER_S

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

    from litestar.types import Receive

ResultType = TypeVar("ResultType")


class WhileClientStays:
    """A block of work that is cancelled soon after the client disconnects; the request's body must have been read.

    Looking begins `CLIENT_WATCHED_AFTER_S` into the work: most answers are there by then, and need no task beside them.

    Raises:
        ClientGoneError: the client left first.
    """

    __slots__ = ("_cancelling", "_gone", "_leaving", "_loop", "_receive", "_task", "_timer")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        self._leaving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task(self._loop)
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._timer = self._loop.call_later(CLIENT_WATCHED_AFTER_S, self._watch)

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._leaving is not None:
            self._leaving.remove_done_callback(self._left)
            self._leaving.cancel()
        # As asyncio.timeout does it: only our own cancellation is turned into an error.
        if (
            self._gone
            and self._task.uncancel() <= self._cancelling
            and error_type is asyncio.CancelledError
        ):
            raise ClientGoneError("the client closed the connection") from error

    def _watch(self) -> None:
        self._leaving = self._loop.create_task(_disconnected(self._receive))
        self._leaving.add_done_callback(self._left)

    def _left(self, leaving: asyncio.Task[None]) -> None:
        if not leaving.cancelled():
            leaving.exception()
            self._gone = True
            self._task.cancel()


async def unless_client_leaves(
    receive: Receive, work: Coroutine[Any, Any, ResultType]
) -> ResultType:
    """The result of `work`, which is cancelled as soon as the client disconnects; the body must have been read.

    Raises:
        ClientGoneError: the client left first.
    """
    async with WhileClientStays(receive):
        return await work


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
