"""`river aliases`: model names of one's own."""

from __future__ import annotations

import click

from river_client.cli.output import json_option, moment, say, show
from river_client.client import Client
from river_client.wire import Alias


@click.group()
def aliases() -> None:
    """Model names of your own: what they point at, and the way back."""


@aliases.command("list")
@json_option
def list_aliases(as_json: bool) -> None:
    """Show your aliases."""
    with Client() as client:
        found = client.aliases.list()
    _show(found, as_json=as_json)


@aliases.command()
@click.argument("name")
@json_option
def history(name: str, as_json: bool) -> None:
    """Show what a NAME has pointed at, newest first."""
    with Client() as client:
        found = client.aliases.history(name)
    _show(found, as_json=as_json)


@aliases.command("set")
@click.argument("name")
@click.argument("target")
@json_option
def set_alias(name: str, target: str, as_json: bool) -> None:
    """Point a NAME at a base model, a checkpoint, or river://RUN to follow a run's live version."""
    with Client() as client:
        alias = client.aliases.set(name, target)
    _say(alias, as_json=as_json)


@aliases.command()
@click.argument("name")
@click.argument("shares", nargs=-1, required=True, metavar="TARGET=WEIGHT…")
@json_option
def split(name: str, shares: tuple[str, ...], as_json: bool) -> None:
    """Share the requests of a NAME among targets by weight."""
    weights: dict[str, int] = {}
    for share in shares:
        target, separator, weight = share.rpartition("=")
        if not separator or not target or not weight.isdecimal():
            raise click.BadParameter(f"{share!r} is no TARGET=WEIGHT", param_hint="shares")
        weights[target] = int(weight)
    with Client() as client:
        alias = client.aliases.split(name, weights)
    _say(alias, as_json=as_json)


@aliases.command()
@click.argument("name")
@json_option
def rollback(name: str, as_json: bool) -> None:
    """Point a NAME at what it pointed at before."""
    with Client() as client:
        alias = client.aliases.rollback(name)
    _say(alias, as_json=as_json)


@aliases.command()
@click.argument("name")
@json_option
def delete(name: str, as_json: bool) -> None:
    """Remove a NAME; what it pointed at stays."""
    with Client() as client:
        client.aliases.delete(name)
    say({"deleted": name}, f"{name} is deleted.", as_json=as_json)


def _show(found: list[Alias], *, as_json: bool) -> None:
    show(
        found,
        as_json=as_json,
        columns=("ALIAS", "VERSION", "TARGETS", "SINCE"),
        rows=[
            (alias.name, alias.version, _targets(alias), moment(alias.updated_at))
            for alias in found
        ],
    )


def _say(alias: Alias, *, as_json: bool) -> None:
    say(alias, f"{alias.name} is now {_targets(alias)}.", as_json=as_json)


def _targets(alias: Alias) -> str:
    """The target, or the targets with their weights."""
    if len(alias.targets) <= 1:
        return alias.target
    return ", ".join(f"{entry.target}={entry.weight}" for entry in alias.targets)


COMMANDS = (aliases,)
