"""Usage over time: rows that add up to what was billed, however they are told apart and cut into pages."""

from __future__ import annotations

import csv
import dataclasses
import random
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any

import msgspec
import pytest
from support.billing import make_event, random_events

from river_billing import limits
from river_billing.errors import ExportError
from river_billing.events import UsageEvent
from river_billing.exports import UsageQuery, csv_bytes, usage_csv, usage_page, usage_query
from river_billing.recorder import record_events
from river_client.usage_wire import DIMENSIONS, Dimension, Every, UsageRow

SINCE = datetime(2026, 10, 30, tzinfo=UTC)
UNTIL = datetime(2026, 11, 2, tzinfo=UTC)
USERS = (None, "ann", 'b"o,b', "=1+1")


def busy_events(count: int) -> list[UsageEvent]:
    """Events of several tenants, models' tiers, keys, users and runs over three days."""
    draw = random.Random(7)
    return [
        msgspec.structs.replace(
            event,
            key_id=f"key_{draw.randrange(3)}",
            context_length=draw.choice((512, 1024)),
            user=draw.choice(USERS),
            run_id=draw.choice((None, "run_1", "run_2")),
        )
        for event in random_events(count, seed=5)
    ]


def asked(every: Every = "hour", *group: Dimension, tenant_id: str | None = None) -> UsageQuery:
    return usage_query(tenant_id=tenant_id, since=SINCE, until=UNTIL, every=every, group=group)


async def all_rows(connection: Any, query: UsageQuery, *, rows_max: int) -> list[UsageRow]:
    """The rows of all pages, none of which is larger than asked."""
    rows: list[UsageRow] = []
    after: str | None = None
    while True:
        page = await usage_page(connection, query, after=after, rows_max=rows_max)
        assert len(page.rows) <= rows_max
        rows += page.rows
        after = page.next
        if after is None:
            return rows


def expected_rows(events: list[UsageEvent], query: UsageQuery) -> dict[tuple[Any, ...], int]:
    """The quantity of each group, added up in Python."""
    sums: Counter[tuple[Any, ...]] = Counter()
    for event in events:
        moment = datetime.fromtimestamp(event.occurred_at, UTC)
        moment = moment.replace(minute=0, second=0, microsecond=0)
        if query.every == "day":
            moment = moment.replace(hour=0)
        of = {
            "model": event.base_model,
            "tier": event.context_length,
            "key": event.key_id,
            "user": event.user,
            "run": event.run_id,
        }
        told_apart = tuple(of[name] for name in query.group)
        for kind, quantity in event.quantities.items():
            if quantity and query.tenant_id in (None, event.tenant_id):
                sums[moment.isoformat(), event.tenant_id, kind.value, *told_apart] += quantity
    return dict(sums)


async def test_every_way_to_tell_usage_apart_adds_up(connection: Any) -> None:
    """By hour and day, grouped by any dimensions, rows are those that Python adds up from the same events."""
    events = busy_events(300)
    await record_events(connection, events)
    total = await connection.fetchval("select sum(amount_nano_usd) from usage_event")
    groups = [group for count in (0, 1, 5) for group in combinations(DIMENSIONS, count)]
    for every in ("hour", "day"):
        for group in groups:
            query = asked(every, *group)
            rows = await all_rows(connection, query, rows_max=1000)
            found = {
                (row.period, row.tenant, row.kind, *(getattr(row, name) for name in group)): (
                    row.quantity
                )
                for row in rows
            }
            assert found == expected_rows(events, query)
            assert len(found) == len(rows)
            assert sum(row.amount_nano_usd for row in rows) == total
            assert [row.period for row in rows] == sorted(row.period for row in rows)


@pytest.mark.parametrize("tenant_id", [None, "ten_2"])
@pytest.mark.parametrize("group", [(), ("model", "key"), ("tier", "user", "run")], ids=str)
async def test_pages_are_the_whole_in_pieces(
    connection: Any, tenant_id: str | None, group: tuple[Dimension, ...]
) -> None:
    """Pages of any size, one after another, are the rows of one large page."""
    await record_events(connection, busy_events(200))
    for every in ("hour", "day"):
        query = asked(every, *group, tenant_id=tenant_id)
        whole = await all_rows(connection, query, rows_max=limits.EXPORT_ROWS_MAX)
        assert {row.tenant for row in whole} == (
            {tenant_id} if tenant_id else {"ten_" + n for n in "01234"}
        )
        for rows_max in (1, 7, len(whole)):
            assert await all_rows(connection, query, rows_max=rows_max) == whole


async def test_a_period_is_cut_at_its_hours(connection: Any) -> None:
    """What occurred in the last hour before `since` and at `until` is out, at `since` and just before `until` is in."""
    since, until = SINCE + timedelta(hours=5), SINCE + timedelta(hours=30)
    moments = (since - timedelta(seconds=1), since, until - timedelta(microseconds=1), until)
    await record_events(
        connection,
        [
            make_event(number, prompt=10**number, occurred_at=moment.timestamp())
            for number, moment in enumerate(moments)
        ],
    )
    groups: tuple[tuple[Dimension, ...], ...] = ((), ("user",))
    for group in groups:
        query = dataclasses.replace(asked("hour", *group), since=since, until=until)
        rows = await all_rows(connection, query, rows_max=10)
        assert [row.quantity for row in rows] == [10, 100]


async def test_csv_is_the_pages(connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CSV has a header and the rows of the pages, in pieces of a bounded size, and starts no formula."""
    monkeypatch.setattr(limits, "EXPORT_CSV_ROWS", 50)
    await record_events(connection, busy_events(200))
    query = asked("hour", "user")

    @asynccontextmanager
    async def borrow() -> AsyncGenerator[Any]:
        yield connection

    pieces = [piece async for piece in usage_csv(borrow, query)]
    header, *lines = csv.reader(b"".join(pieces).decode().splitlines())
    assert header == ["period", "tenant", "kind", "user", "quantity", "amount_nano_usd", "events"]
    assert max(piece.count(b"\r\n") for piece in pieces) == 50
    rows = await all_rows(connection, query, rows_max=limits.EXPORT_ROWS_MAX)
    shown = {None: "", "=1+1": "'=1+1"}
    assert [line[:5] for line in lines] == [
        [row.period, row.tenant, row.kind, shown.get(row.user, row.user), str(row.quantity)]
        for row in rows
    ]


def test_cells_that_spreadsheets_would_run() -> None:
    """Texts that begin as a formula does are shown as texts; numbers stay numbers."""
    cells = ["=1", "+1", "-1", "@a", "\tx", -1, "a=1", None]
    assert csv_bytes([cells]) == b"'=1,'+1,'-1,'@a,'\tx,-1,a=1,\r\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"since": SINCE + timedelta(minutes=1)}, "since: 2026-10-30T00:01:00.00:00 is not"),
        (
            {"until": UNTIL + timedelta(hours=1), "every": "day"},
            "until: 2026-11-02T01:00:00.00:00 is not",
        ),
        ({"until": SINCE}, "until: .* is not after since"),
        ({"since": SINCE - timedelta(days=401)}, "since: more than 400 days before until"),
    ],
)
def test_an_impossible_period_is_refused(change: dict[str, Any], message: str) -> None:
    """Times off the hour or day, the wrong way round or too far apart are named."""
    given: dict[str, Any] = {"since": SINCE, "until": UNTIL, "every": "hour", **change}
    with pytest.raises(ExportError, match=message):
        usage_query(tenant_id=None, group=(), **given)


def test_without_a_period_it_is_this_month() -> None:
    """Left out, the period is the month so far, up to the end of the hour or day."""
    now = datetime(2026, 11, 25, 13, 40, tzinfo=UTC)
    query = usage_query(tenant_id=None, since=None, until=None, every="hour", group=(), now=now)
    assert (query.since.isoformat(), query.until.isoformat()) == (
        "2026-11-01T00:00:00+00:00",
        "2026-11-25T14:00:00+00:00",
    )


async def test_a_cursor_fits_its_query_alone(connection: Any) -> None:
    """What is no cursor, or one of another query, is refused."""
    await record_events(connection, busy_events(20))
    page = await usage_page(connection, asked("hour", "key"), rows_max=3)
    assert page.next is not None
    for cursor in ("", "x", "AAAA", page.next[:-4], page.next):
        with pytest.raises(ExportError, match=r"^after: "):
            await usage_page(connection, asked("hour", "tier"), after=cursor, rows_max=3)
