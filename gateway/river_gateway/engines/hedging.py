"""A second copy of a request that takes long: the first answer counts, the other is cancelled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from river_gateway.errors import RateLimitedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

Answer = TypeVar("Answer")

_MENDABLE = (UnavailableError, RateLimitedError)
"""What another engine may do better. Anything else is the request's fault and the same everywhere."""


async def first_answer(
    first: Coroutine[Any, Any, Answer],
    second: Callable[[], Coroutine[Any, Any, Answer | None]],
    *,
    after_s: float,
    discard: Callable[[Answer], None],
) -> Answer:
    """What `first` answers or, if that takes longer than `after_s`, what `first` and `second` answer first.

    `second` may answer None: then it is as if it had not been asked, as when it fails. An answer that comes at the same
    moment as the one that is returned goes to `discard`; what is still working is cancelled, and has ended on return.

    Raises whatever `first` raises if there is no answer.
    """
    asked_first: Coroutine[Any, Any, Answer | None] = first
    asking = asyncio.create_task(asked_first)
    tasks: list[asyncio.Task[Answer | None]] = [asking]
    # None until its answer is returned: of a request that is cancelled meanwhile every answer is discarded.
    winner: asyncio.Task[Answer | None] | None = None
    try:
        pending = (await asyncio.wait(tasks, timeout=after_s))[1]
        if pending:
            tasks.append(asyncio.create_task(second()))
            pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            answered = [task for task in tasks if task in done and _answer_of(task) is not None]
            if answered:
                winner = answered[0]
                break
            if asking in done and not isinstance(asking.exception(), _MENDABLE):
                break
        winner = winner or asking
        answer = winner.result()
        assert answer is not None
        return answer
    finally:
        losers = [task for task in tasks if task is not winner]
        for task in losers:
            task.cancel()
        await asyncio.gather(*losers, return_exceptions=True)
        for task in losers:
            if (late := _answer_of(task)) is not None:
                discard(late)


def _answer_of(task: asyncio.Task[Answer | None]) -> Answer | None:
    """What an ended task has answered; None if nothing."""
    if task.cancelled() or task.exception() is not None:
        return None
    return task.result()
