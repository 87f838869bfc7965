"""Whether what is in the tables is what was sent: nothing lost, nothing doubled, every balance right."""

from __future__ import annotations

from collections import Counter
from typing import Any

import asyncpg
from msgspec import Struct

from river_billing.ledger import ledger_differences
from river_ops.bench.billing.servers import FORTUNE_NANO_USD
from river_ops.bench.billing.traffic import Expected

_EVENTS = "select count(distinct event_id), count(*) from usage_event"
_SUMS = "select coalesce(sum(events), 0)::bigint from usage_hour"
_AMOUNTS = """
select tenant_id, sum(amount_nano_usd)::bigint as amount, 'events' as place from usage_event group by 1
union all
select tenant_id, sum(amount_nano_usd)::bigint, 'hours' from usage_hour group by 1
union all
select tenant_id, balance_nano_usd, 'revenue' from ledger_balance where account = 'revenue'
union all
select tenant_id, $1 - balance_nano_usd, 'paid' from ledger_balance join tenant using (tenant_id)
where account = 'credit' and billing = 'prepaid'
union all
select tenant_id, -balance_nano_usd, 'paid' from ledger_balance join tenant using (tenant_id)
where account = 'receivable' and billing = 'postpaid'
"""
_DEADLOCKS = "select deadlocks from pg_stat_database where datname = current_database()"
PLACES = ("events", "hours", "revenue", "paid")


class Books(Struct, frozen=True, kw_only=True):
    """What was found beside what was sent; zero everywhere is right.

    `lost` and `doubled` are events, or lines where only some of an event's are; `wrong_nano_usd` adds up by how much
    each tenant's events, hourly sums, revenue, and credit or debt differ from what the price card asks.
    """

    lost: int
    doubled: int
    wrong_nano_usd: int
    ledger_differences: int
    deadlocks: int


async def compare(postgres_url: str, wanted: Expected) -> Books:
    """Reads everything back."""
    connection: Any = await asyncpg.connect(postgres_url)
    try:
        events, lines = await connection.fetchrow(_EVENTS)
        summed = await connection.fetchval(_SUMS)
        found: dict[str, Counter[str]] = {place: Counter() for place in PLACES}
        for row in await connection.fetch(_AMOUNTS, FORTUNE_NANO_USD):
            found[row["place"]][row["tenant_id"]] = row["amount"]
        wrong = [
            abs(amounts[tenant] - wanted.amounts[tenant])
            for amounts in found.values()
            for tenant in amounts.keys() | wanted.amounts.keys()
        ]
        least, most = min(lines, summed), max(lines, summed)
        return Books(
            lost=max(wanted.events - events, wanted.lines - least, 0),
            doubled=max(events - wanted.events, most - wanted.lines, 0),
            wrong_nano_usd=sum(wrong),
            ledger_differences=len(await ledger_differences(connection)),
            deadlocks=await connection.fetchval(_DEADLOCKS),
        )
    finally:
        await connection.close()
