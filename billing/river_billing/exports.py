"""Usage over time: by hour or day, told apart by what is asked, a bounded page at a time.

A page is read by windows of a day, each with what it may still return, so that neither Postgres nor a reader ever
holds more than a day's groups. Between pages nothing is kept: a cursor says which row came last.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from river_billing import limits
from river_billing.database import Connection
from river_billing.errors import ExportError
from river_client.usage_wire import DIMENSIONS, Dimension, Every, UsageRow, UsageSeries

_COLUMNS: Mapping[Dimension, str] = {
    "model": "base_model",
    "tier": "context_length",
    "key": "key_id",
    "user": "coalesce(end_user, '')",
    "run": "coalesce(run_id, '')",
}
_ONLY_IN_EVENTS: frozenset[Dimension] = frozenset({"user", "run"})

_DAY = timedelta(days=1)
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet take a text for a formula."""

_FIRST_HOUR = "select min(hour) from usage_hour where hour >= $1 and hour < $2"
_FIRST_HOUR_OF_TENANT = f"{_FIRST_HOUR} and tenant_id = $3"


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What to export: a tenant's or (None) all usage, from `since` up to `until`, each the start of an hour or day."""

    tenant_id: str | None
    since: datetime
    until: datetime
    every: Every
    group: tuple[Dimension, ...]


class _Cursor(msgspec.Struct, frozen=True, array_like=True):
    """The row that came last."""

    period: datetime
    tenant: str
    kind: str
    values: list[str | int]


def usage_query(
    *,
    tenant_id: str | None,
    since: datetime | None,
    until: datetime | None,
    every: Every,
    group: Sequence[Dimension],
    now: datetime | None = None,
) -> UsageQuery:
    """A query that can be answered. Without `since` it begins with this month (UTC), without `until` it is open-ended.

    Raises:
        ExportError: a time is not at the start of an hour or day in UTC, or they are the wrong way round or too far
            apart; names the field.
    """
    now = (now or datetime.now(UTC)).astimezone(UTC)
    begin = _aligned("since", since, every) or _floor(now, "day").replace(day=1)
    end = _aligned("until", until, every) or _floor(now, every) + _length(every)
    if end <= begin:
        raise ExportError(f"until: {end.isoformat()} is not after since, {begin.isoformat()}")
    days_max = limits.EXPORT_DAYS_MAX
    if end - begin > timedelta(days=days_max):
        raise ExportError(f"since: more than {days_max} days before until, {end.isoformat()}")
    # In one order, whatever the one they were asked in, so that a cursor fits.
    ordered = tuple(sorted(set(group), key=DIMENSIONS.index))
    return UsageQuery(tenant_id, begin, end, every, ordered)


async def usage_page(
    connection: Connection, query: UsageQuery, *, after: str | None = None, rows_max: int
) -> UsageSeries:
    """The next rows, at most `rows_max`.

    Raises:
        ExportError: `after` is no cursor of this query.
    """
    assert 1 <= rows_max <= limits.EXPORT_ROWS_MAX
    last = None if after is None else _decode_cursor(after, query)
    begin = query.since if last is None else last.period
    found: list[Mapping[str, Any]] = []
    while len(found) < rows_max:
        window = await _next_window(connection, query, begin)
        if window is None:
            break
        begin, end = window
        found += await _read(connection, query, begin, end, last, rows_max - len(found))
        begin = end
    rows = [_row(row, query.group) for row in found]
    full = len(found) == rows_max
    return UsageSeries(rows=rows, next=_encode_cursor(found[-1], query.group) if full else None)


async def usage_csv(
    borrow: Callable[[], AbstractAsyncContextManager[Connection]], query: UsageQuery
) -> AsyncGenerator[bytes]:
    """All rows as CSV, in pieces; a connection is borrowed for each piece, not while a reader takes its time."""
    yield csv_bytes([_header(query.group)])
    after: str | None = None
    while True:
        async with borrow() as connection:
            page = await usage_page(connection, query, after=after, rows_max=limits.EXPORT_CSV_ROWS)
        if page.rows:
            yield csv_bytes([_cells(row, query.group) for row in page.rows])
        after = page.next
        if after is None:
            return


def csv_bytes(rows: Sequence[Sequence[object]]) -> bytes:
    """Rows as CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    for row in rows:
        writer.writerow(_harmless(cell) for cell in row)
    return text.getvalue().encode()


# ---- Reading ---------------------------------------------------------------------------------------------------------


async def _next_window(
    connection: Connection, query: UsageQuery, begin: datetime
) -> tuple[datetime, datetime] | None:
    """The rest of the next day on which something was used; None when there is none."""
    if begin >= query.until:
        return None
    if query.tenant_id is None:
        hour = await connection.fetchval(_FIRST_HOUR, begin, query.until)
    else:
        hour = await connection.fetchval(_FIRST_HOUR_OF_TENANT, begin, query.until, query.tenant_id)
    if hour is None:
        return None
    day = _floor(hour, "day")
    return max(begin, day), min(day + _DAY, query.until)


async def _read(
    connection: Connection,
    query: UsageQuery,
    begin: datetime,
    end: datetime,
    last: _Cursor | None,
    rows_max: int,
) -> Sequence[Mapping[str, Any]]:
    """The rows of a window that come after `last`."""
    arguments: list[Any] = [begin, end, rows_max]

    def parameter(value: object) -> str:
        arguments.append(value)
        return f"${len(arguments)}"

    of_events = not _ONLY_IN_EVENTS.isdisjoint(query.group)
    time = "occurred_at" if of_events else "hour"
    of_tenant = "true"
    if query.tenant_id is not None:
        of_tenant = f"tenant_id = {parameter(query.tenant_id)}"
    keys = ["period", "tenant_id", "kind", *map(_name, query.group)]
    after = "true"
    if last is not None:
        values = (last.period, last.tenant, last.kind, *last.values)
        after = f"({', '.join(keys)}) > ({', '.join(map(parameter, values))})"
    columns = "".join(f", {_COLUMNS[dimension]} as {_name(dimension)}" for dimension in query.group)
    return await connection.fetch(
        f"""
        select * from (
          select date_trunc('{query.every}', {time}, 'UTC') as period, tenant_id, kind{columns},
                 sum(quantity)::bigint as quantity, sum(amount_nano_usd)::bigint as amount_nano_usd,
                 {"count(*)" if of_events else "sum(events)::bigint"} as events
          from {"usage_event" if of_events else "usage_hour"}
          where {time} >= $1 and {time} < $2 and {of_tenant}
          group by {", ".join(str(number) for number in range(1, len(keys) + 1))}
        ) grouped
        where {after} order by {", ".join(keys)} limit $3
        """,  # noqa: S608 - constants and parameters
        *arguments,
    )


# ---- Rows ------------------------------------------------------------------------------------------------------------


def _name(dimension: Dimension) -> str:
    """Of its column: `user` by itself is a word of SQL."""
    return f"by_{dimension}"


def _row(row: Mapping[str, Any], group: Sequence[Dimension]) -> UsageRow:
    return UsageRow(
        period=row["period"].isoformat(),
        tenant=row["tenant_id"],
        kind=row["kind"],
        quantity=row["quantity"],
        amount_nano_usd=row["amount_nano_usd"],
        events=row["events"],
        **{dimension: row[_name(dimension)] or None for dimension in group},
    )


def _header(group: Sequence[Dimension]) -> list[str]:
    return ["period", "tenant", "kind", *group, "quantity", "amount_nano_usd", "events"]


def _cells(row: UsageRow, group: Sequence[Dimension]) -> list[object]:
    return [
        row.period,
        row.tenant,
        row.kind,
        *(getattr(row, dimension) for dimension in group),
        row.quantity,
        row.amount_nano_usd,
        row.events,
    ]


def _harmless(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA_STARTS) else cell


def _encode_cursor(row: Mapping[str, Any], group: Sequence[Dimension]) -> str:
    values = [row[_name(dimension)] for dimension in group]
    cursor = _Cursor(row["period"], row["tenant_id"], row["kind"], values)
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(cursor)).decode()


def _decode_cursor(text: str, query: UsageQuery) -> _Cursor:
    try:
        cursor = msgspec.msgpack.decode(base64.urlsafe_b64decode(text.encode()), type=_Cursor)
    except (binascii.Error, msgspec.DecodeError, UnicodeError):
        raise ExportError(f"after: {text!r} is no `next` of a page") from None
    kinds = [int if dimension == "tier" else str for dimension in query.group]
    if [type(value) for value in cursor.values] != kinds or cursor.period.tzinfo is None:
        raise ExportError(f"after: {text!r} is the `next` of another query")
    return cursor


# ---- Times -----------------------------------------------------------------------------------------------------------


def _aligned(field: str, moment: datetime | None, every: Every) -> datetime | None:
    if moment is None:
        return None
    moment = moment.astimezone(UTC)
    if moment != _floor(moment, every):
        raise ExportError(f"{field}: {moment.isoformat()} is not the start of a UTC {every}")
    return moment


def _floor(moment: datetime, every: Every) -> datetime:
    start = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    return start.replace(hour=0) if every == "day" else start


def _length(every: Every) -> timedelta:
    return _DAY if every == "day" else timedelta(hours=1)
