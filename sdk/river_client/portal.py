"""How synchronous code uses the asynchronous client: an event loop in a thread, and methods that wait for it."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from river_client import limits

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Twin = TypeVar("Twin")


class Portal:
    """An event loop in a daemon thread, started when it is first needed.

    Handles that come out of pickles share one in their process, which no handle can close.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self._shared = shared
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """The coroutine's result; whatever ends the wait, such as Ctrl-C, ends the coroutine too."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._started())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Stops the thread."""
        if self._shared:
            return
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(limits.CLOSE_TIMEOUT_S)

    def __reduce__(self) -> tuple[Callable[[], Portal], tuple[()]]:
        return shared_portal, ()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run_loop, args=[self._loop], name="river-client", daemon=True
                )
                self._thread.start()
            return self._loop


@functools.cache
def shared_portal() -> Portal:
    """The one of all handles that came out of pickles."""
    return Portal(shared=True)


async def next_or_none(pieces: AsyncGenerator[Result]) -> Result | None:
    """The next piece; None when there are no more."""
    return await anext(pieces, None)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(_end_tasks())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _end_tasks() -> None:
    """Cancels what a closed client left running, such as heartbeats."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Blocking:
    """Something whose work its asynchronous twin does."""

    _portal: Portal
    _twin: Any


def blocking(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Any, Parameters], Result]:
    """A method of the twin that blocks until it is done."""

    @functools.wraps(method)
    def call(self: Blocking, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return self._portal.run(method(self._twin, *args, **kwargs))  # pyright: ignore[reportPrivateUsage]

    return call


def handing(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Twin]],
    handle: Callable[[Portal, Twin], Result],
) -> Callable[Concatenate[Any, Parameters], Result]:
    """A method of the twin that blocks until it is done, and wraps what it returns in its synchronous `handle`."""

    @functools.wraps(method)
    def call(self: Blocking, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        portal, twin = self._portal, self._twin  # pyright: ignore[reportPrivateUsage]
        return handle(portal, portal.run(method(twin, *args, **kwargs)))

    return call
