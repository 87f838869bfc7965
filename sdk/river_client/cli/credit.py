"""What a tenant has and may use: credit, the ledger, monthly budgets."""

from __future__ import annotations

import uuid
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from river_client.cli.output import dollars, json_option, moment, say, show
from river_client.client import Client
from river_client.credit_wire import Budgets
from river_client.wire import NANO_USD_PER_USD


class DollarsType(click.ParamType[int]):
    """Dollars in full, such as 25 or 0.000000001, as nano-dollars."""

    name = "dollars"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """What was typed, exactly."""
        try:
            nano_usd = Decimal(str(value).removeprefix("$")) * NANO_USD_PER_USD
            whole = int(nano_usd)
        except (InvalidOperation, OverflowError, ValueError):
            nano_usd, whole = Decimal(0), -1
        if nano_usd != whole:
            self.fail(f"{value!r} is no amount of dollars with up to nine places", param, ctx)
        return whole


DOLLARS = DollarsType()
tenant_option = click.option("--tenant", help="Another tenant's, by id or name (for admins).")


@click.group()
def credit() -> None:
    """Credit and the transactions behind it."""


@credit.command("show")
@tenant_option
@json_option
def show_credit(tenant: str | None, as_json: bool) -> None:
    """Show credit, what of it is set aside for work in progress, and what is owed."""
    with Client() as client:
        found = client.credit.show(tenant)
    columns = ("TENANT", "BILLING", "CREDIT", "SET ASIDE", "OWED")
    amounts = (found.balance_nano_usd, found.reserved_nano_usd, found.owed_nano_usd)
    show(
        found,
        as_json=as_json,
        columns=columns,
        rows=[(found.tenant, found.billing, *map(signed, amounts))],
    )


@credit.command("add")
@click.argument("tenant")
@click.argument("amount", type=DOLLARS)
@click.option(
    "--reference",
    help="Your own name for it, such as a payment's: the same is booked once. A new one if left out.",
)
@click.option(
    "--kind",
    type=click.Choice(["top_up", "grant", "adjustment"]),
    default="top_up",
    show_default=True,
    help="Paid for, a present, or a correction, which may be negative.",
)
@click.option("--note", help="Why.")
@json_option
def add_credit(
    tenant: str, amount: int, reference: str | None, kind: Any, note: str | None, as_json: bool
) -> None:
    """Give a TENANT an AMOUNT of dollars (for admins)."""
    with Client() as client:
        booked = client.credit.add(
            tenant, amount, reference=reference or uuid.uuid4().hex, kind=kind, note=note
        )
        now = client.credit.show(booked.tenant)
    say(
        booked,
        f"{signed(booked.amount_nano_usd)} booked as {booked.reference}; "
        f"the credit is {signed(now.balance_nano_usd)}.",
        as_json=as_json,
    )


@credit.command("entries")
@tenant_option
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--before", type=int, help="Only those before this number.")
@json_option
def list_entries(tenant: str | None, limit: int, before: int | None, as_json: bool) -> None:
    """Show transactions, newest first: what was paid, given, used."""
    with Client() as client:
        found = client.credit.entries(tenant, before=before, limit=limit)
    show(
        found,
        as_json=as_json,
        columns=("NUMBER", "AT", "KIND", "USD", "REFERENCE", "NOTE"),
        rows=[
            (
                one.transaction_id,
                moment(one.created_at),
                one.kind,
                signed(one.amount_nano_usd),
                one.reference or "-",
                one.note or "-",
            )
            for one in found
        ],
    )


@credit.command("billing")
@click.argument("tenant")
@click.argument("billing", type=click.Choice(["prepaid", "postpaid"]))
@json_option
def set_billing(tenant: str, billing: Any, as_json: bool) -> None:
    """Say whether credit bounds what a TENANT may use, prepaid, or not (for admins)."""
    with Client() as client:
        found = client.credit.set_billing(tenant, billing)
    say(found, f"{found.tenant} is {found.billing}.", as_json=as_json)


@click.group()
def budgets() -> None:
    """Monthly budgets of tenants and keys."""


@budgets.command("list")
@tenant_option
@click.option("--all", "all_tenants", is_flag=True, help="All tenants (for admins).")
@json_option
def list_budgets(tenant: str | None, all_tenants: bool, as_json: bool) -> None:
    """Show budgets and what this month has cost."""
    with Client() as client:
        found = client.budgets.show("*" if all_tenants else tenant)
    _show_budgets(found, as_json=as_json)


@budgets.command("warnings")
@tenant_option
@click.option("--all", "all_tenants", is_flag=True, help="All tenants (for admins).")
@json_option
def list_warnings(tenant: str | None, all_tenants: bool, as_json: bool) -> None:
    """Show which budgets were used to 80 or 100 %, newest first."""
    with Client() as client:
        found = client.budgets.show("*" if all_tenants else tenant).warnings
    show(
        found,
        as_json=as_json,
        columns=("AT", "MONTH", "TENANT", "KEY", "PERCENT", "BUDGET", "SPENT"),
        rows=[
            (
                moment(one.warned_at),
                one.month,
                one.tenant,
                one.key_id or "-",
                one.percent,
                signed(one.budget_nano_usd),
                signed(one.spent_nano_usd),
            )
            for one in found
        ],
    )


@budgets.command("set")
@click.argument("amount", type=DOLLARS, required=False)
@click.option("--tenant", help="Of a tenant, over all its keys.")
@click.option("--key", "key_id", help="Of one key.")
@click.option("--none", "no_budget", is_flag=True, help="Take the budget away.")
@json_option
def set_budget(
    amount: int | None, tenant: str | None, key_id: str | None, no_budget: bool, as_json: bool
) -> None:
    """Set a budget of AMOUNT dollars for each calendar month, UTC (for admins)."""
    if (amount is None) != no_budget:
        raise click.UsageError("give an AMOUNT, or --none")
    if (tenant is None) == (key_id is None):
        raise click.UsageError("give either --tenant or --key")
    with Client() as client:
        found = client.budgets.set(amount, tenant=tenant, key_id=key_id)
    _show_budgets(found, as_json=as_json)


def signed(amount_nano_usd: int) -> str:
    """Dollars in full, below zero too."""
    return f"-{dollars(-amount_nano_usd)}" if amount_nano_usd < 0 else dollars(amount_nano_usd)


def _show_budgets(found: Budgets, *, as_json: bool) -> None:
    show(
        found.budgets,
        as_json=as_json,
        columns=("TENANT", "KEY", "BUDGET", "SPENT", "RESETS"),
        rows=[
            (
                one.tenant,
                one.key_id or "-",
                signed(one.budget_nano_usd),
                signed(one.spent_nano_usd),
                moment(one.resets_at),
            )
            for one in found.budgets
        ],
    )


COMMANDS = (credit, budgets)
