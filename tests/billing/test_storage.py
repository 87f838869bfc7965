"""Storage is charged once for each day, to the second, whatever is created, deleted, expires or is missed."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.billing import add_run, database, totals

from river_billing.catalog import record_checkpoint
from river_billing.events import CheckpointSaved
from river_billing.ledger import ledger_differences
from river_billing.limits import STORAGE_GRACE_S
from river_billing.storage import Stored, charge_storage, days_of, storage_event_id

DAY_S = 86_400
BEGAN = datetime(2026, 9, 20, tzinfo=UTC)
UNITS_PER_BYTE_S = Fraction(1, 1000 * 3600)


@dataclass(frozen=True)
class Life:
    """A checkpoint: seconds after `BEGAN`; `ttl_s` and `deleted_after_s` count from its creation."""

    size_bytes: int
    created_s: int
    ttl_s: int | None
    deleted_after_s: int | None

    def seconds_until(self, until_s: int) -> int:
        """How long it was stored by then."""
        ends = [
            self.created_s + life for life in (self.ttl_s, self.deleted_after_s) if life is not None
        ]
        return max(min([until_s, *ends]) - self.created_s, 0)


LIVES = st.lists(
    st.builds(
        Life,
        size_bytes=st.integers(0, 10**12) | st.integers(0, 5_000),
        created_s=st.integers(0, 12 * DAY_S),
        ttl_s=st.none() | st.integers(1, 12 * DAY_S),
        deleted_after_s=st.none() | st.integers(1, 12 * DAY_S),
    ),
    min_size=1,
    max_size=8,
)
LAST_DAY = 16
_examples = itertools.count(1)
CHARGED_ON = st.lists(st.integers(0, 15), max_size=6).map(sorted)
"""The days on which somebody looked; on others nobody did."""


async def set_time(connection: Any, seconds: int) -> None:
    """Everything up to then, and the grace after it, is recorded."""
    moment = BEGAN + timedelta(seconds=seconds + STORAGE_GRACE_S)
    await connection.execute("update recorder_progress set recorded_until = $1", moment)


async def save(connection: Any, name: str, life: Life, run_id: str = "run_1") -> None:
    """As the trainer does."""
    created_at = (BEGAN + timedelta(seconds=life.created_s)).timestamp()
    saved = CheckpointSaved(
        checkpoint_id=name,
        run_id=run_id,
        tenant_id="ten_a",
        base_model="any",
        name=name,
        mode="inference",
        step=1,
        location="file:///x",
        size_bytes=life.size_bytes,
        created_at=created_at,
        expires_at=None if life.ttl_s is None else created_at + life.ttl_s,
    )
    assert await record_checkpoint(connection, saved)


async def delete(connection: Any, name: str, seconds: int) -> None:
    """As its owner does."""
    await connection.execute(
        "update checkpoint set deleted_at = $2 where checkpoint_id = $1 and deleted_at is null",
        name,
        BEGAN + timedelta(seconds=seconds),
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lives=LIVES, charged_on=CHARGED_ON)
async def test_charges_equal_sizes_times_lives(
    connection: Any, lives: list[Life], charged_on: list[int]
) -> None:
    """Random lives, looked at on random days: every checkpoint is charged its size times its life, to half a unit."""
    run_id = f"run_{next(_examples)}"
    await add_run(connection, run_id)
    saved: list[int] = []
    for day in [*charged_on, LAST_DAY]:
        now_s = day * DAY_S
        for number, life in enumerate(lives):
            if life.created_s < now_s and number not in saved:
                saved.append(number)
                await save(connection, f"{run_id}_{number}", life, run_id)
            after_s = life.deleted_after_s
            if after_s is not None and life.created_s + after_s <= now_s:
                await delete(connection, f"{run_id}_{number}", life.created_s + after_s)
        await set_time(connection, now_s)
        await charge_storage(connection)
        assert await charge_storage(connection) == 0
        charged = await connection.fetchval(
            "select coalesce(sum(quantity), 0)::bigint from usage_event where run_id = $1", run_id
        )
        exact = [
            lives[number].size_bytes * lives[number].seconds_until(now_s) * UNITS_PER_BYTE_S
            for number in saved
        ]
        assert charged == sum(map(round, exact))
    await totals(connection)


async def test_each_day_has_a_line_of_its_own(connection: Any) -> None:
    """Of days that nobody looked at too; two workers at once, and one that knows nothing of the other, charge once."""
    await add_run(connection)
    await save(connection, "c", Life(3_600_000, DAY_S // 2, None, None))
    await set_time(connection, 3 * DAY_S)
    assert await charge_storage(connection) == 3
    rows = await connection.fetch(
        "select occurred_at, quantity, kind, key_id, session_id from usage_event order by occurred_at"
    )
    assert [(row["occurred_at"] - BEGAN) / timedelta(seconds=1) for row in rows] == [
        DAY_S // 2,
        DAY_S,
        2 * DAY_S,
    ]
    assert [row["quantity"] for row in rows] == [43_200, 86_400, 86_400]
    assert {(row["kind"], row["key_id"], row["session_id"]) for row in rows} == {
        ("storage", "key_1", "ses_1")
    }
    await connection.execute("update checkpoint set storage_charged_until = null")
    assert await charge_storage(connection) == 0
    assert (await totals(connection))[:2] == (3, 216_000)


async def test_workers_side_by_side(connection: Any, postgres_url: str) -> None:
    """Many checkpoints, four workers: each day of each is charged once."""
    await add_run(connection)
    for number in range(30):
        await save(connection, f"c{number}", Life(10**6, 0, None, None))
    await set_time(connection, 5 * DAY_S)

    async def work() -> int:
        async with database(postgres_url) as own:
            return await charge_storage(own)

    assert sum(await asyncio.gather(*(work() for _ in range(4)))) == 150
    assert (await totals(connection))[:2] == (150, 30 * 5 * 24_000)
    assert await ledger_differences(connection) == []


async def test_a_day_is_charged_when_it_is_over(connection: Any) -> None:
    """And when what was published on it has had time to arrive; a replaced checkpoint ends where the next begins."""
    await add_run(connection)
    await save(connection, "a", Life(3_600_000, 0, None, None))
    await set_time(connection, DAY_S - 1)
    assert await charge_storage(connection) == 0
    await connection.execute("update checkpoint set name = 'final'")
    replacement = Life(7_200_000, DAY_S // 4, None, None)
    await save(connection, "b", replacement)
    await connection.execute(
        "update checkpoint set deleted_at = (select created_at from checkpoint where checkpoint_id = 'b') "
        "where checkpoint_id = 'a'"
    )
    await set_time(connection, DAY_S)
    assert await charge_storage(connection) == 2
    assert (await totals(connection))[1] == DAY_S // 4 + 2 * (DAY_S * 3 // 4)


async def test_a_gigabyte_for_a_month_is_ten_cents(connection: Any) -> None:
    """Thirty days of 24 hours, whatever they are split into."""
    await add_run(connection)
    await save(connection, "c", Life(10**9, 12_345, 30 * DAY_S, None))
    await set_time(connection, 40 * DAY_S)
    assert await charge_storage(connection) == 31
    lines, quantity, amount = await totals(connection)
    assert (lines, quantity) == (31, 720 * 10**6)
    assert amount == pytest.approx(100_000_000, abs=31)


def test_identities_are_of_checkpoint_and_day() -> None:
    """Neither the time of day nor the zone in which it is told makes another."""
    east = timezone(timedelta(hours=14))
    first = storage_event_id("c", BEGAN)
    assert first == storage_event_id("c", BEGAN + timedelta(hours=23))
    assert first == storage_event_id("c", (BEGAN + timedelta(hours=23)).astimezone(east))
    assert first != storage_event_id("c", BEGAN + timedelta(days=1))
    assert first != storage_event_id("d", BEGAN)


def test_what_has_ended_is_not_charged_further() -> None:
    """However often it is looked at."""
    ended = Stored("c", 10**6, BEGAN, BEGAN + timedelta(hours=1), None)
    later = BEGAN + timedelta(days=9)
    assert list(days_of(ended, later)) == [(BEGAN, 1000)]
    done = Stored("c", 10**6, BEGAN, BEGAN + timedelta(hours=1), BEGAN + timedelta(hours=1))
    assert list(days_of(done, later)) == []
    assert list(days_of(Stored("c", 1, later, None, None), BEGAN)) == []
