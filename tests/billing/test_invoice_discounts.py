"""Invoices name the discount on each line, and months closed before they did are still settled to the nano-dollar."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

from support.billing import TINY, add_tenant, make_event

from river_billing.invoice_page import invoice_page
from river_billing.invoices import close_invoices, find_invoice, open_invoices
from river_billing.recorder import record_events

OCTOBER, NOVEMBER = date(2024, 10, 1), date(2024, 11, 1)
_GRANT = """
insert into discount (tenant_id, model, kind, share, valid_from, valid_to) values ('ten_a', $1, '*', $2, $3, $4)
"""
# What a release did that told no discounts apart: one line for each price.
_FORGET = """
update invoice_line set tells_discount = false, discount_id = null, discount_share = null
"""


async def _use(connection: Any, number: int, day: int, **quantities: Any) -> None:
    """One event in October 2024, recorded now."""
    occurred_at = datetime(2024, 10, day, 12, tzinfo=UTC).timestamp()
    await record_events(connection, [make_event(number, occurred_at=occurred_at, **quantities)])


async def _grant(connection: Any, percent: int, begin: int, end: int, model: str = "*") -> None:
    """A discount from one day of October 2024 to another."""
    days = (datetime(2024, 10, day, tzinfo=UTC) for day in (begin, end))
    await connection.execute(_GRANT, model, percent / 100, *days)


async def test_lines_name_their_discount(connection: Any) -> None:
    """What was used with a discount, with another and with none are lines of their own, which sum to what was used."""
    await add_tenant(connection, "ten_a")
    await _grant(connection, 10, 5, 10)
    await _grant(connection, 25, 10, 20, TINY)
    for number, (day, prompt) in enumerate(((2, 1000), (6, 2000), (12, 4000), (13, 8000)), start=1):
        await _use(connection, number, day, prompt=prompt)
    (draft,) = [one for one in await open_invoices(connection, "ten_a") if one.month == "2024-10"]
    (invoice,) = await close_invoices(connection, "ten_a", OCTOBER)
    assert invoice.lines == draft.lines
    named = [(line.discount_percent, line.quantity) for line in invoice.lines]
    assert named == [(None, 1000), ("10", 2000), ("25", 12_000)]
    for line in invoice.lines:
        full = line.quantity * float(line.nano_usd_per_unit or 0)
        assert line.amount_nano_usd == full * (100 - int(line.discount_percent or 0)) / 100
    used = await connection.fetchval("select sum(amount_nano_usd)::bigint from usage_event")
    assert sum(line.amount_nano_usd for line in invoice.lines) == invoice.amount_nano_usd == used
    page = invoice_page(invoice)
    assert "-10 %" in page
    assert "-25 %" in page
    assert await close_invoices(connection, "ten_a", OCTOBER) == [invoice]


async def test_a_month_closed_without_naming_them_stays_whole(connection: Any) -> None:
    """What comes late to a month whose lines tell no discounts apart is an adjustment of what is late, and no more."""
    await add_tenant(connection, "ten_a")
    await _grant(connection, 10, 5, 20)
    await _use(connection, 1, 6, prompt=1000)
    (first,) = await close_invoices(connection, "ten_a", OCTOBER)
    await connection.execute("set session_replication_role = replica")
    await connection.execute(_FORGET)
    await connection.execute("set session_replication_role = origin")
    assert await close_invoices(connection, "ten_a", OCTOBER) != []
    await _use(connection, 2, 7, prompt=3000)
    await _use(connection, 3, 25, prompt=5000)
    (late,) = await close_invoices(connection, "ten_a", NOVEMBER)
    lines = [(line.quantity, line.adjustment, line.discount_percent) for line in late.lines]
    assert lines == [(8000, True, None)]
    used = await connection.fetchval("select sum(amount_nano_usd)::bigint from usage_event")
    assert first.amount_nano_usd + late.amount_nano_usd == used
    assert late.number is not None
    assert await find_invoice(connection, late.number) == late
