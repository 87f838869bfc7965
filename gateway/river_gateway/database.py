"""The pool of connections to Postgres; opened lazily, so that the gateway starts while Postgres does."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from river_gateway.limits import POSTGRES_CONNECTIONS_MAX, POSTGRES_TIMEOUT_S

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Database: TypeAlias = (
        asyncpg.Pool[asyncpg.Record]
        | asyncpg.Connection[asyncpg.Record]
        | PoolConnectionProxy[asyncpg.Record]
    )


async def open_pool(url: str) -> asyncpg.Pool[asyncpg.Record]:
    """A pool that connects when it is first asked, and anew after a loss."""
    return await asyncpg.create_pool(
        url,
        min_size=0,
        max_size=POSTGRES_CONNECTIONS_MAX,
        timeout=POSTGRES_TIMEOUT_S,
        command_timeout=POSTGRES_TIMEOUT_S,
    )
