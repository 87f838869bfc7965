"""What things cost: prices, and the discounts of tenants."""

from __future__ import annotations

from datetime import datetime
from typing import Any, get_args

import click

from river_client.cli.accounts import TIME
from river_client.cli.output import json_option, moment, show
from river_client.client import Client
from river_client.price_wire import Discount, PricedKind
from river_client.wire import Price

KIND = click.Choice(get_args(PricedKind))
from_option = click.option(
    "--from", "valid_from", type=TIME, help="When it begins, in local time; now if left out."
)


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def prices(context: click.Context, as_json: bool) -> None:
    """Show prices: dollars per million tokens, storage per GB and month. Or set one."""
    if context.invoked_subcommand is None:
        with Client() as client:
            _show_prices(client.prices(), as_json=as_json)


@prices.command("list")
@json_option
def list_prices(as_json: bool) -> None:
    """Show every price that is or was in force."""
    with Client() as client:
        _show_prices(client.prices(), as_json=as_json)


@prices.command("set")
@click.argument("model")
@click.argument("kind", type=KIND)
@click.argument("usd")
@click.option(
    "--context",
    "context_length",
    type=click.IntRange(1),
    required=True,
    help="The tier: for contexts of up to so many tokens.",
)
@from_option
@json_option
def set_price(
    model: str,
    kind: Any,
    usd: str,
    context_length: int,
    valid_from: datetime | None,
    as_json: bool,
) -> None:
    """Put a price of USD per million tokens of a MODEL (or `*`) in force; storage is per GB and month (for admins)."""
    with Client() as client:
        found = client.set_price(
            model, context_length, kind, usd, valid_from=_with_offset(valid_from)
        )
    _show_prices(found, as_json=as_json)


@click.group()
def discounts() -> None:
    """What tenants pay less than the price."""


@discounts.command("list")
@click.option("--tenant", help="Another tenant's, by id or name, or `*` (for admins).")
@json_option
def list_discounts(tenant: str | None, as_json: bool) -> None:
    """Show every discount there is or was."""
    with Client() as client:
        _show_discounts(client.discounts(tenant), as_json=as_json)


@discounts.command("set")
@click.argument("tenant")
@click.argument("percent")
@click.option("--model", default="*", show_default=True, help="Of this model, or all.")
@click.option(
    "--kind",
    type=click.Choice(["*", *get_args(PricedKind)]),
    default="*",
    show_default=True,
    help="Of this kind, or all.",
)
@from_option
@json_option
def set_discount(
    tenant: str,
    percent: str,
    model: str,
    kind: Any,
    valid_from: datetime | None,
    as_json: bool,
) -> None:
    """Take PERCENT off the price for a TENANT; 0 ends what there was (for admins)."""
    with Client() as client:
        found = client.set_discount(
            tenant, percent, model=model, kind=kind, valid_from=_with_offset(valid_from)
        )
    _show_discounts(found, as_json=as_json)


def _show_prices(found: list[Price], *, as_json: bool) -> None:
    show(
        found,
        as_json=as_json,
        columns=("MODEL", "CONTEXT", "KIND", "USD", "FROM", "TO"),
        rows=[
            (
                price.model,
                price.context_length,
                price.kind,
                price.usd_per_million,
                moment(price.valid_from),
                moment(price.valid_to),
            )
            for price in found
        ],
    )


def _show_discounts(found: list[Discount], *, as_json: bool) -> None:
    show(
        found,
        as_json=as_json,
        columns=("TENANT", "MODEL", "KIND", "PERCENT", "FROM", "TO"),
        rows=[
            (
                one.tenant,
                one.model,
                one.kind,
                one.percent,
                moment(one.valid_from),
                moment(one.valid_to),
            )
            for one in found
        ],
    )


def _with_offset(at: datetime | None) -> str | None:
    """What was typed is local time."""
    return None if at is None else at.astimezone().isoformat()


COMMANDS = (prices, discounts)
