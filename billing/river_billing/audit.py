"""`river billing audit`: everything that can be derived is derived again, and every difference is named.

It reads one moment of the database and changes nothing, so that it may run beside everything else. What it starts from
are the events, the prices and the ledger's entries; what it recomputes are amounts, hours, months, postings, balances
and invoices. The events themselves are held against the counters of the engines and trainers.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from river_billing import limits
from river_billing.audit_checks import CHECKS, Check
from river_billing.database import Connection

_ONE_MOMENT = "set transaction isolation level repeatable read, read only"

_SET_ASIDE = r"""
select c.relname::text as name
from pg_class c
join pg_class parent on parent.oid = 'usage_event'::regclass and parent.relnamespace = c.relnamespace
where c.relkind = 'r' and c.relname ~ '^usage_event_\d{4}_\d{2}$'
  and not exists (select from pg_inherits i where i.inhrelid = c.oid)
order by 1
"""
_DROPS_ARE_NOTED = "select to_regclass('usage_dropped') is not null"
_DROPPED = "select month, dropped_at from usage_dropped order by month"
_EXAMINED = """
select (select count(*) from {events} u) as usage_event, (select count(*) from usage_hour) as usage_hour,
       (select count(*) from ledger_transaction) as ledger_transaction,
       (select count(*) from ledger_entry) as ledger_entry, (select count(*) from invoice) as invoice,
       (select count(*) from invoice_line) as invoice_line
"""

_CUT_SHORT = """
select producer_id, started_at, max(counted_at) as counted_at from token_count
group by 1, 2 having not bool_or(final) and max(counted_at) <= now() - interval '2 minutes' order by 3, 1
"""
_LIMITED = """
select id::text, expected::text, found::text from ({statement}) as difference order by 1 limit {count}
"""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A row that does not say what it should, by what it is derived from."""

    table: str
    id: str
    expected: str
    found: str
    about: str


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    `examined` is how many rows there were of each table. `notes` say what could not be compared. `cut` names the checks
    that found more than is listed.
    """

    differences: list[Difference]
    examined: dict[str, int]
    notes: list[str]
    cut: list[str]


async def find_differences(
    connection: Connection, *, settle_s: float = limits.COUNTS_SETTLE_S
) -> Audit:
    """Looks for every kind of difference, in one moment of the database.

    What engines and trainers had counted `settle_s` ago must be billed by now.

    Raises:
        OUTAGES: Postgres went away.
    """
    differences: list[Difference] = []
    cut: list[str] = []
    async with connection.transaction():
        await connection.execute(_ONE_MOMENT)
        words, notes = await _words(connection)
        words["settle_s"] = str(float(settle_s))
        notes += [
            f"{row['producer_id']}, started {row['started_at'].isoformat()}, was last heard of at "
            f"{row['counted_at'].isoformat()}; what it produced after that is not known"
            for row in await connection.fetch(_CUT_SHORT)
        ]
        for check in CHECKS:
            rows = await connection.fetch(_limited(check, words))
            differences += [_difference(check, row) for row in rows[: limits.DIFFERENCES_MAX]]
            if len(rows) > limits.DIFFERENCES_MAX:
                cut.append(f"{check.table}: {check.about}")
        examined = await connection.fetchrow(_EXAMINED.format(**words))
    assert examined is not None
    return Audit(differences=differences, examined=dict(examined), notes=notes, cut=cut)


async def _words(connection: Connection) -> tuple[dict[str, str], list[str]]:
    """What the checks' placeholders stand for, and what there is to say about it."""
    names: list[str] = [row["name"] for row in await connection.fetch(_SET_ASIDE)]
    tables = " union all ".join(f"table {name}" for name in ("usage_event", *names))
    dropped: Sequence[Mapping[str, Any]] = []
    if await connection.fetchval(_DROPS_ARE_NOTED):
        dropped = await connection.fetch(_DROPPED)
    months: list[dt.date] = [row["month"] for row in dropped]
    moments: list[dt.datetime] = [row["dropped_at"] for row in dropped]
    dropped_at = max(moments).isoformat() if moments else "-infinity"
    words = {
        "events": f"({tables})" if names else "usage_event",
        "dropped_months": "select unnest('{"
        + ",".join(month.isoformat() for month in months)
        + "}'::date[])",
        "dropped_at": f"'{dropped_at}'::timestamptz",
    }
    notes = [
        f"the events of {month:%Y-%m} were dropped; its hours are taken as they are"
        for month in months
    ]
    return words, notes


def _limited(check: Check, words: Mapping[str, str]) -> str:
    return _LIMITED.format(
        statement=check.statement.format(**words), count=limits.DIFFERENCES_MAX + 1
    )


def _difference(check: Check, row: Mapping[str, Any]) -> Difference:
    return Difference(
        table=check.table,
        id=row["id"],
        expected=row["expected"],
        found=row["found"],
        about=check.about,
    )
