"""What storing checkpoints costs: an event for each checkpoint and day (UTC), made when the day is over.

A checkpoint is stored from its creation until it is deleted, replaced or expires, whichever is first, to the second.
The quantity is in kilobyte-hours. A day is charged what the whole time up to its end comes to, rounded, less the same
up to its beginning, so that roundings never add up: over all its days a checkpoint is charged its size times its life,
to half a unit. The price is the one in force when the day's storage began.

The identity of an event is that of its checkpoint and day, and up to when a checkpoint has been charged is written
with it in one transaction: whoever charges a day again changes nothing, and days that were missed are made up for.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from river_billing import limits
from river_billing.amounts import divide_half_even
from river_billing.database import Connection
from river_billing.events import UsageEvent, UsageKind
from river_billing.partitions import ensure_partitions
from river_billing.usage import moment, record_usage

BYTE_SECONDS_PER_KILOBYTE_HOUR = 1000 * 3600
_DAY = timedelta(days=1)

_TRY_LOCK = "select pg_try_advisory_lock(hashtextextended('storage charges', 0))"
_UNLOCK = "select pg_advisory_unlock(hashtextextended('storage charges', 0))"

# All that was saved, replaced or deleted before that moment is in the tables by then.
_RECORDED_UNTIL = "select recorded_until from recorder_progress"

_DUE = """
select c.checkpoint_id, c.tenant_id, c.run_id, c.base_model, c.size_bytes, c.created_at,
       least(c.deleted_at, c.expires_at) as ended_at, c.storage_charged_until as charged_until,
       r.context_length, r.session_id, s.key_id
from checkpoint c join run r using (run_id) join session s on s.session_id = r.session_id
where coalesce(c.storage_charged_until, c.created_at) < least($1, c.deleted_at, c.expires_at)
order by c.checkpoint_id limit $2
"""

_CHARGED = """
update checkpoint c set storage_charged_until = t.until
from unnest($1::text[], $2::timestamptz[]) as t (checkpoint_id, until)
where c.checkpoint_id = t.checkpoint_id
"""


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint as storage sees it; `ended_at` is None while nothing is to end it."""

    checkpoint_id: str
    size_bytes: int
    created_at: datetime
    ended_at: datetime | None
    charged_until: datetime | None


async def charge_storage(connection: Connection) -> int:
    """Charges every day that is over, for all checkpoints; returns how many lines are new.

    Of several recorders one does it. The connection must be in no transaction.
    """
    if not await connection.fetchval(_TRY_LOCK):
        return 0
    try:
        recorded_until: datetime = await connection.fetchval(_RECORDED_UNTIL)
        until = start_of_day(recorded_until - timedelta(seconds=limits.STORAGE_GRACE_S))
        lines = 0
        while rows := await connection.fetch(_DUE, until, limits.STORAGE_CHECKPOINTS_MAX):
            lines += await _charge(connection, rows, until)
        return lines
    finally:
        await connection.execute(_UNLOCK)


async def _charge(
    connection: Connection, rows: Sequence[Mapping[str, Any]], until: datetime
) -> int:
    events = [event for row in rows for event in _events(row, until)]
    await ensure_partitions(connection, [moment(event) for event in events])
    async with connection.transaction():
        recorded = await record_usage(connection, events)
        await connection.execute(
            _CHARGED,
            [row["checkpoint_id"] for row in rows],
            [min(until, row["ended_at"] or until) for row in rows],
        )
    return recorded.lines


def _events(row: Mapping[str, Any], until: datetime) -> Iterator[UsageEvent]:
    stored = Stored(
        checkpoint_id=row["checkpoint_id"],
        size_bytes=row["size_bytes"],
        created_at=row["created_at"],
        ended_at=row["ended_at"],
        charged_until=row["charged_until"],
    )
    for began_at, kilobyte_hours in days_of(stored, until):
        yield UsageEvent(
            event_id=storage_event_id(stored.checkpoint_id, began_at),
            occurred_at=began_at.timestamp(),
            tenant_id=row["tenant_id"],
            key_id=row["key_id"],
            base_model=row["base_model"],
            context_length=row["context_length"],
            quantities={UsageKind.STORAGE: kilobyte_hours},
            run_id=row["run_id"],
            session_id=row["session_id"],
        )


def days_of(stored: Stored, until: datetime) -> Iterator[tuple[datetime, int]]:
    """When storage began on each day that is not charged yet, and the kilobyte-hours until it ended on that day."""
    ended_at = min(until, stored.ended_at or until)
    began_at = max(stored.charged_until or stored.created_at, stored.created_at)
    while began_at < ended_at:
        stopped_at = min(start_of_day(began_at) + _DAY, ended_at)
        yield began_at, _up_to(stored, stopped_at) - _up_to(stored, began_at)
        began_at = stopped_at


def storage_event_id(checkpoint_id: str, began_at: datetime) -> str:
    """The identity of what a checkpoint is charged for a day, the same whoever charges it, and however often."""
    day = start_of_day(began_at).date().isoformat()
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"river:storage:{checkpoint_id}:{day}"))


def start_of_day(at: datetime) -> datetime:
    """Midnight before, in UTC."""
    return at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _up_to(stored: Stored, at: datetime) -> int:
    """Kilobyte-hours since the checkpoint was made, by whole seconds."""
    seconds = (at - stored.created_at) // timedelta(seconds=1)
    return divide_half_even(stored.size_bytes * seconds, BYTE_SECONDS_PER_KILOBYTE_HOUR)
