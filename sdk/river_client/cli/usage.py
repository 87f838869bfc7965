"""What was used and what it cost: in sum, or by hour or day."""

from __future__ import annotations

from datetime import datetime
from typing import Any, cast, get_args

import click
import msgspec

from river_client.cli.output import dollars, json_option, moment, show, table
from river_client.client import Client
from river_client.usage_wire import DEFAULT_GROUP, DIMENSIONS, Dimension, Every, UsageRow

TIME = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M%z"])


class GroupType(click.ParamType["tuple[Dimension, ...]"]):
    """Names with commas between them."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Dimension, ...]:
        """What was typed, as the names it means."""
        names = tuple(name.strip() for name in str(value).split(",") if name.strip())
        for name in names:
            if name not in DIMENSIONS:
                self.fail(f"{name!r} is none of {', '.join(DIMENSIONS)}", param, ctx)
        return cast("tuple[Dimension, ...]", names)


@click.command()
@click.option("--since", type=TIME, help="From this hour on (local time unless it says otherwise).")
@click.option("--until", type=TIME, help="Up to this hour.")
@click.option("--tenant", help="Another tenant's, by id or name (for admins).")
@click.option("--all", "all_tenants", is_flag=True, help="All tenants (for admins).")
@click.option("--by", type=click.Choice(get_args(Every)), help="A row for each hour or day (UTC).")
@click.option(
    "--group",
    type=GroupType(),
    default=",".join(DEFAULT_GROUP),
    show_default=True,
    help=f"What rows are told apart by, besides the kind: {', '.join(DIMENSIONS)}.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, by day unless `--by` says hour.")
@json_option
def usage(
    since: datetime | None,
    until: datetime | None,
    tenant: str | None,
    all_tenants: bool,
    by: Every | None,
    group: tuple[Dimension, ...],
    as_csv: bool,
    as_json: bool,
) -> None:
    """Show tokens and dollars per tenant, model and kind: in sum, or by hour or day."""
    if as_csv and as_json:
        raise click.UsageError("give --csv or --json, not both")
    whose = "*" if all_tenants else tenant
    if as_csv or by is not None:
        with Client() as client:
            _print_series(client, by or "day", group, since, until, whose, as_csv, as_json)
    else:
        _print_sums(since, until, whose, as_json=as_json)


def _print_sums(
    since: datetime | None, until: datetime | None, tenant: str | None, *, as_json: bool
) -> None:
    with Client() as client:
        lines = client.usage(since, until, tenant=tenant)
    total = dollars(sum(line.amount_nano_usd for line in lines))
    show(
        lines,
        as_json=as_json,
        columns=("TENANT", "MODEL", "KIND", "QUANTITY", "USD"),
        rows=[
            *(
                (
                    line.tenant,
                    line.model,
                    line.kind,
                    f"{line.quantity:,}",
                    dollars(line.amount_nano_usd),
                )
                for line in lines
            ),
            *([("total", "", "", "", total)] if lines else []),
        ],
        empty="Nothing was used.",
    )


def _print_series(
    client: Client,
    every: Every,
    group: tuple[Dimension, ...],
    since: datetime | None,
    until: datetime | None,
    tenant: str | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    asked: dict[str, Any] = {
        "every": every,
        "group": group,
        "since": since,
        "until": until,
        "tenant": tenant,
    }
    if as_csv:
        for text in client.usage_csv(**asked):
            click.echo(text, nl=False)
    elif as_json:
        # A row at a time: a year of hours need not be in memory.
        separator = "["
        for row in client.usage_rows(**asked):
            click.echo(f"{separator}{msgspec.json.encode(row).decode()}", nl=False)
            separator = ","
        click.echo("]" if separator == "," else "[]")
    else:
        columns = ("PERIOD", "TENANT", "KIND", *(name.upper() for name in group), "QUANTITY", "USD")
        rows = [_cells(row, group) for row in client.usage_rows(**asked)]
        click.echo(table(columns, rows) if rows else "Nothing was used.")


def _cells(row: UsageRow, group: tuple[Dimension, ...]) -> list[str]:
    told_apart = [getattr(row, dimension) for dimension in group]
    return [
        moment(row.period),
        row.tenant,
        row.kind,
        *("-" if value is None else str(value) for value in told_apart),
        f"{row.quantity:,}",
        dollars(row.amount_nano_usd),
    ]


COMMANDS = (usage,)
