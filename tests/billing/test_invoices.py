"""Invoices: once for each month, never changed, and together exactly what was used."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import asyncpg
import msgspec
import pytest
from support.billing import TINY, add_tenant, database, make_event

from river_billing import limits
from river_billing.errors import ClosingError, UnknownAccountError
from river_billing.events import UsageKind
from river_billing.invoice_page import invoice_page
from river_billing.invoices import (
    close_invoices,
    find_invoice,
    list_invoices,
    open_invoices,
    parse_month,
)
from river_billing.ledger import add_credit, credit_of, set_billing
from river_billing.prices import set_price
from river_billing.recorder import record_events
from river_client.invoice_wire import NANO_USD_PER_CENT, Invoice, InvoiceLine

SEPTEMBER, OCTOBER, NOVEMBER = (date(2024, month, 1) for month in (9, 10, 11))


def at(month: date, day: int = 15) -> float:
    return datetime(month.year, month.month, day, 12, tzinfo=UTC).timestamp()


async def use(connection: Any, number: int, month: date, **quantities: Any) -> None:
    """One event in the middle of a month, recorded now."""
    await record_events(connection, [make_event(number, occurred_at=at(month), **quantities)])


async def price(connection: Any, nano_usd: str, kind: UsageKind = UsageKind.COMPLETION) -> None:
    """What a token of the tiny model costs from now on; later than any event of these tests."""
    await set_price(
        connection, model=TINY, context_length=1024, kind=kind, nano_usd_per_unit=Decimal(nano_usd)
    )


async def move(connection: Any, tenant: str, months: int) -> None:
    """Makes a tenant's credit older than it is."""
    await connection.execute("set session_replication_role = replica")
    await connection.execute(
        "update ledger_transaction set created_at = created_at - make_interval(months => $2) "
        "where tenant_id = $1 and kind <> 'usage'",
        tenant,
        months,
    )
    await connection.execute("set session_replication_role = origin")


def sums(invoices: list[Invoice]) -> tuple[int, int]:
    """What invoices say in all, by their lines: amount and credit used."""
    lines = [line for invoice in invoices for line in invoice.lines]
    return (
        sum(line.amount_nano_usd for line in lines),
        sum(line.credit_used_nano_usd for line in lines),
    )


async def used(connection: Any) -> int:
    return await connection.fetchval(
        "select coalesce(sum(amount_nano_usd), 0)::bigint from usage_event"
    )


async def test_a_month_is_invoiced_once(connection: Any) -> None:
    """Lines are per kind and price, sum up to the usage, and closing again changes nothing and makes no second."""
    await add_tenant(connection)
    await use(connection, 1, OCTOBER, prompt=1001, completion=333)
    await use(connection, 2, OCTOBER, prompt=7, cached_prompt=3)
    (invoice,) = await close_invoices(connection, "ten_a", OCTOBER, actor="key_admin")
    assert (invoice.number, invoice.month, invoice.tenant_name) == (1, "2024-10", "ten_a")
    assert [
        (line.kind, line.quantity, line.events, line.price, line.tier) for line in invoice.lines
    ] == [
        ("cached_prompt", 3, 1, "0.002", 1024),
        ("completion", 333, 1, "0.03", 1024),
        ("prompt", 1008, 2, "0.01", 1024),
    ]
    assert sums([invoice]) == (await used(connection), 0)
    assert invoice.amount_nano_usd == 1001 * 10 + 7 * 10 + 333 * 30 + 6
    assert await close_invoices(connection, "ten_a", OCTOBER) == [invoice]
    assert await list_invoices(connection, None) == [msgspec.structs.replace(invoice, lines=[])]
    assert await find_invoice(connection, 1, "ten_b") is None
    assert await open_invoices(connection, "ten_a") == []


async def test_late_usage_is_an_adjustment(connection: Any) -> None:
    """What is recorded after its month was closed is a line of the next invoice; the closed one stays as it was."""
    await add_tenant(connection)
    await use(connection, 1, SEPTEMBER, completion=100)
    (first,) = await close_invoices(connection, "ten_a", SEPTEMBER)
    await use(connection, 2, SEPTEMBER, completion=11)
    await use(connection, 3, OCTOBER, completion=5)
    (opened,) = await open_invoices(connection, "ten_a")
    (second,) = await close_invoices(connection, "ten_a", OCTOBER)
    assert opened.lines == second.lines
    assert [(line.month, line.quantity, line.adjustment) for line in second.lines] == [
        ("2024-09", 11, True),
        ("2024-10", 5, False),
    ]
    assert await find_invoice(connection, 1) == first
    assert sums([first, second])[0] == await used(connection)


async def test_late_usage_alone_is_invoiced(connection: Any) -> None:
    """A month without usage of its own still bills what came late, and one with nothing at all has no invoice."""
    await add_tenant(connection)
    await use(connection, 1, SEPTEMBER, completion=100)
    await close_invoices(connection, "ten_a", SEPTEMBER)
    assert await close_invoices(connection, "ten_a", OCTOBER) == []
    await use(connection, 2, date(2024, 2, 1), completion=9)
    (second,) = await close_invoices(connection, "ten_a", NOVEMBER)
    assert (second.month, second.number) == ("2024-11", 2)
    assert [(line.month, line.adjustment) for line in second.lines] == [("2024-02", True)]


async def test_months_are_closed_in_their_order(connection: Any) -> None:
    """Closing a month closes the open ones before it, each with what is its own."""
    await add_tenant(connection)
    for number, month in enumerate((NOVEMBER, SEPTEMBER, OCTOBER)):
        await use(connection, number, month, completion=10 + number)
    closed = await close_invoices(connection, "ten_a", OCTOBER)
    assert [(one.number, one.month) for one in closed] == [(1, "2024-09"), (2, "2024-10")]
    assert [one.lines[0].quantity for one in closed] == [11, 12]
    assert [one.month for one in await open_invoices(connection, "ten_a")] == ["2024-11"]
    await close_invoices(connection, "ten_a", NOVEMBER)
    assert await close_invoices(connection, "ten_a", SEPTEMBER) == [closed[0]]


async def test_each_price_has_its_line(connection: Any) -> None:
    """A price that changes in the middle of a month makes two lines, and usage without a price is shown."""
    await add_tenant(connection)
    now = datetime.now(UTC)
    month = now.date().replace(day=1)
    event = make_event(1, occurred_at=(now - dt.timedelta(seconds=1)).timestamp(), completion=10)
    await record_events(connection, [event])
    await price(connection, "0.5")
    later = (now + dt.timedelta(minutes=1)).timestamp()
    await record_events(
        connection,
        [
            make_event(2, occurred_at=later, completion=3),
            make_event(3, occurred_at=later, base_model="new/model", prompt=4),
        ],
    )
    lines = [
        line
        for one in await open_invoices(
            connection, "ten_a", until=month.replace(year=month.year + 1)
        )
        for line in one.lines
    ]
    assert [
        (line.model, line.quantity, line.price, line.nano_usd_per_unit, line.amount_nano_usd)
        for line in lines
    ] == [
        ("new/model", 4, None, None, 0),
        (TINY, 10, "0.03", "30.000000000", 300),
        (TINY, 3, "0.0005", "0.500000000", 2),
    ]


async def test_open_invoices_beside_recording(connection: Any, postgres_url: str) -> None:
    """What is recorded between two of the queries is not seen by the second alone, which would look like an error."""
    await add_tenant(connection)
    await use(connection, 1, OCTOBER, prompt=10)
    waiting = (
        "select exists (select from pg_locks where relation = 'price'::regclass and not granted)"
    )
    async with database(postgres_url) as reader:
        async with connection.transaction():
            # Hours are read without prices, events with them: the reader waits between the two.
            await connection.execute("lock table price in access exclusive mode")
            opened = asyncio.create_task(open_invoices(reader, "ten_a"))
            async with asyncio.timeout(30):
                while not await connection.fetchval(waiting):  # noqa: ASYNC110 - Postgres sends no events
                    await asyncio.sleep(0.01)
            await use(connection, 2, OCTOBER, prompt=7)
        assert [line.quantity for one in await opened for line in one.lines] == [10]
        again = await open_invoices(reader, "ten_a")
    assert [line.quantity for one in again for line in one.lines] == [17]


async def test_cents_are_rounded_once_and_carried(connection: Any) -> None:
    """What is due is whole cents; what rounding leaves goes to the next invoice, so that nothing adds up."""
    await add_tenant(connection)
    months = [date(2023, month, 1) for month in range(1, 13)]
    draw = random.Random(11)
    for number, month in enumerate(months):
        await use(connection, number, month, completion=draw.randrange(10**6))
    closed = await close_invoices(connection, "ten_a", months[-1])
    assert len(closed) == 12
    carried = 0
    for invoice in closed:
        assert invoice.carried_nano_usd == carried
        carried = invoice.carried_on_nano_usd
        assert abs(carried) <= NANO_USD_PER_CENT // 2
    due = sum(invoice.due_cents for invoice in closed) * NANO_USD_PER_CENT
    assert due + carried == await used(connection) == sums(closed)[0]
    assert sum(invoice.due_cents for invoice in closed) > 0


@pytest.mark.parametrize(
    ("completion", "due"), [(166_667, 1), (500_000, 2), (833_333, 2), (833_334, 3)]
)
async def test_half_a_cent_goes_to_the_even_one(connection: Any, completion: int, due: int) -> None:
    """1.5 cents are 2, and so are 2.49999; 166,667 tokens at 30 nano-dollars are half a cent and a little."""
    await add_tenant(connection)
    await use(connection, 1, OCTOBER, completion=completion)
    assert (await close_invoices(connection, "ten_a", OCTOBER))[0].due_cents == due


async def test_credit_pays_what_was_used_prepaid(connection: Any) -> None:
    """Usage charged to credit is not owed, and an invoice says what of the credit it leaves, month after month."""
    await add_tenant(connection, billing="prepaid")
    await add_credit(connection, tenant_id="ten_a", amount_nano_usd=10**9, reference="early")
    await move(connection, "ten_a", 36)
    await use(connection, 1, SEPTEMBER, completion=1_000_000)
    await set_billing(connection, "ten_a", "postpaid")
    await use(connection, 2, SEPTEMBER, completion=2_000_000)
    await use(connection, 3, OCTOBER, completion=500_000)
    september, october = await close_invoices(connection, "ten_a", OCTOBER)
    assert (september.amount_nano_usd, september.credit_used_nano_usd) == (90_000_000, 30_000_000)
    assert september.due_cents == 6
    assert (september.credit_before_nano_usd, september.credit_added_nano_usd) == (0, 10**9)
    assert (october.credit_before_nano_usd, october.credit_used_nano_usd) == (970_000_000, 0)
    credit = await credit_of(connection, "ten_a")
    assert october.credit_after_nano_usd == credit.balance_nano_usd
    assert september.owed_nano_usd + october.owed_nano_usd == credit.owed_nano_usd


async def test_numbers_have_no_gaps(connection: Any, postgres_url: str) -> None:
    """Tenants closed at once get numbers one after another, and a close that fails takes none."""
    names = [f"ten_{number}" for number in range(6)]
    for name in names:
        await add_tenant(connection, name)
        await record_events(
            connection, [make_event(1, tenant_id=name, occurred_at=at(OCTOBER), completion=5)]
        )
    with pytest.raises(UnknownAccountError):
        await close_invoices(connection, "ten_x", OCTOBER)

    async def close(name: str) -> None:
        async with database(postgres_url) as own:
            await close_invoices(own, name, OCTOBER)

    await asyncio.gather(*(close(name) for name in [*names, *names]))
    found = await list_invoices(connection, None)
    assert [invoice.number for invoice in found] == [6, 5, 4, 3, 2, 1]
    assert sorted(invoice.tenant for invoice in found) == names
    older = await list_invoices(connection, None, before=4, count_max=2)
    assert [invoice.number for invoice in older] == [3, 2]


@pytest.mark.parametrize("text", ["2024-13", "2024-1", "24-01", "2024-01-01", "", "1999-01"])
def test_a_month_is_a_month(text: str) -> None:
    """What is no month is named."""
    with pytest.raises(ClosingError, match=r"^month: .* is no month"):
        parse_month(text)


async def test_only_what_is_over_and_recorded_is_closed(connection: Any) -> None:
    """A month that goes on, that ended just now, or that is not recorded to its end is not closed."""
    await add_tenant(connection)
    today = datetime.now(UTC).date()
    with pytest.raises(ClosingError, match="can be closed from"):
        await close_invoices(connection, "ten_a", today.replace(day=1))
    await connection.execute("update recorder_progress set recorded_until = '2024-11-01'")
    with pytest.raises(ClosingError, match=r"is recorded up to 2024-11-01"):
        await close_invoices(connection, "ten_a", OCTOBER)
    await close_invoices(connection, "ten_a", SEPTEMBER)
    assert limits.INVOICE_GRACE_S > 3600


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("update invoice set due_cents = 0", asyncpg.RestrictViolationError),
        ("delete from invoice_line", asyncpg.RestrictViolationError),
        ("truncate invoice cascade", asyncpg.RestrictViolationError),
        (
            "insert into invoice_line select 1, 9, month, 'm', 'prompt', null, null, null, 1, 1, 0, 0 from invoice",
            asyncpg.RestrictViolationError,
        ),
        (
            "insert into invoice select 3, 'ten_b', 'b', month, now(), null, 0, 0, 0, 0, 0, 0 from invoice",
            asyncpg.CheckViolationError,
        ),
        (
            "insert into invoice select 2, 'ten_b', 'b', month, now(), null, 1, 0, 0, 0, 0, 0 from invoice",
            asyncpg.CheckViolationError,
        ),
        (
            "insert into invoice select 2, 'ten_a', 'a', '2024-09-01', now(), null, 0, 0, 0, 0, 0, 0 from invoice",
            asyncpg.CheckViolationError,
        ),
    ],
)
async def test_invoices_are_final(connection: Any, statement: str, error: type[Exception]) -> None:
    """The database refuses changes, lines added later, gaps, sums that are not the lines', and months out of order."""
    await add_tenant(connection)
    await use(connection, 1, OCTOBER, completion=5)
    (invoice,) = await close_invoices(connection, "ten_a", OCTOBER)
    with pytest.raises(error):
        await connection.execute(statement)
    assert await find_invoice(connection, 1) == invoice
    assert len(await list_invoices(connection, None)) == 1


async def test_less_usage_than_invoiced_is_told(connection: Any) -> None:
    """When usage that is on an invoice has gone, nothing more is closed until somebody has looked."""
    await add_tenant(connection)
    await use(connection, 1, SEPTEMBER, completion=5)
    await close_invoices(connection, "ten_a", SEPTEMBER)
    await connection.execute("set session_replication_role = replica")
    await connection.execute("delete from usage_event")
    await connection.execute("update usage_hour set events = 0, quantity = 0, amount_nano_usd = 0")
    await connection.execute("set session_replication_role = origin")
    with pytest.raises(
        ClosingError, match=r"less completion of river/tiny-moe was used in 2024-09"
    ):
        await close_invoices(connection, "ten_a", OCTOBER)


def test_the_page_escapes_and_needs_nobody() -> None:
    """Whatever tenants and models are called, the page has no element of theirs, and loads nothing."""
    wicked = "<script>alert('&\"')</script>"
    line = InvoiceLine(
        month="2024-10",
        model=wicked,
        kind=wicked,
        quantity=1,
        events=1,
        amount_nano_usd=12,
        price=wicked,
    )
    page = invoice_page(
        Invoice(
            tenant=wicked,
            tenant_name=wicked,
            month=wicked,
            amount_nano_usd=1_234_500_000_012,
            credit_used_nano_usd=0,
            carried_nano_usd=-3,
            due_cents=123_450,
            credit_before_nano_usd=0,
            credit_added_nano_usd=0,
            number=7,
            closed_at=wicked,
            lines=[line, msgspec.structs.replace(line, adjustment=True)],
        )
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&quot;&#x27;)&lt;/script&gt;") >= 8
    assert "1,234.50" in page
    assert "1,234.500000012" in page
    assert "Invoice 000007" in page
    assert "@page" in page
    assert not any(word in page for word in ("http://", "https://", "src=", "href=", "url("))
