"""`river billing`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click
import msgspec

from river_billing.limits import AUDIT_TIMEOUT_S, COUNTS_SETTLE_S
from river_ops.commands.stack import data_dir_option
from river_ops.stack_file import read_stack_file

FOUND_DIFFERENCES = 1
NOT_DONE = 2


@click.group()
def billing() -> None:
    """Usage, prices and the books (for operators)."""


@billing.command()
@click.option(
    "--postgres-url",
    envvar="RIVER_POSTGRES_URL",
    help="The database; that of the stack that runs here if left out.",
)
@data_dir_option
@click.option(
    "--settle",
    "settle_s",
    type=click.FloatRange(min=0),
    default=COUNTS_SETTLE_S,
    show_default=True,
    help="Seconds after which what engines and trainers have produced must be billed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def audit(postgres_url: str | None, data_dir: Path, settle_s: float, as_json: bool) -> None:
    """Recompute amounts, sums, balances and invoices, hold them against the counters, and name every difference.

    Exit status 0: there is none; 1: there are some; 2: the audit could not be made. It changes nothing.
    """
    # Only when asked for: all other commands do without Postgres.
    from river_billing.audit import Audit, find_differences  # noqa: PLC0415
    from river_billing.database import OUTAGES, connected  # noqa: PLC0415

    if postgres_url is None:
        info = read_stack_file(data_dir)
        postgres_url = info.postgres_url if info else ""
    if not postgres_url:
        click.echo("river: give --postgres-url; no stack runs here", err=True)
        sys.exit(NOT_DONE)

    async def run(url: str) -> Audit:
        async with connected(url, statement_timeout_s=AUDIT_TIMEOUT_S) as connection:
            return await find_differences(connection, settle_s=settle_s)

    try:
        found = asyncio.run(run(postgres_url))
    except OUTAGES as error:
        click.echo(f"river: the audit could not be made: {error or type(error).__name__}", err=True)
        sys.exit(NOT_DONE)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        for difference in found.differences:
            click.echo(
                f"{difference.table}: {difference.id}: expected {difference.expected}, "
                f"found {difference.found} ({difference.about})"
            )
        for about in found.cut:
            click.echo(f"there are more: {about}")
        for note in found.notes:
            click.echo(f"note: {note}")
        rows = ", ".join(f"{count:,} of {table}" for table, count in found.examined.items())
        click.echo(f"{len(found.differences)} differences; examined {rows}.")
    sys.exit(FOUND_DIFFERENCES if found.differences else 0)
