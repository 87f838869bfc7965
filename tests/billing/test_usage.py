"""Usage in Postgres: once, at the right price, and final."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.billing import OCCURRED_AT, TINY, golden_amount, make_event, random_events, totals

from river_billing import limits
from river_billing.errors import RejectedEventError
from river_billing.recorder import record_events
from river_billing.usage import check, usage_lines

QWEN = "Qwen3.5-397B-A17B-FP8"


async def test_a_replay_changes_nothing(connection: Any) -> None:
    """Batches in any cut and order, with duplicates within and between, count every event once."""
    events = random_events(300, seed=1)
    expected = (
        sum(1 for event in events for count in event.quantities.values() if count),
        sum(sum(event.quantities.values()) for event in events),
        sum(golden_amount(event, context_length=1024) for event in events),
    )
    shuffle = random.Random(2)
    for _ in range(3):
        delivered = [*events, *shuffle.sample(events, 100)]
        shuffle.shuffle(delivered)
        for start in range(0, len(delivered), 70):
            await record_events(connection, delivered[start : start + 70])
        assert await totals(connection) == expected


@pytest.mark.parametrize(
    ("context_length", "tier"),
    [(1, 65_536), (65_536, 65_536), (65_537, 262_144), (262_144, 262_144), (10**6, 262_144)],
)
async def test_the_smallest_tier_that_holds_the_context(
    connection: Any, context_length: int, tier: int
) -> None:
    """A context at a tier's own length is in it; one longer than all pays the largest."""
    event = make_event(base_model=QWEN, context_length=context_length, prompt=1000, completion=10)
    await record_events(connection, [event])
    assert (await totals(connection))[2] == golden_amount(event, context_length=tier)


async def test_a_hub_name_has_the_price_of_its_model(connection: Any) -> None:
    """A base model that is served under its organisation's name costs what the card says."""
    event = make_event(base_model=QWEN, context_length=65_536, training=7)
    await record_events(
        connection, [make_event(base_model=f"Qwen/{QWEN}", context_length=65_536, training=7)]
    )
    assert (await totals(connection))[2] == golden_amount(event, context_length=65_536)


async def test_storage_has_one_price_for_every_model(connection: Any) -> None:
    """A gigabyte for a month, 720 hours, is ten cents, in whatever model."""
    await record_events(connection, [make_event(base_model="any", storage=10**6 * 720)])
    assert (await totals(connection))[2] == pytest.approx(100_000_000, rel=1e-8)


async def test_usage_without_a_price_is_kept(
    connection: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that nobody priced is recorded at zero, and somebody is told."""
    await record_events(connection, [make_event(base_model="new/model", prompt=5)])
    assert await totals(connection) == (1, 5, 0)
    assert "no price for prompt of new/model" in caplog.text


async def test_a_user_with_a_nul_is_billed(connection: Any) -> None:
    """Whatever a client calls its user, what it used is recorded."""
    event = msgspec.structs.replace(make_event(prompt=5), user="a\0b")
    await record_events(connection, [event])
    assert (await totals(connection))[:2] == (1, 5)
    assert await connection.fetchval("select end_user from usage_event") == "ab"


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**10), st.integers(0, limits.QUANTITY_MAX)),
        min_size=1,
        max_size=20,
    )
)
async def test_amounts_equal_exact_decimals(
    connection: Any, quantities: list[tuple[int, int]]
) -> None:
    """Every line is rounded once, half to even, whatever its size."""
    await connection.execute("alter table usage_event disable trigger usage_event_untruncated")
    await connection.execute("drop table if exists usage_event_2026_11")
    await connection.execute("truncate usage_event, usage_hour")
    events = [
        make_event(number, base_model="GLM-5.1-NVFP4", cached_prompt=cached, completion=completion)
        for number, (cached, completion) in enumerate(quantities)
    ]
    await record_events(connection, events)
    expected = sum(golden_amount(event, context_length=32_768) for event in events)
    assert (await totals(connection))[2] == expected


@pytest.mark.parametrize(
    ("exact", "rounded"),
    [("0.5", 0), ("1.5", 2), ("2.5", 2), ("2.500000001", 3), ("2.499999999", 2), ("7", 7)],
)
async def test_rounding_is_half_to_even(connection: Any, exact: str, rounded: int) -> None:
    """The database rounds as Decimal's ROUND_HALF_EVEN does."""
    assert await connection.fetchval(f"select round_half_even({exact})") == rounded


@pytest.mark.parametrize(
    "statement",
    [
        "update usage_event set quantity = quantity + 1",
        "delete from usage_event",
        "truncate usage_event",
        "truncate usage_event_2026_11",
        "delete from usage_event_2026_11",
        "delete from price",
        "truncate price cascade",
        "update price set nano_usd_per_unit = 1",
        "update price set valid_to = '2021-01-01'",
    ],
)
async def test_history_is_final(connection: Any, statement: str) -> None:
    """No statement changes or removes what was used or what it cost."""
    await record_events(connection, [make_event(prompt=1)])
    with pytest.raises(asyncpg.RestrictViolationError):
        await connection.execute(statement)
    assert (await totals(connection))[:2] == (1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"occurred_at": float("nan")},
        {"occurred_at": 0.0},
        {"context_length": 0},
        {"prompt": -1},
        {"prompt": limits.QUANTITY_MAX + 1},
    ],
    ids=str,
)
def test_impossible_values_are_rejected(change: dict[str, Any]) -> None:
    """An event whose values no table can hold is told apart before it reaches one."""
    check(make_event(prompt=1))
    with pytest.raises(RejectedEventError):
        check(make_event(**change))


async def test_lines_are_of_one_tenant_and_period(connection: Any) -> None:
    """Sums are per tenant, model and kind; the hours of both ends of the period are in."""
    await record_events(
        connection,
        [
            make_event(1, tenant_id="ten_a", prompt=10, completion=1),
            make_event(2, tenant_id="ten_a", prompt=20, occurred_at=OCCURRED_AT - 3600),
            make_event(3, tenant_id="ten_b", prompt=40),
        ],
    )
    at = datetime.fromtimestamp(OCCURRED_AT, UTC)

    async def quantities(
        tenant_id: str | None, since: datetime | None, until: datetime | None
    ) -> list[tuple[str, str, int, int]]:
        lines = await usage_lines(connection, tenant_id=tenant_id, since=since, until=until)
        assert {line.model for line in lines} <= {TINY}
        return [(line.tenant, line.kind, line.quantity, line.events) for line in lines]

    assert await quantities(None, None, None) == [
        ("ten_a", "completion", 1, 1),
        ("ten_a", "prompt", 30, 2),
        ("ten_b", "prompt", 40, 1),
    ]
    assert await quantities("ten_b", None, None) == [("ten_b", "prompt", 40, 1)]
    assert await quantities("ten_a", at, None) == [
        ("ten_a", "completion", 1, 1),
        ("ten_a", "prompt", 10, 1),
    ]
    assert await quantities("ten_a", None, at - timedelta(hours=1)) == [("ten_a", "prompt", 20, 1)]
    assert await quantities("ten_c", None, None) == []
