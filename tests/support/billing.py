"""Events to record, and what the tables say afterwards."""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Any

import asyncpg

from river_billing.events import UsageEvent, UsageKind
from river_billing.prices import card_prices

# Wide enough for a bigint times a numeric(20,9).
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)
OCCURRED_AT = datetime(2026, 11, 23, 12, 30, tzinfo=UTC).timestamp()
TINY = "river/tiny-moe"


def make_event(
    number: int = 0,
    *,
    base_model: str = TINY,
    context_length: int = 1024,
    occurred_at: float = OCCURRED_AT,
    tenant_id: str = "ten_a",
    key_id: str = "key_1",
    run_id: str | None = None,
    **quantities: int,
) -> UsageEvent:
    """The event of a request called `number`: the same arguments give the same event."""
    return UsageEvent(
        event_id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{tenant_id}/{number}")),
        occurred_at=occurred_at,
        tenant_id=tenant_id,
        key_id=key_id,
        run_id=run_id,
        base_model=base_model,
        context_length=context_length,
        quantities={UsageKind(kind): count for kind, count in quantities.items()},
    )


def random_events(count: int, *, seed: int) -> list[UsageEvent]:
    """Events of several tenants over three days, across the end of a month; others for each seed."""
    draw = random.Random(seed)
    start = datetime(2026, 10, 30, tzinfo=UTC).timestamp()
    return [
        make_event(
            1_000_000 * seed + number,
            tenant_id=f"ten_{draw.randrange(5)}",
            run_id=draw.choice([None, "run_1", "run_2"]),
            occurred_at=start + draw.randrange(3 * 86_400),
            prompt=draw.randrange(4_000),
            cached_prompt=draw.randrange(100),
            completion=draw.randrange(1, 1_000),
        )
        for number in range(count)
    ]


def golden_amount(event: UsageEvent, *, context_length: int) -> int:
    """What the card asks for an event at a tier, in exact decimals."""
    prices = {
        kind: price
        for model, tier, kind, price in card_prices()
        if (model, tier) == (event.base_model, context_length)
    }
    return sum(
        int(_EXACT.to_integral_value(_EXACT.multiply(Decimal(count), prices[kind])))
        for kind, count in event.quantities.items()
    )


@asynccontextmanager
async def database(postgres_url: str) -> AsyncGenerator[Any]:
    """An asyncpg connection for the block."""
    connection = await asyncpg.connect(postgres_url)
    try:
        yield connection
    finally:
        await connection.close()


async def totals(connection: Any) -> tuple[int, int, int]:
    """Lines, quantity and amount; the same in events and in hourly sums, and at the price of each line."""
    events = await connection.fetchrow(
        "select count(*), coalesce(sum(quantity), 0)::bigint, "
        "coalesce(sum(amount_nano_usd), 0)::bigint from usage_event"
    )
    hours = await connection.fetchrow(
        "select coalesce(sum(events), 0)::bigint, coalesce(sum(quantity), 0)::bigint, "
        "coalesce(sum(amount_nano_usd), 0)::bigint from usage_hour"
    )
    assert tuple(events) == tuple(hours)
    runs = "select run_id, kind, sum(quantity) as quantity, sum(amount_nano_usd) as amount from {} "
    of_runs = [
        await connection.fetch(
            runs.format(table) + "where run_id is not null group by 1, 2 order by 1, 2"
        )
        for table in ("usage_event", "usage_run")
    ]
    assert of_runs[0] == of_runs[1]
    wrong = await connection.fetchval(
        "select count(*) from usage_event left join price using (price_id) left join discount using (discount_id) "
        "where amount_nano_usd <> "
        "  coalesce(round_half_even(quantity * nano_usd_per_unit * (1 - coalesce(share, 0))), 0)"
    )
    assert wrong == 0
    return tuple(events)


async def add_tenant(
    connection: Any,
    tenant_id: str = "ten_a",
    *,
    billing: str = "postpaid",
    budget_nano_usd: int | None = None,
    key_id: str | None = None,
    key_budget_nano_usd: int | None = None,
) -> None:
    """A tenant, and a key of it if one is named."""
    await connection.execute(
        "insert into tenant (tenant_id, name, billing, monthly_budget_nano_usd) values ($1, $1, $2, $3)",
        tenant_id,
        billing,
        budget_nano_usd,
    )
    if key_id is not None:
        await connection.execute(
            "insert into api_key (key_id, tenant_id, name, secret_hash, prefix, scopes, monthly_budget_nano_usd) "
            "values ($1, $2, 'k', $1::text::bytea, 'rv-1', '{infer}', $3)",
            key_id,
            tenant_id,
            key_budget_nano_usd,
        )


async def add_run(connection: Any, run_id: str = "run_1") -> None:
    """A run and all that it hangs on."""
    await connection.execute(
        "insert into tenant (tenant_id, name) values ('ten_a', 'a') on conflict do nothing"
    )
    await connection.execute(
        "insert into api_key (key_id, tenant_id, name, secret_hash, prefix, scopes) "
        "values ('key_1', 'ten_a', 'k', 'x', 'rv-1', '{train}') on conflict do nothing"
    )
    await connection.execute(
        "insert into session (session_id, tenant_id, key_id) "
        "values ('ses_1', 'ten_a', 'key_1') on conflict do nothing"
    )
    await connection.execute(
        "insert into run (run_id, tenant_id, session_id, base_model, lora, context_length) "
        "values ($1, 'ten_a', 'ses_1', $2, '{}', 1024)",
        run_id,
        TINY,
    )
