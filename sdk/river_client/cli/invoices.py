"""Invoices: what was used in each month, what it cost, and what is owed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from river_client.cli.credit import signed, tenant_option
from river_client.cli.output import json_option, moment, say, show, table
from river_client.client import Client
from river_client.invoice_wire import Invoice

_CENTS_PER_USD = 100


@click.group()
def invoices() -> None:
    """Monthly invoices."""


@invoices.command("list")
@tenant_option
@click.option("--all", "all_tenants", is_flag=True, help="All tenants' (for admins).")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--before", type=int, help="Only those before this number.")
@json_option
def list_invoices(
    tenant: str | None, all_tenants: bool, limit: int, before: int | None, as_json: bool
) -> None:
    """Show closed invoices, newest first."""
    with Client() as client:
        found = client.invoices.list("*" if all_tenants else tenant, before=before, limit=limit)
    _show_list(found, as_json=as_json)


@invoices.command("show")
@click.argument("number", type=int, required=False)
@click.option("--open", "of_open", is_flag=True, help="What is not closed yet, this month too.")
@tenant_option
@click.option(
    "--html",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page to print into this file.",
)
@json_option
def show_invoice(
    number: int | None, of_open: bool, tenant: str | None, path: Path | None, as_json: bool
) -> None:
    """Show the invoice of a NUMBER, or what is open."""
    if (number is None) != of_open:
        raise click.UsageError("give a NUMBER, or --open")
    if number is None:
        if path is not None:
            raise click.UsageError("--html is for closed invoices")
        with Client() as client:
            found = client.invoices.open(tenant)
        text = "\n\n".join(map(_text, found)) if found else "Nothing was used."
        say(found, text, as_json=as_json)
        return
    with Client() as client:
        if path is not None:
            path.write_text(client.invoices.page(number))
            say({"path": str(path)}, f"Invoice {number} is in {path}.", as_json=as_json)
            return
        invoice = client.invoices.get(number)
    say(invoice, _text(invoice), as_json=as_json)


@invoices.command("close")
@click.argument("month")
@click.option("--tenant", help="Only this tenant's, by id or name.")
@json_option
def close_invoices(month: str, tenant: str | None, as_json: bool) -> None:
    """Close all tenants' invoices up to that of a MONTH, such as 2026-10 (for admins). Again is a no-op."""
    closed: list[Invoice] = []
    with Client() as client:
        names = [tenant] if tenant else [one.tenant_id for one in client.admin.tenants()]
        for name in names:
            closed += client.invoices.close(name, month)
    _show_list(closed, as_json=as_json)


def _show_list(found: Sequence[Invoice], *, as_json: bool) -> None:
    show(
        found,
        as_json=as_json,
        columns=("NUMBER", "MONTH", "TENANT", "NAME", "USED", "FROM CREDIT", "DUE", "CLOSED"),
        rows=[
            (
                invoice.number,
                invoice.month,
                invoice.tenant,
                invoice.tenant_name,
                signed(invoice.amount_nano_usd),
                signed(invoice.credit_used_nano_usd),
                _cents(invoice.due_cents),
                moment(invoice.closed_at),
            )
            for invoice in found
        ],
    )


def _text(invoice: Invoice) -> str:
    title = "open" if invoice.number is None else f"invoice {invoice.number}"
    rows = [
        (
            f"{line.month} (late)" if line.adjustment else line.month,
            line.model,
            line.kind,
            "-" if line.tier is None else str(line.tier),
            f"{line.quantity:,}",
            line.price or "-",
            "-" if line.discount_percent is None else f"-{line.discount_percent}%",
            signed(line.amount_nano_usd),
        )
        for line in invoice.lines
    ]
    totals = [
        ("used", signed(invoice.amount_nano_usd)),
        ("paid from credit", signed(invoice.credit_used_nano_usd)),
        ("carried from before", signed(invoice.carried_nano_usd)),
        ("due", _cents(invoice.due_cents)),
        ("credit left", signed(invoice.credit_after_nano_usd)),
    ]
    columns = ("MONTH", "MODEL", "KIND", "TIER", "QUANTITY", "PRICE", "DISCOUNT", "USD")
    return "\n".join(
        [
            f"{title}, {invoice.month}, {invoice.tenant_name} ({invoice.tenant})",
            table(columns, rows),
            *(f"{name.ljust(20)}{value}" for name, value in totals),
        ]
    )


def _cents(amount_cents: int) -> str:
    return f"{amount_cents / _CENTS_PER_USD:.2f}"


COMMANDS = (invoices,)
