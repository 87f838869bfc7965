"""The books in Postgres: balanced, final, and equal to the usage that they charge."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from support.billing import add_tenant, database, golden_amount, make_event, random_events

from river_billing import limits
from river_billing.errors import AmountError, ReferenceTakenError, UnknownAccountError
from river_billing.ledger import (
    add_credit,
    credit_of,
    ledger_differences,
    rebuild_balances,
    set_billing,
    transactions,
)
from river_billing.prices import seed_prices
from river_billing.recorder import record_events


async def top_up(connection: Any, amount_nano_usd: int, reference: str = "r1", **more: Any) -> Any:
    """Credit for ten_a."""
    return await add_credit(
        connection,
        tenant_id="ten_a",
        amount_nano_usd=amount_nano_usd,
        reference=reference,
        **more,
    )


async def test_usage_is_charged_to_credit_or_owed(connection: Any) -> None:
    """A prepaid tenant's usage lowers its credit, a postpaid one's is owed, and replays charge nothing."""
    await add_tenant(connection, billing="prepaid")
    await add_tenant(connection, "ten_b")
    await top_up(connection, 10**9)
    mine, other = make_event(1, prompt=1000), make_event(2, tenant_id="ten_b", completion=500)
    for _ in range(2):
        await record_events(connection, [mine, other, mine])
    a, b = await credit_of(connection, "ten_a"), await credit_of(connection, "ten_b")
    assert a.balance_nano_usd == 10**9 - golden_amount(mine, context_length=1024)
    assert (b.balance_nano_usd, b.owed_nano_usd) == (0, golden_amount(other, context_length=1024))
    assert await ledger_differences(connection) == []
    newest = (await transactions(connection, "ten_a"))[0]
    assert newest.kind == "usage"
    assert newest.amount_nano_usd == -golden_amount(mine, context_length=1024)
    assert sum(newest.entries.values()) == 0


async def test_a_reference_is_booked_once(connection: Any) -> None:
    """The same top-up, sent again or twice at once, is one; another under its reference is refused."""
    await add_tenant(connection)
    first = await top_up(connection, 5_000, note="first", actor="key_9")
    assert await top_up(connection, 5_000) == first
    with pytest.raises(ReferenceTakenError):
        await top_up(connection, 5_001)
    with pytest.raises(ReferenceTakenError):
        await top_up(connection, 5_000, kind="grant")
    assert (first.note, first.actor) == ("first", "key_9")
    assert (await credit_of(connection, "ten_a")).balance_nano_usd == 5_000


async def test_credit_comes_from_somewhere(connection: Any) -> None:
    """Each kind has its own source, and only an adjustment takes."""
    await add_tenant(connection)
    await top_up(connection, 7, "a")
    await top_up(connection, 11, "b", kind="grant")
    await top_up(connection, -2, "c", kind="adjustment")
    found = await transactions(connection, "ten_a")
    assert [one.entries for one in found] == [
        {"credit": -2, "adjustments": 2},
        {"credit": 11, "promotions": -11},
        {"credit": 7, "payments": -7},
    ]
    assert await transactions(connection, "ten_a", before=found[1].transaction_id) == found[2:]
    assert (await credit_of(connection, "ten_a")).balance_nano_usd == 16


@pytest.mark.parametrize(
    ("amount_nano_usd", "kind"),
    [(0, "top_up"), (-1, "top_up"), (-1, "grant"), (0, "adjustment"), (10**18 + 1, "top_up")],
)
async def test_amounts_that_cannot_be_meant(
    connection: Any, amount_nano_usd: int, kind: Any
) -> None:
    """Nothing is booked for them, nor for a tenant that is not there."""
    with pytest.raises(UnknownAccountError):
        await top_up(connection, 1)
    await add_tenant(connection)
    with pytest.raises(AmountError, match="amount_nano_usd"):
        await top_up(connection, amount_nano_usd, kind=kind)
    assert await transactions(connection, "ten_a") == []
    assert limits.AMOUNT_MAX_NANO_USD == 10**18


async def begin(connection: Any) -> int:
    """A transaction without entries yet."""
    return await connection.fetchval(
        "insert into ledger_transaction (tenant_id, kind) values ('ten_a', 'grant') returning transaction_id"
    )


async def enter(connection: Any, transaction_id: int, account: str, amount: int) -> None:
    """One entry."""
    await connection.execute(
        "insert into ledger_entry (transaction_id, tenant_id, account, amount_nano_usd) "
        "values ($1, 'ten_a', $2, $3)",
        transaction_id,
        account,
        amount,
    )


@pytest.mark.parametrize(
    "entries",
    [{}, {"credit": 5}, {"credit": 5, "payments": -4}, {"credit": 5, "payments": 5}],
    ids=str,
)
async def test_the_database_refuses_what_does_not_balance(
    connection: Any, entries: dict[str, int]
) -> None:
    """Not the code but the commit looks after it, whoever writes."""

    async def book() -> None:
        async with connection.transaction():
            transaction_id = await begin(connection)
            for account, amount in entries.items():
                await enter(connection, transaction_id, account, amount)

    with pytest.raises(asyncpg.CheckViolationError):
        await book()
    assert await connection.fetchval("select count(*) from ledger_transaction") == 0
    assert (
        await connection.fetchval("select coalesce(sum(balance_nano_usd), 0) from ledger_balance")
        == 0
    )


async def test_nothing_is_added_to_a_transaction_later(connection: Any) -> None:
    """Not even what balances."""
    await add_tenant(connection)
    booked = await top_up(connection, 5)

    async def add() -> None:
        async with connection.transaction():
            await enter(connection, booked.transaction_id, "revenue", 5)
            await enter(connection, booked.transaction_id, "receivable", -5)

    with pytest.raises(asyncpg.RestrictViolationError):
        await add()


@pytest.mark.parametrize("table", ["ledger_transaction", "ledger_entry"])
@pytest.mark.parametrize(
    "statement", ["update {} set tenant_id = 'x'", "delete from {}", "truncate {} cascade"]
)
async def test_the_books_are_final(connection: Any, table: str, statement: str) -> None:
    """No statement changes or removes an entry."""
    await add_tenant(connection)
    await top_up(connection, 5)
    with pytest.raises(asyncpg.RestrictViolationError):
        await connection.execute(statement.format(table))
    assert len(await transactions(connection, "ten_a")) == 1


async def test_differences_are_named_and_sums_rebuilt(connection: Any) -> None:
    """A stored sum that was tampered with, and usage that is in no book, are found."""
    await add_tenant(connection)
    await top_up(connection, 5)
    await record_events(connection, [make_event(1, prompt=100)])
    assert await ledger_differences(connection) == []
    await connection.execute(
        "update ledger_balance set balance_nano_usd = 6 where account = 'credit'"
    )
    assert await ledger_differences(connection) == [("ten_a", "credit", 6, 5)]
    await rebuild_balances(connection)
    assert await ledger_differences(connection) == []
    await connection.execute(
        "insert into usage_event (event_id, kind, occurred_at, tenant_id, key_id, base_model, context_length, "
        "quantity, amount_nano_usd) values (gen_random_uuid(), 'prompt', '2026-11-24', 'ten_a', 'k', 'm', 1, 1, 9)"
    )
    assert await ledger_differences(connection) == [("ten_a", "revenue of usage", 1000, 1009)]


async def test_what_was_booked_stays_when_billing_changes(connection: Any) -> None:
    """Usage goes to where the tenant stands when it is recorded."""
    await add_tenant(connection)
    await record_events(connection, [make_event(1, prompt=100)])
    await set_billing(connection, "ten_a", "prepaid")
    await record_events(connection, [make_event(2, prompt=100)])
    standing = await credit_of(connection, "ten_a")
    assert (standing.billing, standing.balance_nano_usd, standing.owed_nano_usd) == (
        "prepaid",
        -1000,
        1000,
    )


async def test_recorders_side_by_side_charge_once(connection: Any, postgres_url: str) -> None:
    """Four writers with the same tenants in any order: no deadlock, and every event charged once."""
    await seed_prices(connection)
    events = random_events(600, seed=9)

    async def write(order: int) -> None:
        async with database(postgres_url) as own:
            mixed = sorted(events, key=lambda event: hash((event.event_id, order)))
            for start in range(0, len(mixed), 40):
                await record_events(own, mixed[start : start + 40])

    await asyncio.gather(*(write(order) for order in range(4)))
    assert await ledger_differences(connection) == []
    revenue = await connection.fetchval(
        "select sum(balance_nano_usd) from ledger_balance where account = 'revenue'"
    )
    assert revenue == sum(golden_amount(event, context_length=1024) for event in events)
    of_months = await connection.fetch(
        "select month::text, sum(amount_nano_usd) from usage_month group by 1 order by 1"
    )
    assert [row["month"] for row in of_months] == ["2026-10-01", "2026-11-01"]
    assert sum(row[1] for row in of_months) == revenue
