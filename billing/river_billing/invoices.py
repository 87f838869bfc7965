"""Invoices: what each tenant used in a month and owes, closed once and never changed.

What an invoice says is a difference: of what was used, less what earlier invoices of the tenant say, month by month
and price by price. So nothing is invoiced twice or forgotten, whenever it was recorded: usage that comes after its
month was closed is a line of the next invoice, an adjustment. Closing sees one moment of the tables and hinders no
recording: what commits a little later is late.

Months are closed in their order, and not before what was used in them can be expected to be recorded.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from msgspec import structs

from river_billing import limits
from river_billing.amounts import divide_half_even
from river_billing.database import Connection
from river_billing.discounts import shown_percent
from river_billing.errors import ClosingError, UnknownAccountError
from river_billing.events import UsageKind
from river_billing.prices import shown_price
from river_client.invoice_wire import NANO_USD_PER_CENT, Invoice, InvoiceLine

_SEE_ONE_MOMENT = "set transaction isolation level repeatable read"
_ONLY_READ = "set transaction read only"
# Before anything is read, so that the invoices closed meanwhile are seen.
_LOCK_NUMBERS = "lock table invoice in share row exclusive mode"
_NEXT_NUMBER = "select coalesce(max(number), 0) + 1 from invoice"
_NAME = "select name from tenant where tenant_id = $1"
_RECORDED_UNTIL = "select recorded_until from recorder_progress"

_COLUMNS = """
number, tenant_id, tenant_name, month, closed_at, amount_nano_usd, credit_used_nano_usd, carried_nano_usd, due_cents,
credit_before_nano_usd, credit_added_nano_usd
"""
_LATEST = f"select {_COLUMNS} from invoice where tenant_id = $1 order by number desc limit 1"  # noqa: S608 - constants
_OF_MONTH = f"select {_COLUMNS} from invoice where tenant_id = $1 and month = $2"  # noqa: S608 - constants
_BY_NUMBER = f"""
select {_COLUMNS} from invoice where number = $1 and ($2::text is null or tenant_id = $2)
"""  # noqa: S608 - constants
_LIST = f"""
select {_COLUMNS} from invoice
where ($1::text is null or tenant_id = $1) and ($2::bigint is null or number < $2)
order by number desc limit $3
"""  # noqa: S608 - constants
_LINES = "select * from invoice_line where number = $1 order by line"

_MONTHS = "select * from months_to_invoice($1) order by month"
_USAGE = """
select u.*, p.context_length, p.nano_usd_per_unit, d.share as discount_share
from usage_to_invoice($1, $2) u left join price p using (price_id) left join discount d using (discount_id)
order by base_model, p.context_length, kind, p.valid_from, d.valid_from nulls first, d.discount_id
"""
_CREDIT_ADDED = """
select coalesce(sum(e.amount_nano_usd), 0)::bigint
from ledger_transaction t join ledger_entry e using (transaction_id)
where t.tenant_id = $1 and t.kind <> 'usage' and e.account = 'credit'
  and ($2::timestamptz is null or t.created_at >= least($2, now())) and t.created_at < least($3, now())
"""

_CLOSE = """
insert into invoice (number, tenant_id, tenant_name, month, closed_by, amount_nano_usd, credit_used_nano_usd,
                     carried_nano_usd, due_cents, credit_before_nano_usd, credit_added_nano_usd)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
"""
_ADD_LINES = """
insert into invoice_line (number, line, month, base_model, kind, price_id, context_length, nano_usd_per_unit,
                          quantity, events, amount_nano_usd, credit_used_nano_usd, tells_discount, discount_id,
                          discount_share)
select $1, l.* from unnest(
  $2::integer[], $3::date[], $4::text[], $5::text[], $6::bigint[], $7::integer[], $8::numeric[], $9::bigint[],
  $10::bigint[], $11::bigint[], $12::bigint[], $13::boolean[], $14::bigint[], $15::numeric[]
) as l
"""

_LINE_COLUMNS = (
    "month",
    "base_model",
    "kind",
    "price_id",
    "context_length",
    "nano_usd_per_unit",
    "quantity",
    "events",
    "amount_nano_usd",
    "credit_used_nano_usd",
    "tells_discount",
    "discount_id",
    "discount_share",
)
"""Those of `_ADD_LINES`, in its order."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """An invoice that is not closed, and its lines as rows of the table."""

    invoice: Invoice
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of a month's lines."""

    events: int = 0
    amount_nano_usd: int = 0


async def close_invoices(
    connection: Connection, tenant_id: str, month: dt.date, *, actor: str | None = None
) -> list[Invoice]:
    """Closes a tenant's months up to `month`, those in which something was used or is to be adjusted; returns them.

    If there is nothing to close, that is the invoice of `month`, if there is one.

    Raises:
        ClosingError: the month is not over, or what was used in it may not be recorded yet, or less was used than has
            been invoiced.
        UnknownAccountError: there is no such tenant.
    """
    async with connection.transaction():
        await connection.execute(_SEE_ONE_MOMENT)
        await connection.execute(_LOCK_NUMBERS)
        await _require_over(connection, month)
        drafts = await _drafts(connection, tenant_id, month)
        if not drafts:
            row = await connection.fetchrow(_OF_MONTH, tenant_id, month)
            return [] if row is None else [await _with_lines(connection, row)]
        numbers = [await _insert(connection, draft, actor) for draft in drafts]
        closed = [await find_invoice(connection, number) for number in numbers]
    return [invoice for invoice in closed if invoice is not None]


async def open_invoices(
    connection: Connection, tenant_id: str, *, until: dt.date | None = None
) -> list[Invoice]:
    """What the months that are not closed come to, in their order, up to `until` (None: this month).

    The connection must be in no transaction: events and hours agree in one moment, not over several.

    Raises:
        ClosingError: less was used than has been invoiced, or a month's events are set aside.
        UnknownAccountError: there is no such tenant.
    """
    until = until or dt.datetime.now(dt.UTC).date().replace(day=1)
    async with connection.transaction():
        await connection.execute(_SEE_ONE_MOMENT)
        await connection.execute(_ONLY_READ)
        drafts = await _drafts(connection, tenant_id, until)
    return [draft.invoice for draft in drafts]


async def find_invoice(
    connection: Connection, number: int, tenant_id: str | None = None
) -> Invoice | None:
    """A closed invoice with its lines; None where there is none, or it is not that tenant's."""
    row = await connection.fetchrow(_BY_NUMBER, number, tenant_id)
    return None if row is None else await _with_lines(connection, row)


async def list_invoices(
    connection: Connection,
    tenant_id: str | None,
    *,
    before: int | None = None,
    count_max: int = limits.INVOICES_MAX,
) -> list[Invoice]:
    """Closed invoices of one tenant or (None) of all, without lines, newest first: those `before` a number."""
    rows = await connection.fetch(_LIST, tenant_id, before, count_max)
    return [_invoice(row) for row in rows]


def parse_month(text: str) -> dt.date:
    """The first day of a month, such as `2026-10`.

    Raises:
        ClosingError: it is none.
    """
    match = re.fullmatch(r"(20[0-9]{2})-(0[1-9]|1[0-2])", text)
    if match is None:
        raise ClosingError(f"month: {text!r} is no month such as 2026-10")
    return dt.date(int(match[1]), int(match[2]), 1)


def month_end(month: dt.date) -> dt.datetime:
    """The moment (UTC) at which a month is over."""
    following = (month + dt.timedelta(days=32)).replace(day=1)
    return dt.datetime.combine(following, dt.time(), dt.UTC)


# ---- Closing ---------------------------------------------------------------------------------------------------------


async def _require_over(connection: Connection, month: dt.date) -> None:
    closable_at = month_end(month) + dt.timedelta(seconds=limits.INVOICE_GRACE_S)
    if dt.datetime.now(dt.UTC) < closable_at:
        raise ClosingError(f"month: {month:%Y-%m} can be closed from {closable_at.isoformat()} on")
    recorded_until: dt.datetime = await connection.fetchval(_RECORDED_UNTIL)
    if recorded_until < closable_at:
        raise ClosingError(
            f"month: {month:%Y-%m} is recorded up to {recorded_until.isoformat()} only; is a recorder running?"
        )


async def _drafts(connection: Connection, tenant_id: str, until: dt.date) -> list[_Draft]:
    name = await connection.fetchval(_NAME, tenant_id)
    if name is None:
        raise UnknownAccountError(f"there is no tenant {tenant_id!r}")
    row = await connection.fetchrow(_LATEST, tenant_id)
    before = None if row is None else _invoice(row)
    rows = await connection.fetch(_MONTHS, tenant_id)
    found = {row["month"]: _Sums(row["events"], row["amount_nano_usd"]) for row in rows}
    closed_until = dt.date.min if before is None else parse_month(before.month)
    late = [month for month in found if month <= closed_until]
    own = [month for month in found if closed_until < month <= until]
    if late and not own and until > closed_until:
        own = [until]
    drafts: list[_Draft] = []
    for month in own:
        # What is late belongs into the first that is still open.
        usage_rows = [
            row
            for of_month in dict.fromkeys((*late, month))
            for row in await _usage(connection, tenant_id, of_month, found.get(of_month, _Sums()))
        ]
        late = []
        draft = await _draft(connection, tenant_id, name, before, month, usage_rows)
        drafts.append(draft)
        before = draft.invoice
    return drafts


async def _usage(
    connection: Connection, tenant_id: str, month: dt.date, expected: _Sums
) -> list[dict[str, Any]]:
    """What was used in a month and is not invoiced, by price; events and hours must agree on it."""
    rows: list[dict[str, Any]] = [
        {**row, "month": month} for row in await connection.fetch(_USAGE, tenant_id, month)
    ]
    for row in rows:
        if min(row["quantity"], row["events"], row["amount_nano_usd"]) < 0:
            raise ClosingError(
                f"month: less {row['kind']} of {row['base_model']} was used in {month:%Y-%m} than is invoiced; "
                "`river billing audit` says more"
            )
    found = _Sums(sum(row["events"] for row in rows), sum(row["amount_nano_usd"] for row in rows))
    if found != expected:
        raise ClosingError(
            f"month: of {month:%Y-%m} there are {found.events} lines to invoice, its hours say {expected.events}; "
            "either its events are set aside, or `river billing audit` says more"
        )
    return rows


async def _draft(
    connection: Connection,
    tenant_id: str,
    name: str,
    before: Invoice | None,
    month: dt.date,
    rows: list[dict[str, Any]],
) -> _Draft:
    """The invoice of `month` as it would be closed now, after that `before`."""
    lines = [_line(row, month) for row in rows]
    amount = sum(line.amount_nano_usd for line in lines)
    credit_used = sum(line.credit_used_nano_usd for line in lines)
    carried = 0 if before is None else before.carried_on_nano_usd
    invoice = Invoice(
        tenant=tenant_id,
        tenant_name=name,
        month=f"{month:%Y-%m}",
        amount_nano_usd=amount,
        credit_used_nano_usd=credit_used,
        carried_nano_usd=carried,
        due_cents=divide_half_even(carried + amount - credit_used, NANO_USD_PER_CENT),
        credit_before_nano_usd=0 if before is None else before.credit_after_nano_usd,
        credit_added_nano_usd=await connection.fetchval(
            _CREDIT_ADDED, tenant_id, _credit_until(before), month_end(month)
        ),
        lines=lines,
    )
    return _Draft(invoice, rows)


def _credit_until(before: Invoice | None) -> dt.datetime | None:
    """Up to when credit is on the invoice before: the end of its month, unless that was closed earlier."""
    if before is None:
        return None
    ended = month_end(parse_month(before.month))
    return (
        ended
        if before.closed_at is None
        else min(ended, dt.datetime.fromisoformat(before.closed_at))
    )


async def _insert(connection: Connection, draft: _Draft, actor: str | None) -> int:
    number: int = await connection.fetchval(_NEXT_NUMBER)
    invoice = draft.invoice
    await connection.execute(
        _CLOSE,
        number,
        invoice.tenant,
        invoice.tenant_name,
        parse_month(invoice.month),
        actor,
        invoice.amount_nano_usd,
        invoice.credit_used_nano_usd,
        invoice.carried_nano_usd,
        invoice.due_cents,
        invoice.credit_before_nano_usd,
        invoice.credit_added_nano_usd,
    )
    columns = ([row[column] for row in draft.rows] for column in _LINE_COLUMNS)
    await connection.execute(_ADD_LINES, number, list(range(1, len(draft.rows) + 1)), *columns)
    return number


# ---- Rows ------------------------------------------------------------------------------------------------------------


async def _with_lines(connection: Connection, row: Mapping[str, Any]) -> Invoice:
    lines = await connection.fetch(_LINES, row["number"])
    return structs.replace(_invoice(row), lines=[_line(line, row["month"]) for line in lines])


def _invoice(row: Mapping[str, Any]) -> Invoice:
    return Invoice(
        number=row["number"],
        tenant=row["tenant_id"],
        tenant_name=row["tenant_name"],
        month=f"{row['month']:%Y-%m}",
        closed_at=row["closed_at"].isoformat(),
        amount_nano_usd=row["amount_nano_usd"],
        credit_used_nano_usd=row["credit_used_nano_usd"],
        carried_nano_usd=row["carried_nano_usd"],
        due_cents=row["due_cents"],
        credit_before_nano_usd=row["credit_before_nano_usd"],
        credit_added_nano_usd=row["credit_added_nano_usd"],
    )


def _line(row: Mapping[str, Any], invoice_month: dt.date) -> InvoiceLine:
    price: Decimal | None = row["nano_usd_per_unit"]
    share: Decimal | None = row["discount_share"]
    return InvoiceLine(
        month=f"{row['month']:%Y-%m}",
        model=row["base_model"],
        kind=row["kind"],
        quantity=row["quantity"],
        events=row["events"],
        amount_nano_usd=row["amount_nano_usd"],
        credit_used_nano_usd=row["credit_used_nano_usd"],
        tier=row["context_length"],
        price=None if price is None else shown_price(UsageKind(row["kind"]), price),
        nano_usd_per_unit=None if price is None else f"{price:f}",
        discount_percent=None if share is None else shown_percent(share),
        adjustment=row["month"] != invoice_month,
    )
