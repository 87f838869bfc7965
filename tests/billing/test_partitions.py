"""Months of usage: made ahead, detached when old, attached again for what comes late, dropped only when told."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from support.billing import database, make_event, totals

from river_billing import limits
from river_billing.database import OUTAGES
from river_billing.ledger import ledger_differences
from river_billing.partitions import maintain_partitions, months_before
from river_billing.recorder import record_events

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
MONTHS = tuple(datetime(2026, month, 15, tzinfo=UTC) for month in range(6, 12))


async def partitions(connection: Any) -> dict[str, bool]:
    """Which there are, and whether they are attached."""
    rows = await connection.fetch("select name, attached from usage_partitions order by name")
    return {row["name"].removeprefix("usage_event_"): row["attached"] for row in rows}


def event_of(number: int, month: datetime, **more: Any) -> Any:
    """An event in the middle of a month."""
    return make_event(number, occurred_at=month.timestamp(), prompt=100 + number, **more)


async def record_half_a_year(connection: Any) -> None:
    """Two events in each month."""
    await record_events(
        connection,
        [event_of(2 * n + again, month) for n, month in enumerate(MONTHS) for again in (0, 1)],
    )


@pytest.mark.parametrize(
    ("now", "months", "first"),
    [(NOW, 0, (2026, 11)), (NOW, 3, (2026, 8)), (NOW, 11, (2025, 12)), (NOW, 24, (2024, 11))],
)
def test_months_are_counted_over_years(now: datetime, months: int, first: tuple[int, int]) -> None:
    """A whole month is counted whatever the day is."""
    found = months_before(now, months)
    assert (found.year, found.month) == first
    assert (found.day, found.hour) == (1, 0)


async def test_months_are_made_ahead(connection: Any) -> None:
    """Across the end of a year, and again without harm."""
    for _ in range(2):
        assert await maintain_partitions(connection, NOW, None) == []
    assert await partitions(connection) == {"2026_11": True, "2026_12": True, "2027_01": True}


async def test_old_months_are_detached_and_stay_final(connection: Any) -> None:
    """Their events leave the table and stay in theirs; hours, books and sums are as before."""
    await record_half_a_year(connection)
    hours = await connection.fetchval("select sum(amount_nano_usd) from usage_hour")
    detached = await maintain_partitions(connection, NOW, 2)
    assert detached == ["usage_event_2026_06", "usage_event_2026_07", "usage_event_2026_08"]
    assert await maintain_partitions(connection, NOW, 2) == []
    assert await connection.fetchval("select count(*) from usage_event") == 6
    assert await connection.fetchval("select count(*) from usage_event_2026_06") == 2
    assert await connection.fetchval("select sum(amount_nano_usd) from usage_hour") == hours
    assert await ledger_differences(connection) == []
    for statement in ("update {} set quantity = 1", "delete from {}", "truncate {}"):
        with pytest.raises(asyncpg.RestrictViolationError):
            await connection.execute(statement.format("usage_event_2026_06"))


async def test_a_late_event_finds_its_month(connection: Any) -> None:
    """It brings the detached month back, so that one that was recorded before it was detached is not counted twice."""
    await record_half_a_year(connection)
    before = await totals(connection)
    await maintain_partitions(connection, NOW, 1)
    late = event_of(100, MONTHS[0])
    await record_events(connection, [event_of(0, MONTHS[0]), late, event_of(1, MONTHS[0])])
    assert (await partitions(connection))["2026_06"]
    assert not (await partitions(connection))["2026_07"]
    assert await connection.fetchval("select count(*) from usage_event_2026_06") == 3
    assert await ledger_differences(connection) == []
    for month in MONTHS[1:]:
        await record_events(connection, [event_of(2 * MONTHS.index(month), month)])
    lines, quantity, amount = await totals(connection)
    added = (1, late.quantities["prompt"], 10 * late.quantities["prompt"])
    assert (lines, quantity, amount) == tuple(map(sum, zip(before, added, strict=True)))


async def test_detaching_beside_writers(connection: Any, postgres_url: str) -> None:
    """While months come and go all the time, writers of old events neither fail nor count anything twice."""
    await record_half_a_year(connection)
    done = asyncio.Event()

    async def come_and_go() -> None:
        async with database(postgres_url) as own:
            while not done.is_set():
                await maintain_partitions(own, NOW, 1)
                await asyncio.sleep(0.02)

    async def write(writer: int) -> None:
        async with database(postgres_url) as own:
            for number in range(40):
                month = MONTHS[(number + writer) % len(MONTHS)]
                events = [event_of(1000 + number, month), event_of(0, MONTHS[0])]
                while True:
                    try:
                        await record_events(own, events)
                        break
                    except OUTAGES:  # The recorder tries again too.
                        await asyncio.sleep(0.01)

    coming = asyncio.create_task(come_and_go())
    await asyncio.gather(*(write(writer) for writer in range(2)))
    done.set()
    await coming
    await connection.execute(
        "select create_usage_partition(month) from usage_partitions where not attached"
    )
    # Writer 0 and 1 give number n to months that differ, so that each is two events.
    assert (await totals(connection))[0] == 12 + 2 * 40
    assert await ledger_differences(connection) == []


async def test_what_takes_too_long_is_done_next_time(
    connection: Any,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reader that stays holds nobody up; the detaching that it cut off is finished later."""
    monkeypatch.setattr(limits, "DETACH_TIMEOUT_S", 0.2)
    await record_half_a_year(connection)
    async with database(postgres_url) as reader, reader.transaction(isolation="repeatable_read"):
        await reader.fetchval("select count(*) from usage_event")
        assert await maintain_partitions(connection, NOW, 3) == []
        assert "could not be detached now" in caplog.text
        assert await reader.fetchval("select count(*) from usage_event") == 12
        await record_events(connection, [event_of(50, MONTHS[-1])])
        assert await ledger_differences(connection) == []
    assert await maintain_partitions(connection, NOW, 3) == [
        "usage_event_2026_06",
        "usage_event_2026_07",
    ]
    assert await ledger_differences(connection) == []


async def test_only_a_detached_month_is_dropped(connection: Any) -> None:
    """And only when told, and when its hours say the same; then it takes no more events, and the books are right."""
    await record_half_a_year(connection)
    drop = "select drop_usage_partition('2026-06-01')"
    with pytest.raises(asyncpg.RestrictViolationError, match="no detached partition"):
        await connection.execute(drop)
    await maintain_partitions(connection, NOW, 1)
    async with connection.transaction():
        await connection.execute("update usage_hour set events = events + 1")
        with pytest.raises(asyncpg.RestrictViolationError, match="its hours say"):
            async with connection.transaction():
                await connection.execute(drop)
        await connection.execute("update usage_hour set events = events - 1")
    await connection.execute(drop)
    assert "2026_06" not in await partitions(connection)
    assert await ledger_differences(connection) == []
    with pytest.raises(asyncpg.RestrictViolationError, match="usage of 2026-06 was dropped"):
        await record_events(connection, [event_of(77, MONTHS[0])])
    row = await connection.fetchrow("select lines, amount_nano_usd from usage_dropped")
    assert tuple(row) == (2, 1000 + 1010)
