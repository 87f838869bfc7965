"""The monthly partitions of `usage_event`: made ahead, and set aside when they are old.

A month is made before it begins, and in any case before its first event is written, however late that comes. After
`attached_months` it may be detached: it is then a table of its own, `usage_event_YYYY_MM`, that can be dumped, moved
or left where it is, and its hours stay in `usage_hour`. Nothing here drops one; `drop_usage_partition` does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from river_billing import limits
from river_billing.database import CANCELLED, Connection

logger = logging.getLogger("river.billing")

_CREATE = "select create_usage_partition(month) from unnest($1::date[]) as month"
_TRY_LOCK = "select pg_try_advisory_lock(hashtextextended('usage_event detaching', 0))"
_UNLOCK = "select pg_advisory_unlock(hashtextextended('usage_event detaching', 0))"
_LEAVING = "select name from usage_partitions where leaving order by name"
_OLD = "select name from usage_partitions where attached and month < $1 order by name"


async def ensure_partitions(connection: Connection, moments: Sequence[datetime]) -> None:
    """Makes sure that events of each of the moments have a partition.

    Raises:
        REFUSALS: one of them is of a month that was dropped.
    """
    if moments:
        months = {moment.astimezone(UTC).date().replace(day=1) for moment in moments}
        await connection.execute(_CREATE, sorted(months))


async def maintain_partitions(
    connection: Connection, now: datetime, attached_months: int | None
) -> list[str]:
    """Makes the partitions of the next months; returns those that it detached.

    `attached_months` counts whole months before the current one that stay attached; None is all of them. Detaching
    hinders no writer. Several recorders at once are safe: one does it. What takes too long is left for the next time.
    """
    await ensure_partitions(connection, months_ahead(now))
    if not await connection.fetchval(_TRY_LOCK):
        return []
    # It waits for everybody who may still read the month, which can be long; the next time it is taken up again.
    await connection.execute(f"set statement_timeout = {1000 * limits.DETACH_TIMEOUT_S:.0f}")
    detached: list[str] = []
    try:
        for row in await connection.fetch(_LEAVING):
            await _detach(connection, row["name"], "finalize")
            detached.append(row["name"])
        if attached_months is not None:
            for row in await connection.fetch(_OLD, months_before(now, attached_months).date()):
                await _detach(connection, row["name"], "concurrently")
                detached.append(row["name"])
    except CANCELLED as error:
        logger.warning("a month of usage could not be detached now: %s", error)
    finally:
        await connection.execute("reset statement_timeout")
        await connection.execute(_UNLOCK)
    return detached


async def _detach(
    connection: Connection, partition: str, how: Literal["concurrently", "finalize"]
) -> None:
    await connection.execute(f"alter table usage_event detach partition {partition} {how}")
    logger.info("%s is detached", partition)


def months_ahead(now: datetime) -> list[datetime]:
    """A moment in this month and in each of the next ones."""
    first = now.replace(day=1)
    months = [first]
    for _ in range(limits.PARTITION_MONTHS_AHEAD):
        first = (first + timedelta(days=32)).replace(day=1)
        months.append(first)
    return months


def months_before(now: datetime, months: int) -> datetime:
    """The first moment of the month so many months before that of `now`."""
    number = 12 * now.year + now.month - 1 - months
    return datetime(number // 12, number % 12 + 1, 1, tzinfo=UTC)
