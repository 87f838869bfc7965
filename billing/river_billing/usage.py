"""The table of what was used, its hourly sums, and how events get in: once, with their price."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from msgspec import Struct

from river_billing import limits
from river_billing.database import Connection
from river_billing.errors import RejectedEventError
from river_billing.events import UsageEvent
from river_client.wire import UsageLine

# One statement, so that events and sums cannot part. Only rows that were really new are counted, so
# a replay changes nothing. All is written in a fixed order, so that two recorders cannot deadlock.
_RECORD = """
with input as (
  select * from unnest(
    $1::uuid[], $2::text[], $3::timestamptz[], $4::text[], $5::text[], $6::text[], $7::text[],
    $8::text[], $9::text[], $10::text[], $11::integer[], $12::bigint[]
  ) as i (event_id, kind, occurred_at, tenant_id, key_id, run_id, session_id,
          end_user, base_model, policy_version, context_length, quantity)
), inserted as (
  insert into usage_event (event_id, kind, occurred_at, tenant_id, key_id, run_id, session_id,
                           end_user, base_model, policy_version, context_length, quantity,
                           price_id, amount_nano_usd)
  select i.*, p.price_id, coalesce(round_half_even(i.quantity * p.nano_usd_per_unit), 0)::bigint
  from input i
  left join lateral price_in_force(i.base_model, i.context_length, i.kind, i.occurred_at) p on true
  order by i.event_id, i.kind
  on conflict do nothing
  returning *
), summed as (
  insert into usage_hour as h (tenant_id, hour, base_model, context_length, kind, key_id,
                               quantity, amount_nano_usd, events)
  select tenant_id, date_trunc('hour', occurred_at, 'UTC'), base_model, context_length, kind,
         key_id, sum(quantity), sum(amount_nano_usd), count(*)
  from inserted group by 1, 2, 3, 4, 5, 6 order by 1, 2, 3, 4, 5, 6
  on conflict (tenant_id, hour, base_model, context_length, kind, key_id) do update set
    quantity        = h.quantity + excluded.quantity,
    amount_nano_usd = h.amount_nano_usd + excluded.amount_nano_usd,
    events          = h.events + excluded.events
)
select base_model, kind, count(*) as lines, bool_or(price_id is null) as unpriced
from inserted group by 1, 2
"""

_LINES = """
select tenant_id, base_model, kind, context_length, sum(quantity)::bigint as quantity,
       sum(amount_nano_usd)::bigint as amount_nano_usd, sum(events)::bigint as events
from usage_hour
where ($1::text is null or tenant_id = $1)
  and ($2::timestamptz is null or hour >= date_trunc('hour', $2::timestamptz, 'UTC'))
  and ($3::timestamptz is null or hour < $3::timestamptz)
group by tenant_id, base_model, kind, context_length
order by tenant_id, base_model, kind, context_length
"""


class Recorded(Struct, frozen=True, kw_only=True):
    """What a batch changed: new lines, and the (model, kind) pairs that had no price."""

    lines: int
    unpriced: list[tuple[str, str]]


async def usage_lines(
    connection: Connection,
    *,
    tenant_id: str | None,
    since: datetime | None,
    until: datetime | None,
) -> list[UsageLine]:
    """Sums per tenant, model, context length and kind, of one tenant or (None) of all.

    Hours are whole: those that `since` and `until` fall into are included. None: open-ended.
    """
    rows = await connection.fetch(_LINES, tenant_id, since, until)
    return [
        UsageLine(
            tenant=row["tenant_id"],
            model=row["base_model"],
            kind=row["kind"],
            context_length=row["context_length"],
            quantity=row["quantity"],
            amount_nano_usd=row["amount_nano_usd"],
            events=row["events"],
        )
        for row in rows
    ]


async def record_usage(connection: Connection, events: Sequence[UsageEvent]) -> Recorded:
    """Writes the events that are not yet there: a line per kind, its price, its share of the sums.

    The partitions must exist (`ensure_partitions`). A line without a price is kept, at zero.
    """
    rows = [row for event in events for row in _rows(event)]
    if not rows:
        return Recorded(lines=0, unpriced=[])
    counts = await connection.fetch(_RECORD, *(list(column) for column in zip(*rows, strict=True)))
    return Recorded(
        lines=sum(row["lines"] for row in counts),
        unpriced=[(row["base_model"], row["kind"]) for row in counts if row["unpriced"]],
    )


async def ensure_partitions(connection: Connection, months: Sequence[datetime]) -> None:
    """Makes sure that the table has a partition for each month that one of `months` lies in."""
    for month in sorted({(moment.year, moment.month) for moment in months}):
        await connection.execute("select create_usage_partition(make_date($1, $2, 1))", *month)


def months_ahead(now: datetime) -> list[datetime]:
    """A moment in this month and in each of the next ones."""
    first = now.replace(day=1)
    months = [first]
    for _ in range(limits.PARTITION_MONTHS_AHEAD):
        first = (first + timedelta(days=32)).replace(day=1)
        months.append(first)
    return months


def moment(event: UsageEvent) -> datetime:
    """When the event occurred."""
    return datetime.fromtimestamp(event.occurred_at, UTC)


def check(event: UsageEvent) -> None:
    """Raises RejectedEventError unless the tables can hold every value of the event."""
    try:
        uuid.UUID(event.event_id)
    except ValueError as error:
        raise RejectedEventError("event_id is not a UUID") from error
    in_range = limits.OCCURRED_AT_MIN_S <= event.occurred_at < limits.OCCURRED_AT_MAX_S
    if not (math.isfinite(event.occurred_at) and in_range):
        raise RejectedEventError(f"occurred_at={event.occurred_at} is out of range")
    if not 0 < event.context_length <= limits.CONTEXT_LENGTH_MAX:
        raise RejectedEventError(f"context_length={event.context_length} is out of range")
    for kind, quantity in event.quantities.items():
        if not 0 <= quantity <= limits.QUANTITY_MAX:
            raise RejectedEventError(f"quantities[{kind}]={quantity} is out of range")


def _rows(event: UsageEvent) -> list[tuple[object, ...]]:
    """A row of `input` for each kind that was used at all."""
    return [
        (
            uuid.UUID(event.event_id),
            kind.value,
            moment(event),
            event.tenant_id,
            event.key_id,
            event.run_id,
            event.session_id,
            # Postgres holds no NUL, and what a client calls its user must not make its usage free.
            None if event.user is None else event.user.replace("\0", ""),
            event.base_model,
            event.policy_version,
            event.context_length,
            quantity,
        )
        for kind, quantity in event.quantities.items()
        if quantity
    ]
