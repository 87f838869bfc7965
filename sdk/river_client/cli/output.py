"""How answers are printed: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import click
import msgspec

from river_client.wire import NANO_USD_PER_USD

GIGABYTE = 10**9
MEGABYTE = 10**6

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """`--json`, on every command that prints something."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def show(
    value: Any,
    *,
    as_json: bool,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    empty: str = "There are none.",
) -> None:
    """`value` as JSON, or `rows` as a table."""
    if as_json:
        click.echo(msgspec.json.encode(value).decode())
        return
    lines = [[str(cell) for cell in row] for row in rows]
    click.echo(table(columns, lines) if lines else empty)


def say(value: Any, text: str, *, as_json: bool) -> None:
    """`value` as JSON, or a sentence."""
    click.echo(msgspec.json.encode(value).decode() if as_json else text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, a line per row; columns of numbers are set to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    right = [all(_is_number(row[column]) for row in rows) for column in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        ).rstrip()
        for cells in (columns, *rows)
    ]
    return "\n".join(lines)


def dollars(amount_nano_usd: int) -> str:
    """An amount in full: nano-dollars have nine places, and at least cents are shown."""
    text = f"{Decimal(amount_nano_usd) / NANO_USD_PER_USD:.9f}".rstrip("0")
    whole, _, places = text.partition(".")
    return f"{whole}.{places.ljust(2, '0')}"


def bytes_text(size_bytes: int) -> str:
    """A size for people."""
    if size_bytes >= GIGABYTE:
        return f"{size_bytes / GIGABYTE:.1f} GB"
    return f"{size_bytes / MEGABYTE:.1f} MB"


def moment(text: str | None) -> str:
    """A time of the wire, to the second."""
    return text[:19].replace("T", " ") if text else "-"


def _is_number(text: str) -> bool:
    return text == "" or text.replace(",", "").replace(".", "").isdigit()
