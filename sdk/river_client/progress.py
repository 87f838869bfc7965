"""Progress bars: on a terminal, for what takes long, on stderr; none elsewhere."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Protocol

from river_client import limits


class Bar(Protocol):
    """What a download tells."""

    def update(self, n: float) -> object:
        """`n` more bytes are here."""
        ...


class _NoBar:
    def update(self, n: float) -> None:
        """Nobody is looking."""


def on_terminal() -> bool:
    """Whether somebody is looking at stderr."""
    return sys.stderr is not None and sys.stderr.isatty()  # pyright: ignore[reportUnnecessaryComparison]


@asynccontextmanager
async def waiting(label: str, reason: Callable[[], str] = str) -> AsyncGenerator[None]:
    """Shows how long the block has been waiting, once it has been a while, and the `reason` there is by then."""
    if not on_terminal():
        yield
        return
    task = asyncio.create_task(_show_waiting(label, reason))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _show_waiting(label: str, reason: Callable[[], str]) -> None:
    await asyncio.sleep(limits.PROGRESS_DELAY_S)
    from tqdm import tqdm  # noqa: PLC0415 - only who waits pays for it

    with tqdm(desc=label, bar_format="{desc} {elapsed}", leave=False, file=sys.stderr) as bar:
        while True:
            await asyncio.sleep(limits.PROGRESS_INTERVAL_S)
            why = reason()
            bar.set_description_str(f"{label}: {why}" if why else label)  # which also refreshes


@contextmanager
def downloading(label: str, *, total_bytes: int, done_bytes: int) -> Generator[Bar]:
    """A bar of bytes."""
    if not on_terminal():
        yield _NoBar()
        return
    from tqdm import tqdm  # noqa: PLC0415 - only who downloads pays for it

    with tqdm(
        desc=label,
        total=total_bytes,
        initial=done_bytes,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
    ) as bar:
        yield bar
