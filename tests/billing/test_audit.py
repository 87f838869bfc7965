"""The audit: silent about honest books, however busy, and able to name whatever somebody has changed in them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from support.billing import TINY, add_tenant, database, make_event

from river_billing.audit import Audit, find_differences
from river_billing.events import TokensCounted, UsageEvent, UsageKind
from river_billing.invoices import close_invoices
from river_billing.ledger import add_credit, set_billing
from river_billing.prices import seed_prices, set_price
from river_billing.recorder import record_events
from river_client.cli import river
from river_ops.commands import billing as billing_commands

TENANTS = ("ten_a", "ten_b", "ten_c")
CLOSED = date(2024, 10, 1)


async def fill(connection: Any, seed: int = 1) -> None:
    """Books of three tenants, prepaid and not: usage of four months in batches, repeated, late, and at two prices."""
    draw = random.Random(seed)
    for tenant, billing in zip(TENANTS, ("prepaid", "postpaid", "postpaid"), strict=True):
        await add_tenant(connection, tenant, billing=billing)
        await add_credit(connection, tenant_id=tenant, amount_nano_usd=10**9, reference="first")
    start = datetime(2024, 8, 20, tzinfo=UTC).timestamp()
    events = [
        msgspec.structs.replace(
            make_event(
                number,
                tenant_id=draw.choice(TENANTS),
                key_id=f"key_{draw.randrange(2)}",
                occurred_at=start + draw.randrange(100 * 86_400),
                prompt=draw.randrange(3_000),
                cached_prompt=draw.randrange(50),
                completion=draw.randrange(1, 900),
            ),
            user=draw.choice((None, "ann")),
            run_id=draw.choice((None, "run_1")),
        )
        for number in range(240)
    ]
    for begin in range(0, 160, 20):
        await record_events(connection, events[begin : begin + 20])
    await close_invoices(connection, "ten_a", date(2024, 9, 1))
    await set_billing(connection, "ten_a", "postpaid")
    await add_credit(
        connection, tenant_id="ten_a", amount_nano_usd=-5, reference="oops", kind="adjustment"
    )
    await record_events(connection, [*events[:40], *events[160:200]])
    for tenant in TENANTS:
        await close_invoices(connection, tenant, CLOSED)
    await set_price(
        connection,
        model=TINY,
        context_length=1024,
        kind=UsageKind.COMPLETION,
        nano_usd_per_unit=Decimal("0.5"),
    )
    await add_credit(
        connection, tenant_id="ten_b", amount_nano_usd=77, reference="gift", kind="grant"
    )
    now = datetime.now(UTC).timestamp() + 1
    await record_events(
        connection,
        [
            *events[200:],
            make_event(900, tenant_id="ten_b", occurred_at=now, completion=7),
            make_event(901, tenant_id="ten_c", occurred_at=now, base_model="new/model", prompt=3),
        ],
    )


async def tamper(connection: Any, statements: Sequence[str]) -> None:
    """Changes rows as a superuser can: with all triggers off."""
    await connection.execute("set session_replication_role = replica")
    for statement in statements:
        changed = await connection.execute(statement)
        assert not changed.endswith(" 0"), statement
    await connection.execute("set session_replication_role = origin")


def named(found: Audit) -> set[str]:
    return {difference.table for difference in found.differences}


async def test_honest_books_are_in_order(connection: Any) -> None:
    """Batches, repetitions, late usage, price changes, both billings, credit and invoices: nothing is found."""
    await fill(connection)
    found = await find_differences(connection)
    assert found.differences == []
    assert found.cut == found.notes == []
    lines = await connection.fetchval("select count(*) from usage_event")
    assert found.examined["usage_event"] == lines > 600
    assert found.examined["invoice"] >= 5


ONE_EVENT = (
    "event_id = (select event_id from usage_event where tenant_id = 'ten_b' and kind = 'completion' "
    "and amount_nano_usd > 1 and run_id is null order by event_id limit 1)"
)
ONE = f"kind = 'completion' and {ONE_EVENT}"
ONE_INVOICE = "number = (select max(number) from invoice where tenant_id = 'ten_b')"
ONE_LINE = f"line = 1 and {ONE_INVOICE}"
ONE_HOUR = "(tenant_id, hour, kind, key_id) = (select tenant_id, hour, kind, key_id from usage_hour limit 1)"
ONE_MONTH = (
    "(tenant_id, month, key_id) = (select tenant_id, month, key_id from usage_month limit 1)"
)
ONE_POSTING = (
    "transaction_id = (select min(transaction_id) from ledger_transaction "
    "where kind = 'usage' and tenant_id = 'ten_b')"
)
PAYMENT = "tenant_id = 'ten_a' and account = 'payments'"
CREDIT = "tenant_id = 'ten_a' and account = 'credit'"
INVENTED = f"""
insert into usage_event
select gen_random_uuid(), kind, occurred_at, tenant_id, key_id, run_id, session_id, end_user, base_model,
       policy_version, context_length, quantity, price_id, amount_nano_usd
from usage_event where {ONE}
"""
LATER = "update invoice set closed_at = closed_at + interval '1 hour'"


@pytest.mark.parametrize(
    ("statements", "tables"),
    [
        pytest.param(
            [f"update usage_event set amount_nano_usd = amount_nano_usd + 1 where {ONE}"],
            {"usage_event", "usage_hour", "ledger_transaction"},
            id="an amount",
        ),
        pytest.param(
            [f"update usage_event set quantity = quantity - 1 where {ONE}"],
            {"usage_event", "usage_hour"},
            id="a quantity",
        ),
        pytest.param(
            [f"delete from usage_event where {ONE_EVENT}"],
            {"usage_hour", "ledger_transaction"},
            id="a removed event",
        ),
        pytest.param(
            [INVENTED],
            {"usage_hour", "ledger_transaction"},
            id="an invented event",
        ),
        pytest.param(
            [f"update usage_event set price_id = price_id + 1 where {ONE}"],
            {"usage_event"},
            id="another kind's price",
        ),
        pytest.param(
            [
                "update price set nano_usd_per_unit = 5 where model = 'river/tiny-moe' and kind = 'prompt'"
            ],
            {"usage_event", "invoice_line"},
            id="a price",
        ),
        pytest.param(
            [f"update usage_hour set quantity = quantity + 1 where {ONE_HOUR}"],
            {"usage_hour"},
            id="an hour",
        ),
        pytest.param(
            [f"update usage_month set amount_nano_usd = 1 where {ONE_MONTH}"],
            {"usage_month"},
            id="a month",
        ),
        pytest.param(
            [
                "update usage_run set amount_nano_usd = 1 where tenant_id = 'ten_a' and kind = 'prompt'"
            ],
            {"usage_run"},
            id="a run",
        ),
        pytest.param(
            [f"update ledger_balance set balance_nano_usd = balance_nano_usd + 1 where {CREDIT}"],
            {"ledger_balance"},
            id="a balance",
        ),
        pytest.param(
            [f"update ledger_entry set amount_nano_usd = amount_nano_usd + 1 where {PAYMENT}"],
            {"ledger_transaction", "ledger_balance"},
            id="one side of a transaction",
        ),
        pytest.param(
            [f"delete from ledger_entry where {ONE_POSTING}"],
            {"ledger_transaction", "ledger_entry", "ledger_balance"},
            id="a posting's entries",
        ),
        pytest.param(
            [
                f"delete from ledger_entry where {ONE_POSTING}",
                f"delete from ledger_transaction where {ONE_POSTING}",
            ],
            {"ledger_transaction", "ledger_entry", "ledger_balance"},
            id="a whole posting",
        ),
        pytest.param(
            [f"update ledger_entry set account = 'promotions' where {PAYMENT}"],
            {"ledger_entry", "ledger_balance"},
            id="where credit came from",
        ),
        pytest.param(
            [
                f"update ledger_entry set tenant_id = 'ten_c' where {CREDIT} and amount_nano_usd = 1000000000"
            ],
            {"ledger_entry", "ledger_balance"},
            id="whose credit it is",
        ),
        pytest.param(
            [
                f"update invoice_line set amount_nano_usd = amount_nano_usd + 1000000000 where {ONE_LINE}"
            ],
            {"invoice", "invoice_line"},
            id="an invoice line",
        ),
        pytest.param(
            [
                f"update invoice_line set amount_nano_usd = amount_nano_usd - 1 where {ONE_LINE}",
                f"update invoice set amount_nano_usd = amount_nano_usd - 1 where {ONE_INVOICE}",
                LATER,
            ],
            {"invoice_line"},
            id="a line and its invoice, as if it were late",
        ),
        pytest.param(
            [f"delete from invoice_line where {ONE_LINE}", LATER],
            {"invoice", "invoice_line"},
            id="a removed line",
        ),
        pytest.param(
            [f"update invoice_line set nano_usd_per_unit = 1 where {ONE_LINE}"],
            {"invoice_line"},
            id="a line's price",
        ),
        pytest.param(
            [f"update invoice_line set discount_id = 99, discount_share = 0.5 where {ONE_LINE}"],
            {"invoice_line"},
            id="a line's discount",
        ),
        pytest.param(
            [f"update invoice set due_cents = due_cents + 1 where {ONE_INVOICE}"],
            {"invoice"},
            id="what is due",
        ),
        pytest.param(
            [
                f"update invoice set credit_added_nano_usd = credit_added_nano_usd + 1 where {ONE_INVOICE}"
            ],
            {"invoice"},
            id="an invoice's credit",
        ),
        pytest.param(
            [
                "update invoice_line set number = 99 where number = 2",
                "update invoice set number = 99 where number = 2",
            ],
            {"invoice"},
            id="a missing number",
        ),
    ],
)
async def test_whatever_is_changed_is_named(
    connection: Any, statements: list[str], tables: set[str]
) -> None:
    """A row that somebody changed, removed or invented is found, in the tables that show it and in no others."""
    await fill(connection)
    await tamper(connection, statements)
    found = await find_differences(connection)
    assert named(found) == tables
    assert all(one.id and one.expected != one.found for one in found.differences)


async def test_a_difference_says_what_and_how_much(connection: Any) -> None:
    """It names the row, what it should say, and what it says."""
    await fill(connection)
    row = await connection.fetchrow(
        f"select event_id, amount_nano_usd from usage_event where {ONE}"
    )
    await tamper(
        connection,
        [f"update usage_event set amount_nano_usd = 1 where {ONE}"],
    )
    differences = (await find_differences(connection)).differences
    (event,) = [one for one in differences if one.table == "usage_event"]
    assert event.id == f"{row['event_id']} completion"
    assert (Decimal(event.expected), event.found) == (row["amount_nano_usd"], "1")
    (posting,) = [one for one in differences if one.table == "ledger_transaction"]
    assert posting.id.startswith("ten_b at ")
    assert int(posting.found) - int(posting.expected) == row["amount_nano_usd"] - 1


OPENING = "usage before the ledger began"
POST = """
insert into ledger_entry (transaction_id, account, tenant_id, amount_nano_usd)
select transaction_id, account, tenant_id, amount
from ledger_transaction cross join (values ('revenue', {total}), ('receivable', -{total})) as e (account, amount)
"""


async def test_usage_from_before_the_ledger_is_posted_at_once(connection: Any) -> None:
    """What a database had used when its ledger was begun counts as posted by the one transaction for all of it."""
    await seed_prices(connection)
    for number in range(3):
        await record_events(connection, [make_event(number, completion=10 + number)])
    total = await connection.fetchval("select sum(amount_nano_usd)::bigint from usage_event")
    await tamper(
        connection,
        [
            "delete from ledger_entry",
            "delete from ledger_transaction",
            "insert into ledger_transaction (tenant_id, kind, note) values ('ten_a', 'usage', '"
            + OPENING
            + "')",
            POST.format(total=total),
        ],
    )
    await record_events(connection, [make_event(9, completion=5)])
    assert (await find_differences(connection)).differences == []


STARTED_AT = time.time() - 7200


def counted(
    tokens: int,
    *,
    producer: str = "eng_1",
    ago_s: float = 0,
    started: float = 0,
    final: bool = False,
) -> TokensCounted:
    """An engine's completion tokens, counted so long ago in its life of that number."""
    now = time.time()
    return TokensCounted(
        producer_id=producer,
        base_model=TINY,
        started_at=STARTED_AT + started,
        counted_at=now - ago_s,
        tokens={UsageKind.COMPLETION: tokens},
        final=final,
    )


def produced(number: int, tokens: int) -> UsageEvent:
    return make_event(number, completion=tokens)


async def counts_differ(
    connection: Any, *events: TokensCounted, settle_s: float = 600
) -> list[str]:
    """What the audit finds of the counts, once the events are recorded, each twice."""
    await record_events(connection, [*events, *reversed(events)])
    found = await find_differences(connection, settle_s=settle_s)
    assert named(found) <= {"token_count"}
    return [f"{one.expected}, {one.found}" for one in found.differences]


async def test_what_was_produced_is_what_is_billed(connection: Any) -> None:
    """Two engines, one of which was started again, have counted together what is on the bills."""
    lives = [
        counted(40, ago_s=4000, final=True),
        counted(20, started=100),
        counted(5, producer="eng_2"),
    ]
    await record_events(connection, [produced(1, 50), produced(2, 15)])
    await age_usage(connection)
    assert await counts_differ(connection, *lives, settle_s=0) == []
    await record_events(connection, [produced(3, 1)])
    await age_usage(connection)
    (billed_too_much,) = await counts_differ(connection)
    assert billed_too_much == "40 to 65 counted by 3 processes, 66 billed"


async def test_what_was_produced_long_ago_must_be_billed(connection: Any) -> None:
    """Tokens that an engine counted a while ago and nobody is billed for are found; fresh ones may be on their way."""
    await record_events(connection, [produced(1, 30)])
    assert await counts_differ(connection, counted(30, ago_s=3700), counted(35)) == []
    (lost,) = await counts_differ(connection, settle_s=0)
    assert lost == "35 to 35 counted by 1 processes, 30 billed"


async def test_a_killed_engine_proves_nothing_against_a_bill(connection: Any) -> None:
    """What a process produced after it last counted is unknown: said, and no difference."""
    await record_events(connection, [produced(1, 60)])
    await age_usage(connection)
    assert await counts_differ(connection, counted(40, ago_s=1000), counted(5, started=50)) == []
    (note,) = (await find_differences(connection)).notes
    assert note.startswith("eng_1, started ")
    assert "is not known" in note


async def age_usage(connection: Any) -> None:
    """As if all of it had been recorded a minute ago, in the lives of all engines."""
    minute_ago = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
    await tamper(
        connection,
        [
            f"update usage_event set recorded_at = '{minute_ago}'",
            f"update ledger_transaction set created_at = '{minute_ago}'",
        ],
    )


async def test_months_that_are_set_aside_are_audited(connection: Any) -> None:
    """A detached partition is part of the books, and a row changed in it is found."""
    await fill(connection)
    await connection.execute("alter table usage_event detach partition usage_event_2024_09")
    assert (await find_differences(connection)).differences == []
    await tamper(connection, ["update usage_event_2024_09 set amount_nano_usd = 10 ^ 9"])
    assert "usage_event" in named(await find_differences(connection))


async def test_the_audit_runs_beside_recorders(connection: Any, postgres_url: str) -> None:
    """While batches are being committed, each audit sees whole ones only."""
    await fill(connection)
    done = asyncio.Event()

    async def record() -> None:
        async with database(postgres_url) as own:
            number = 10_000
            while not done.is_set():
                batch = [make_event(number + n, tenant_id="ten_b", prompt=50) for n in range(20)]
                await record_events(own, batch)
                number += 20

    recording = asyncio.create_task(record())
    try:
        for _ in range(5):
            assert (await find_differences(connection)).differences == []
    finally:
        done.set()
        await recording


async def test_the_command_says_it_by_its_status(connection: Any, postgres_url: str) -> None:
    """`river billing audit` ends with 0 when there is nothing, 1 when there is, and 2 when it cannot look."""
    await fill(connection)
    river.add_command(billing_commands.billing)

    async def run(*words: str, url: str = postgres_url) -> Any:
        command = ["billing", "audit", "--postgres-url", url, *words]
        return await asyncio.to_thread(CliRunner().invoke, river, command)

    done = await run()
    assert (done.exit_code, done.output.splitlines()[-1][:14]) == (0, "0 differences;"), done.output
    await tamper(
        connection,
        [f"update ledger_balance set balance_nano_usd = 7 where {CREDIT}"],
    )
    done = await run()
    assert done.exit_code == 1
    assert done.output.startswith("ledger_balance: ten_a credit: expected ")
    (difference,) = json.loads((await run("--json")).output)["differences"]
    assert (difference["table"], difference["found"]) == ("ledger_balance", "7")
    assert (await run(url="postgresql://127.0.0.1:9/x")).exit_code == 2
