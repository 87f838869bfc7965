"""What the gateway needs of asyncpg, with types, and the pool of connections.

The pool opens connections when it is first asked, so that the gateway can start while Postgres does.
"""

# asyncpg has no types of its own; the protocols below give it those that we use.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeAlias, cast

import asyncpg

from river_billing.database import Connection
from river_gateway.limits import POSTGRES_CONNECTIONS_MAX, POSTGRES_TIMEOUT_S

POSTGRES_AWAY: tuple[type[Exception], ...] = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    OSError,  # refused, out of reach, a name that does not resolve, too late
)
"""What a statement raises when Postgres is away or going away: a dying server shows up as any of these."""

UNSTORABLE: tuple[type[Exception], ...] = (
    asyncpg.CharacterNotInRepertoireError,
    asyncpg.UntranslatableCharacterError,
)
"""What a statement raises about a text with a NUL. Bodies are checked for it; names in URLs are left to this."""

BAD_VALUES: tuple[type[Exception], ...] = (asyncpg.DataError,)
"""What a statement raises about a value that it will never take."""

POSTGRES_FAILED: tuple[type[Exception], ...] = (*POSTGRES_AWAY, asyncpg.PostgresError)
"""Whatever a statement raises. For work in the background, which goes on: its end would be the process's."""

NameTakenError = asyncpg.UniqueViolationError

Row: TypeAlias = Mapping[str, Any]


class Database(Protocol):
    """A pool or a connection: whatever runs statements."""

    async def execute(self, query: str, *args: Any) -> str:
        """Runs a statement; returns its status, such as `UPDATE 1`."""
        ...

    async def fetch(self, query: str, *args: Any) -> Sequence[Row]:
        """All rows."""
        ...

    async def fetchrow(self, query: str, *args: Any) -> Row | None:
        """The first row."""
        ...

    async def fetchval(self, query: str, *args: Any) -> Any:
        """The first column of the first row, or None."""
        ...


class Pool(Database, Protocol):
    """Connections to borrow."""

    def acquire(self) -> AbstractAsyncContextManager[Connection]:
        """A connection for a block."""
        ...

    async def close(self) -> None:
        """Closes them all."""
        ...


async def open_pool(url: str) -> Pool:
    """A pool that connects when it is first asked, and anew after a loss."""
    pool = await asyncpg.create_pool(
        url,
        min_size=0,
        max_size=POSTGRES_CONNECTIONS_MAX,
        timeout=POSTGRES_TIMEOUT_S,
        command_timeout=POSTGRES_TIMEOUT_S,
    )
    return cast("Pool", pool)
