"""The table of what was used, its hourly sums, and how events get in: once, with their price."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from msgspec import Struct

from river_billing import limits
from river_billing.budgets import warn_of_budgets
from river_billing.database import Connection
from river_billing.errors import RejectedEventError
from river_billing.events import UsageEvent
from river_client.credit_wire import BudgetWarning
from river_client.wire import UsageLine

# Whoever writes what a tenant used or may use waits here for its turn, always in the same order.
_LOCK_TENANTS = "select lock_tenants($1::text[])"

# One statement, so that events, sums and books cannot part. Only rows that were really new count, so
# a replay changes nothing. All is written in a fixed order, so that two recorders cannot deadlock.
# What an event had set aside is given free as it is charged: in between, nobody sees it twice or not at all.
_RECORD = """
with input as (
  select * from unnest(
    $1::uuid[], $2::text[], $3::timestamptz[], $4::text[], $5::text[], $6::text[], $7::text[],
    $8::text[], $9::text[], $10::text[], $11::integer[], $12::bigint[], $13::uuid[], $14::bigint[]
  ) as i (event_id, kind, occurred_at, tenant_id, key_id, run_id, session_id,
          end_user, base_model, policy_version, context_length, quantity, lease_id, reserved)
), inserted as (
  insert into usage_event (event_id, kind, occurred_at, tenant_id, key_id, run_id, session_id,
                           end_user, base_model, policy_version, context_length, quantity,
                           price_id, amount_nano_usd)
  select i.event_id, i.kind, i.occurred_at, i.tenant_id, i.key_id, i.run_id, i.session_id,
         i.end_user, i.base_model, i.policy_version, i.context_length, i.quantity,
         p.price_id, coalesce(round_half_even(i.quantity * p.nano_usd_per_unit), 0)::bigint
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
), of_month as (
  insert into usage_month as m (tenant_id, month, key_id, amount_nano_usd)
  select tenant_id, date_trunc('month', occurred_at at time zone 'UTC')::date, key_id,
         sum(amount_nano_usd)
  from inserted group by 1, 2, 3 order by 1, 2, 3
  on conflict (tenant_id, month, key_id) do update set
    amount_nano_usd = m.amount_nano_usd + excluded.amount_nano_usd
), charged as (
  select i.tenant_id, sum(i.amount_nano_usd)::bigint as amount,
         case t.billing when 'prepaid' then 'credit' else 'receivable' end as account
  from inserted i left join tenant t using (tenant_id)
  group by i.tenant_id, t.billing having sum(i.amount_nano_usd) > 0
), begun as (
  insert into ledger_transaction (tenant_id, kind)
  select tenant_id, 'usage' from charged order by tenant_id
  returning transaction_id, tenant_id
), posted as (
  insert into ledger_entry (transaction_id, tenant_id, account, amount_nano_usd)
  select b.transaction_id, b.tenant_id, e.account, e.amount
  from begun b join charged c using (tenant_id)
  cross join lateral (values (c.account, -c.amount), ('revenue', c.amount)) as e (account, amount)
), of_lease as (
  update credit_lease l set posted_nano_usd = l.posted_nano_usd + used.amount
  from (
    select i.lease_id, i.tenant_id, sum(i.reserved)::bigint as amount
    from input i join inserted using (event_id, kind)
    where i.reserved > 0 group by 1, 2
  ) used
  where (l.lease_id, l.tenant_id) = (used.lease_id, used.tenant_id)
), of_hold as (
  delete from credit_hold where event_id in (select event_id from inserted)
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
    """What a batch changed: new lines, (model, kind) pairs without a price, budgets that it brought near their end."""

    lines: int
    unpriced: list[tuple[str, str]]
    warnings: list[BudgetWarning]


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

    Posts them to the ledger, gives free what was set aside for them, and finds the budgets that they bring near their
    end. The caller has opened a transaction. The partitions must exist (`ensure_partitions`). A line without a price is
    kept, at zero.
    """
    # Of an event that comes twice, one is enough.
    rows = [
        row
        for event in {event.event_id: event for event in events}.values()
        for row in _rows(event)
    ]
    if not rows:
        return Recorded(lines=0, unpriced=[], warnings=[])
    tenants = sorted({event.tenant_id for event in events})
    await connection.execute(_LOCK_TENANTS, tenants)
    counts = await connection.fetch(_RECORD, *(list(column) for column in zip(*rows, strict=True)))
    return Recorded(
        lines=sum(row["lines"] for row in counts),
        unpriced=[(row["base_model"], row["kind"]) for row in counts if row["unpriced"]],
        warnings=await warn_of_budgets(connection, tenants),
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
    for name, identity in (("event_id", event.event_id), ("lease_id", event.lease_id)):
        try:
            if identity is not None:
                uuid.UUID(identity)
        except ValueError as error:
            raise RejectedEventError(f"{name} is not a UUID") from error
    in_range = limits.OCCURRED_AT_MIN_S <= event.occurred_at < limits.OCCURRED_AT_MAX_S
    if not (math.isfinite(event.occurred_at) and in_range):
        raise RejectedEventError(f"occurred_at={event.occurred_at} is out of range")
    if not 0 < event.context_length <= limits.CONTEXT_LENGTH_MAX:
        raise RejectedEventError(f"context_length={event.context_length} is out of range")
    if not 0 <= event.reserved_nano_usd <= limits.AMOUNT_MAX_NANO_USD:
        raise RejectedEventError(f"reserved_nano_usd={event.reserved_nano_usd} is out of range")
    for kind, quantity in event.quantities.items():
        if not 0 <= quantity <= limits.QUANTITY_MAX:
            raise RejectedEventError(f"quantities[{kind}]={quantity} is out of range")


def _rows(event: UsageEvent) -> list[tuple[object, ...]]:
    """A row of `input` for each kind that was used at all; what was set aside goes with the first."""
    used = [(kind, quantity) for kind, quantity in event.quantities.items() if quantity]
    lease_id = None if event.lease_id is None else uuid.UUID(event.lease_id)
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
            lease_id,
            event.reserved_nano_usd if number == 0 and lease_id is not None else 0,
        )
        for number, (kind, quantity) in enumerate(used)
    ]
