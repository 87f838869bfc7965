"""The load and the books of `river bench billing`: what is expected is what is recorded, and tampering shows."""

from __future__ import annotations

import time
from collections import Counter

from support.billing import database

from river_billing.prices import seed_prices
from river_billing.recorder import record_events
from river_ops.bench.billing.books import compare
from river_ops.bench.billing.servers import add_tenants
from river_ops.bench.billing.traffic import TENANTS, draw_events, expected


def test_the_load_is_repeatable_and_of_everybody() -> None:
    """The same seed gives the same events, which are of every tenant, more of some, and of all kinds of tokens."""
    events = list(draw_events(20_000, seed=1, began_at=1.8e9))
    assert events == list(draw_events(20_000, seed=1, began_at=1.8e9))
    assert len({event.event_id for event in events}) == len(events)
    by_tenant = Counter(event.tenant_id for event in events)
    assert len(by_tenant) == TENANTS
    assert by_tenant["ten_0000"] > 5 * by_tenant[f"ten_{TENANTS - 1:04d}"]
    assert len({kind for event in events for kind in event.quantities}) == 4
    assert len({(event.base_model, event.context_length) for event in events}) == 5


async def test_books_are_compared_with_a_reckoning_of_its_own(postgres_url: str) -> None:
    """What the recorder's code wrote is what was expected; an event less, one more and a wrong balance are seen."""
    events = list(draw_events(400, seed=2, began_at=time.time()))
    wanted = expected(events)
    async with database(postgres_url) as connection:
        await seed_prices(connection)
        await add_tenants(connection)
        await record_events(connection, events[:-1])
        short = await compare(postgres_url, wanted)
        assert short.lost >= 1
        assert short.wrong_nano_usd > 0
        await record_events(connection, events)
        right = await compare(postgres_url, wanted)
        assert (right.lost, right.doubled, right.wrong_nano_usd) == (0, 0, 0)
        assert right.ledger_differences == right.deadlocks == 0
        fewer = await compare(postgres_url, expected(events[:-1]))
        assert fewer.doubled >= 1
        await connection.execute(
            "update ledger_balance set balance_nano_usd = balance_nano_usd + 1 "
            "where tenant_id = 'ten_0000' and account = 'revenue'"
        )
        tampered = await compare(postgres_url, wanted)
        assert (tampered.wrong_nano_usd, tampered.ledger_differences) == (1, 1)


async def test_sums_that_count_twice_are_seen(postgres_url: str) -> None:
    """An hour that holds more events than there are is doubled, one that holds fewer is lost."""
    events = list(draw_events(50, seed=3, began_at=time.time()))
    wanted = expected(events)
    change = (
        "update usage_hour set events = events + $1 where ctid = (select min(ctid) from usage_hour)"
    )
    async with database(postgres_url) as connection:
        await seed_prices(connection)
        await record_events(connection, events)
        await connection.execute(change, 3)
        assert (await compare(postgres_url, wanted)).doubled == 3
        await connection.execute(change, -4)
        assert (await compare(postgres_url, wanted)).lost == 1
