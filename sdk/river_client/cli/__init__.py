"""The `river` command: the verbs of a user, and those that other packages add.

Further commands come from the entry-point group `river.commands`: each names a callable `register(group)`.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import click

from river_client.cli import (
    accounts,
    aliases,
    audit,
    credit,
    invoices,
    learning,
    machines,
    prices,
    usage,
    work,
)
from river_client.exceptions import RiverError

ENTRY_POINT_GROUP = "river.commands"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="river-platform-client", prog_name="river")
def river() -> None:
    """Train open models into your own, serve them, and look after both."""


for module in (work, aliases, learning, accounts, usage, credit, invoices, prices, audit, machines):
    for command in module.COMMANDS:
        river.add_command(command)


def main() -> None:
    """The console script: one line for what went wrong, and exit code 1."""
    add_further_commands(river)
    try:
        river()
    except RiverError as error:
        reference = f" (request {error.request_id})" if error.request_id else ""
        click.echo(f"river: {error or type(error).__name__}{reference}", err=True)
        sys.exit(1)


def add_further_commands(group: click.Group) -> None:
    """Adds what installed packages bring. One that lacks its own dependencies is left out, and says so."""
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            register = entry_point.load()
            register(group)
        except ImportError as error:
            click.echo(f"river: commands of {entry_point.name!r} left out: {error}", err=True)
