"""The structs of invoices under `/river/v1/invoices`. Money is nano-dollars (1e-9 USD) but for what is due: cents."""

from __future__ import annotations

from msgspec import field

from river_client.wire import Wire

NANO_USD_PER_CENT = 10**7


class InvoiceLine(Wire, frozen=True):
    """What was used of one thing in a `month` (`2026-10`) at one price and discount.

    The amount is the sum of the requests', each less the discount in force and then rounded to a whole nano-dollar,
    half to even. `price` is the list price in dollars per million tokens, or per GB and month of storage;
    `nano_usd_per_unit` is the same exactly, per token or kilobyte-hour. Both and `tier` are absent where nothing was
    asked. `discount_percent` is what was taken off the list price, absent where that was nothing, and in months whose
    invoices were closed before lines told discounts apart. An `adjustment` was recorded after its month had been
    closed.
    """

    month: str
    model: str
    kind: str
    quantity: int
    events: int
    amount_nano_usd: int
    credit_used_nano_usd: int = 0
    tier: int | None = None
    price: str | None = None
    nano_usd_per_unit: str | None = None
    discount_percent: str | None = None
    adjustment: bool = False


class Invoice(Wire, frozen=True):
    """What a tenant used in a calendar month (UTC), and owes. Without `number` it is open: what it would be now.

    The lines' amount was paid from prepaid credit as far as `credit_used_nano_usd` says, and the rest is owed. Together
    with `carried_nano_usd`, what rounding left of earlier invoices, it is rounded to `due_cents`, half to even; what
    that leaves, less than a cent, is carried to the next. Of the credit, `credit_before_nano_usd` is what the invoice
    before left, `credit_added_nano_usd` what was paid or given until the end of the month.
    """

    tenant: str
    tenant_name: str
    month: str
    amount_nano_usd: int
    credit_used_nano_usd: int
    carried_nano_usd: int
    due_cents: int
    credit_before_nano_usd: int
    credit_added_nano_usd: int
    number: int | None = None
    closed_at: str | None = None
    lines: list[InvoiceLine] = field(default_factory=list[InvoiceLine])

    @property
    def owed_nano_usd(self) -> int:
        """What was used without credit."""
        return self.amount_nano_usd - self.credit_used_nano_usd

    @property
    def carried_on_nano_usd(self) -> int:
        """What rounding leaves to the next invoice."""
        return self.carried_nano_usd + self.owed_nano_usd - self.due_cents * NANO_USD_PER_CENT

    @property
    def credit_after_nano_usd(self) -> int:
        """What is left of the prepaid credit."""
        return self.credit_before_nano_usd + self.credit_added_nano_usd - self.credit_used_nano_usd


class Invoices(Wire, frozen=True):
    """Without their lines where they are a list, newest first; the next page is that `before` the last number."""

    invoices: list[Invoice]


class CloseInvoices(Wire, frozen=True):
    """Closes a tenant's invoices up to that of `month` (`2026-10`)."""

    tenant: str
    month: str
