"""The price card in Postgres, and changing a price."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from support.billing import TINY, make_event, totals

from river_billing.errors import PriceError
from river_billing.events import UsageKind
from river_billing.prices import list_prices, seed_prices, set_price
from river_billing.recorder import record_events

CARD = {
    ("Qwen3.6-35B-A3B-FP8", 262_144): ("0.33", "0.066", "0.82", "1"),
    ("Qwen3.5-397B-A17B-FP8", 65_536): ("1.66", "0.332", "4.15", "5"),
    ("Qwen3.5-397B-A17B-FP8", 262_144): ("3.32", "0.664", "8.3", "10"),
    ("Kimi-K2.6-NVFP4", 32_768): ("1.22", "0.244", "3.06", "3.67"),
    ("Kimi-K2.6-NVFP4", 131_072): ("4.28", "0.856", "10.7", "12.84"),
    ("GLM-5.1-NVFP4", 32_768): ("2.45", "0.49", "6.12", "7.34"),
    ("GLM-5.1-NVFP4", 131_072): ("8.56", "1.712", "21.4", "25.68"),
    ("river/tiny-moe", 1024): ("0.01", "0.002", "0.03", "0.05"),
}
KINDS = ("prompt", "cached_prompt", "completion", "training")


async def test_the_card_is_in_the_table_once(connection: Any) -> None:
    """Seeding again adds nothing, and what is listed is the card."""
    await seed_prices(connection)
    listed = {
        (price.model, price.context_length, price.kind): price.usd_per_million
        for price in await list_prices(connection)
    }
    expected = {
        (*tier, kind): dollars
        for tier, prices in CARD.items()
        for kind, dollars in zip(KINDS, prices, strict=True)
    }
    assert listed == {**expected, ("*", 1, "storage"): "0.1"}
    assert await connection.fetchval("select count(*) from price") == len(listed)


async def _double(connection: Any, valid_from: datetime | None = None) -> None:
    await set_price(
        connection,
        model=TINY,
        context_length=1024,
        kind=UsageKind.PROMPT,
        nano_usd_per_unit=Decimal(20),
        valid_from=valid_from,
    )


async def test_a_new_price_never_changes_the_past(connection: Any) -> None:
    """What happened before the change costs the old price, even when it is recorded after it."""
    now = time.time()
    await record_events(connection, [make_event(1, occurred_at=now - 60, prompt=100)])
    await _double(connection)
    late_and_new = [
        make_event(2, occurred_at=now - 30, prompt=100),
        make_event(3, occurred_at=time.time() + 5, prompt=100),
    ]
    await record_events(connection, late_and_new)
    amounts = await connection.fetch("select amount_nano_usd from usage_event order by occurred_at")
    assert [row[0] for row in amounts] == [1000, 1000, 2000]
    await seed_prices(connection)
    await record_events(connection, [make_event(4, occurred_at=time.time() + 5, prompt=100)])
    assert (await totals(connection))[2] == 6000


async def test_a_price_changes_within_a_batch(connection: Any) -> None:
    """Events on both sides of many changes, to the microsecond and in one batch, each cost what held at their time."""
    began = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    changes = [began + timedelta(seconds=10 * number) for number in range(6)]
    for number, moment in enumerate(changes):
        for kind in (UsageKind.PROMPT, UsageKind.COMPLETION):
            await set_price(
                connection,
                model=TINY,
                context_length=1024,
                kind=kind,
                nano_usd_per_unit=Decimal(100 + number),
                valid_from=moment,
            )
    step = timedelta(microseconds=1)
    moments = [change + away for change in changes for away in (-step, timedelta(), step)]
    events = [
        make_event(number, occurred_at=moment.timestamp(), prompt=1, completion=2)
        for number, moment in enumerate(moments)
    ]
    await record_events(connection, events[::-1])
    charged = await connection.fetch(
        "select kind, amount_nano_usd from usage_event order by occurred_at, kind desc"
    )
    wanted = [("prompt", 10), ("completion", 60)]
    for number in range(len(changes)):
        wanted += 3 * [("prompt", 100 + number), ("completion", 2 * (100 + number))]
    assert [tuple(row) for row in charged] == wanted[:-2]


async def test_a_price_may_not_reach_into_the_past(connection: Any) -> None:
    """A change takes effect from now on or later, and leaves the old price when it is refused."""
    with pytest.raises(PriceError):
        await _double(connection, datetime.now(UTC) - timedelta(hours=1))
    await _double(connection, datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(PriceError):
        await _double(connection)
    count = "select count(*) from price where model = $1 and kind = 'prompt'"
    assert await connection.fetchval(count, TINY) == 2


async def test_two_prices_are_never_in_force_at_once(connection: Any) -> None:
    """The table itself refuses a second price for the same model, tier, kind and time."""
    with pytest.raises(asyncpg.ExclusionViolationError):
        await connection.execute(
            "insert into price (model, context_length, kind, nano_usd_per_unit, valid_from) "
            "values ($1, 1024, 'prompt', 5, '2026-01-01')",
            TINY,
        )
