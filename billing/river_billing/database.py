"""What billing needs of asyncpg, with types."""

# asyncpg has no types of its own; the protocol below gives it those that we use.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import asyncpg

from river_billing import limits

OUTAGES = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a dying server looks like from the middle of a reply
)
"""What a statement raises when Postgres is away or going away; it may work later."""

REFUSALS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
"""What a statement raises when its own values are wrong; it will never work."""

CHECK_VIOLATED = asyncpg.CheckViolationError
"""What an insert raises that breaks a constraint, or, with no `constraint_name`, that finds no partition."""

CANCELLED = asyncpg.QueryCanceledError
"""What a statement raises that took longer than it was given."""


FAILURES = (asyncpg.PostgresError, TimeoutError)
"""What a statement raises that fails on a connection that may well work: the next statement tells."""

LEAVING = asyncpg.LockNotAvailableError
"""What an insert raises whose month is being detached: it waits for readers, and works when they are gone."""


class Connection(Protocol):
    """An asyncpg connection, of its own or from a pool."""

    async def execute(self, query: str, *args: Any) -> str:
        """Runs a statement; returns its status, such as `UPDATE 1`."""
        ...

    async def fetch(self, query: str, *args: Any) -> Sequence[Mapping[str, Any]]:
        """All rows."""
        ...

    async def fetchrow(self, query: str, *args: Any) -> Mapping[str, Any] | None:
        """The first row."""
        ...

    async def fetchval(self, query: str, *args: Any) -> Any:
        """The first column of the first row, or None."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """A transaction, or a savepoint inside one."""
        ...


def violated_constraint(error: Exception) -> str | None:
    """The name of the constraint that a statement broke, if it has one."""
    return getattr(error, "constraint_name", None)


@asynccontextmanager
async def connected(
    postgres_url: str, *, statement_timeout_s: float = limits.STATEMENT_TIMEOUT_S
) -> AsyncGenerator[Connection]:
    """A connection for the block, without waiting for a server that hangs.

    Raises:
        OUTAGES: Postgres is not there.
    """
    connection = await asyncpg.connect(
        postgres_url,
        timeout=limits.CONNECT_TIMEOUT_S,  # pyright: ignore[reportArgumentType] - any number will do
        command_timeout=statement_timeout_s,
    )
    try:
        yield connection
    finally:
        connection.terminate()
