"""The table of what was used, its hourly sums, and how events get in: once, with their price."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

from river_billing import limits
from river_billing.budgets import warn_of_budgets
from river_billing.database import Connection
from river_billing.errors import RejectedEventError
from river_billing.events import UsageEvent, UsageKind
from river_client.credit_wire import BudgetWarning
from river_client.wire import UsageLine

# One statement, so that events, sums and books cannot part. Only rows that were really new count, so
# a replay changes nothing. What an event had set aside is given free as it is charged: in between,
# nobody sees it twice or not at all.
#
# Several recorders at once: first come the events, which hinder nobody, then the tenants are locked,
# and what is the tenants' own follows. Both are taken in a fixed order, so that nobody waits in a circle.
#
# A price holds from one moment at which any price or discount begins or ends to the next: `epoch` is the
# number of such moments that an event has behind it, and both are looked up once for each that occurs.
_RECORD = """
with input as materialized (
  select i.*, width_bucket(i.occurred_at, (select price_moments())) as epoch
  from unnest(
    $1::uuid[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
    $8::text[], $9::text[], $10::integer[], $11::uuid[], $12::bigint[],
    $13::bigint[], $14::bigint[], $15::bigint[], $16::bigint[], $17::bigint[]
  ) as i (event_id, occurred_at, tenant_id, key_id, run_id, session_id, end_user,
          base_model, policy_version, context_length, lease_id, reserved,
          prompt, cached_prompt, completion, training, storage)
), priced as materialized (
  select t.*, k.kind, p.price_id, p.nano_usd_per_unit
  from (select base_model, context_length, epoch, min(occurred_at) as at from input group by 1, 2, 3) t
  cross join (values ('prompt'), ('cached_prompt'), ('completion'), ('training'), ('storage')) as k (kind)
  left join lateral price_in_force(t.base_model, t.context_length, k.kind, t.at) p on true
), discounted as materialized (
  select t.*, k.kind, d.discount_id, d.share
  from (
    select tenant_id, base_model, epoch, min(occurred_at) as at
    from input where tenant_id in (select tenant_id from discount) group by 1, 2, 3
  ) t
  cross join (values ('prompt'), ('cached_prompt'), ('completion'), ('training'), ('storage')) as k (kind)
  cross join lateral discount_in_force(t.tenant_id, t.base_model, k.kind, t.at) d
), inserted as (
  insert into usage_event (event_id, kind, occurred_at, tenant_id, key_id, run_id, session_id,
                           end_user, base_model, policy_version, context_length, quantity,
                           price_id, discount_id, amount_nano_usd)
  select l.event_id, l.kind, l.occurred_at, l.tenant_id, l.key_id, l.run_id, l.session_id,
         l.end_user, l.base_model, l.policy_version, l.context_length, l.quantity,
         p.price_id, d.discount_id,
         coalesce(round_half_even(l.quantity * p.nano_usd_per_unit * (1 - coalesce(d.share, 0))), 0)::bigint
  from (
    select i.*, u.kind, u.quantity
    from input i cross join lateral (values
      ('prompt', i.prompt), ('cached_prompt', i.cached_prompt), ('completion', i.completion),
      ('training', i.training), ('storage', i.storage)
    ) as u (kind, quantity)
    where u.quantity > 0
    offset 0  -- Before the join, which would else multiply the rows.
  ) l
  join priced p using (base_model, context_length, epoch, kind)
  left join discounted d using (tenant_id, base_model, epoch, kind)
  order by l.event_id, l.kind
  on conflict do nothing
  returning event_id, kind, occurred_at, tenant_id, key_id, run_id, base_model, context_length,
            quantity, price_id, amount_nano_usd
), locked as materialized (
  select lock_tenants(array(select distinct tenant_id from inserted))
), new as materialized (
  select inserted.* from locked cross join inserted
), summed as (
  insert into usage_hour as h (tenant_id, hour, base_model, context_length, kind, key_id,
                               quantity, amount_nano_usd, events)
  select tenant_id, date_trunc('hour', occurred_at, 'UTC'), base_model, context_length, kind,
         key_id, sum(quantity), sum(amount_nano_usd), count(*)
  from new group by 1, 2, 3, 4, 5, 6
  on conflict (tenant_id, hour, base_model, context_length, kind, key_id) do update set
    quantity        = h.quantity + excluded.quantity,
    amount_nano_usd = h.amount_nano_usd + excluded.amount_nano_usd,
    events          = h.events + excluded.events
), of_month as (
  insert into usage_month as m (tenant_id, month, key_id, amount_nano_usd)
  select tenant_id, date_trunc('month', occurred_at at time zone 'UTC')::date, key_id,
         sum(amount_nano_usd)
  from new group by 1, 2, 3
  on conflict (tenant_id, month, key_id) do update set
    amount_nano_usd = m.amount_nano_usd + excluded.amount_nano_usd
), of_run as (
  insert into usage_run as r (tenant_id, run_id, kind, quantity, amount_nano_usd)
  select tenant_id, run_id, kind, sum(quantity), sum(amount_nano_usd)
  from new where run_id is not null group by 1, 2, 3
  on conflict (tenant_id, run_id, kind) do update set
    quantity        = r.quantity + excluded.quantity,
    amount_nano_usd = r.amount_nano_usd + excluded.amount_nano_usd
), charged as (
  select n.tenant_id, n.amount, case t.billing when 'prepaid' then 'credit' else 'receivable' end as account
  from (select tenant_id, sum(amount_nano_usd)::bigint as amount from new group by 1) n
  left join tenant t using (tenant_id)
  where n.amount > 0
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
    select lease_id, tenant_id, sum(reserved)::bigint as amount
    from input where reserved > 0 and event_id in (select event_id from new) group by 1, 2
  ) used
  where (l.lease_id, l.tenant_id) = (used.lease_id, used.tenant_id)
), of_hold as (
  delete from credit_hold where event_id in (select event_id from new)
)
select base_model, kind, count(*) as lines, bool_or(price_id is null) as unpriced
from new group by 1, 2
"""

_KINDS = (
    UsageKind.PROMPT,
    UsageKind.CACHED_PROMPT,
    UsageKind.COMPLETION,
    UsageKind.TRAINING,
    UsageKind.STORAGE,
)
assert set(_KINDS) == set(UsageKind)
"""Those of `_RECORD`, in its order."""

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
    unique = [
        event
        for event in {event.event_id: event for event in events}.values()
        if any(event.quantities.values())
    ]
    if not unique:
        return Recorded(lines=0, unpriced=[], warnings=[])
    counts = await connection.fetch(_RECORD, *_columns(unique))
    return Recorded(
        lines=sum(row["lines"] for row in counts),
        unpriced=[(row["base_model"], row["kind"]) for row in counts if row["unpriced"]],
        warnings=await warn_of_budgets(connection, sorted({event.tenant_id for event in unique})),
    )


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


def _columns(events: Sequence[UsageEvent]) -> list[list[Any]]:
    """The events as the arrays of `_RECORD`."""
    return [
        [event.event_id for event in events],
        [moment(event) for event in events],
        [event.tenant_id for event in events],
        [event.key_id for event in events],
        [event.run_id for event in events],
        [event.session_id for event in events],
        # Postgres holds no NUL, and what a client calls its user must not make its usage free.
        [event.user and event.user.replace("\0", "") for event in events],
        [event.base_model for event in events],
        [event.policy_version for event in events],
        [event.context_length for event in events],
        [event.lease_id for event in events],
        [event.reserved_nano_usd if event.lease_id else 0 for event in events],
        *([event.quantities.get(kind, 0) for event in events] for kind in _KINDS),
    ]
