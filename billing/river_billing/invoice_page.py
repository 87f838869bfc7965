"""An invoice as a page to print: one file of HTML that needs nothing else, and says nothing but what it is given."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from html import escape

from river_client.invoice_wire import Invoice, InvoiceLine
from river_client.wire import NANO_USD_PER_USD

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_CENTS_PER_USD = 100

_STYLE = """
:root { color-scheme: light; font: 10.5pt/1.45 system-ui, sans-serif; color: #1b1f24; }
body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1.5rem; }
header { display: flex; justify-content: space-between; gap: 2rem; border-bottom: 2px solid; padding-bottom: 1rem; }
h1 { font-size: 1.6rem; margin: 0; }
dl { display: grid; grid-template-columns: auto auto; gap: .1rem 1rem; margin: 0; }
dt { color: #57606a; } dd { margin: 0; text-align: right; }
table { width: 100%; border-collapse: collapse; margin: 1.5rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #d0d7de; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #57606a; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tfoot td, tfoot th { border-bottom: 0; } .due { font-size: 1.25rem; font-weight: 700; }
.draft { color: #9a3b00; font-weight: 700; } footer { color: #57606a; font-size: .85em; }
@page { size: A4; margin: 18mm; }
@media print { body { margin: 0; padding: 0; max-width: none; } tr { break-inside: avoid; }
  thead { display: table-header-group; } }
"""


def invoice_page(invoice: Invoice) -> str:
    """The whole document; every text in it is escaped."""
    name = invoice_name(invoice)
    state = (
        '<p class="draft">Not closed: this is what it would be now.</p>'
        if invoice.number is None
        else ""
    )
    own = [line for line in invoice.lines if not line.adjustment]
    late = [line for line in invoice.lines if line.adjustment]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(CONTENT_SECURITY_POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<div><h1>{escape(name)}</h1>{state}<p>{escape(invoice.tenant_name)}<br>{escape(invoice.tenant)}</p></div>
{_facts(invoice)}
</header>
{_table(f"Usage in {invoice.month}", own)}
{_table("Adjustments: usage recorded after its month was closed", late) if late else ""}
{_totals(invoice)}
<footer>
<p>Months are calendar months in UTC. Prices are list prices; an amount is the sum over all requests and
operations, each less the discount in force and then rounded to a billionth of a dollar, half to even. What is due is
rounded to cents once, half to even; the rest, less than a cent, is
carried to the next invoice. Storage is counted in kilobyte-hours; a month of it has 720 hours.</p>
</footer>
</body>
</html>
"""


def invoice_name(invoice: Invoice) -> str:
    """What people call it."""
    return (
        f"Open invoice {invoice.month}"
        if invoice.number is None
        else f"Invoice {invoice.number:06d}"
    )


def usd(amount_nano_usd: int) -> str:
    """Dollars in full, with a comma between thousands."""
    return f"{Decimal(amount_nano_usd) / NANO_USD_PER_USD:,.9f}"


def cents(amount_cents: int) -> str:
    """Dollars and cents."""
    return f"{Decimal(amount_cents) / _CENTS_PER_USD:,.2f}"


def _facts(invoice: Invoice) -> str:
    facts = [("Month", invoice.month), ("Due", f"USD {cents(invoice.due_cents)}")]
    if invoice.closed_at is not None:
        facts.insert(1, ("Closed", invoice.closed_at[:10]))
    return f"<dl>{''.join(f'<dt>{escape(key)}</dt><dd>{escape(value)}</dd>' for key, value in facts)}</dl>"


def _table(caption: str, lines: Iterable[InvoiceLine]) -> str:
    rows = "".join(map(_row, lines)) or '<tr><td colspan="8">Nothing.</td></tr>'
    return f"""<table>
<caption>{escape(caption)}</caption>
<thead><tr><th scope="col">Month</th><th scope="col">Model</th><th scope="col">Kind</th>
<th scope="col" class="number">Context</th><th scope="col" class="number">Quantity</th>
<th scope="col" class="number">Price, USD</th><th scope="col" class="number">Discount</th>
<th scope="col" class="number">Amount, USD</th></tr></thead>
<tbody>{rows}</tbody>
</table>"""


def _row(line: InvoiceLine) -> str:
    is_storage = line.kind == "storage"
    unit = "kB·h" if is_storage else "tokens"
    per = "GB and month" if is_storage else "million"
    tier = "" if line.tier is None or is_storage else f"up to {line.tier:,}"
    price = "no price" if line.price is None else f"{line.price} per {per}"
    texts = "".join(
        f"<td>{escape(text)}</td>" for text in (line.month, line.model, line.kind.replace("_", " "))
    )
    discount = "" if line.discount_percent is None else f"-{line.discount_percent} %"
    numbers = (tier, f"{line.quantity:,} {unit}", price, discount, usd(line.amount_nano_usd))
    cells = "".join(f'<td class="number">{escape(number)}</td>' for number in numbers)
    return f"<tr>{texts}{cells}</tr>\n"


def _totals(invoice: Invoice) -> str:
    rows = [
        ("Used in all", usd(invoice.amount_nano_usd)),
        ("Paid from credit", usd(-invoice.credit_used_nano_usd)),
        ("Carried from the invoice before", usd(invoice.carried_nano_usd)),
        ("Carried to the next", usd(-invoice.carried_on_nano_usd)),
    ]
    credit = [
        ("Credit before", usd(invoice.credit_before_nano_usd)),
        ("Added", usd(invoice.credit_added_nano_usd)),
        ("Used by this invoice", usd(-invoice.credit_used_nano_usd)),
        ("Credit left", usd(invoice.credit_after_nano_usd)),
    ]
    return f"""<table>
<caption>Total</caption>
<tbody>{_pairs(rows)}</tbody>
<tfoot><tr class="due"><th scope="row">Due, USD</th><td class="number">{cents(invoice.due_cents)}</td></tr></tfoot>
</table>
<table>
<caption>Prepaid credit</caption>
<tbody>{_pairs(credit)}</tbody>
</table>"""


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{escape(value)}</td></tr>'
        for name, value in rows
    )
