"""How numbers, times and names are written on the dashboard: with their unit, short, and exact in the tooltip."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
from markupsafe import Markup

NANO_USD_PER_USD = 10**9
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((2**40, "TB"), (2**30, "GB"), (2**20, "MB"), (2**10, "kB"))
_SPANS_S = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
_SMALL = 0.001
_LARGE = 10_000.0
_LONG_S = 100.0
_LITTLE_PERCENT = 0.01
_LARGE_PERCENT = 10.0


def count(value: float) -> Markup:
    """A number of things: `1.2M`, with all its digits in the tooltip."""
    for scale, letter in _SCALES:
        if abs(value) >= scale:
            short = f"{value / scale:.3g}{letter}"
            return Markup('<span title="{}">{}</span>').format(f"{value:,.0f}", short)
    return Markup.escape(f"{value:,.0f}")


def usd(nano_usd: int) -> Markup:
    """An amount of money: dollars, to the cent or as small as it is; the exact amount in the tooltip."""
    dollars = nano_usd / NANO_USD_PER_USD
    small = dollars != 0 and abs(dollars) < 1
    # Four digits that count, never as a power of ten.
    short = f"${Decimal(f'{dollars:.4g}'):f}" if small else f"${dollars:,.2f}"
    exact = f"${nano_usd // NANO_USD_PER_USD}.{nano_usd % NANO_USD_PER_USD:09d}"
    return Markup('<span title="{}">{}</span>').format(
        exact if nano_usd >= 0 else f"{nano_usd:,} nano-dollars", short
    )


def size(size_bytes: int) -> str:
    """A size in bytes: `12.3 MB`."""
    for scale, unit in _BYTES:
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes} B"


def span(seconds: float) -> str:
    """A length of time in its largest unit: `3 min`."""
    for scale, unit in _SPANS_S:
        if seconds >= scale:
            return f"{int(seconds // scale)} {unit}"
    return "0 s"


def ago(moment: datetime, now: datetime | None = None) -> Markup:
    """How long ago something was, with the moment in the tooltip."""
    passed = (now or datetime.now(UTC)) - moment
    return _time(moment, f"{span(max(0.0, passed.total_seconds()))} ago")


def ahead(moment: datetime, now: datetime | None = None) -> Markup:
    """How far ahead something is, with the moment in the tooltip."""
    left = moment - (now or datetime.now(UTC))
    return _time(moment, f"in {span(max(0.0, left.total_seconds()))}")


def is_over(moment: datetime) -> bool:
    """Whether a moment has passed."""
    return moment <= datetime.now(UTC)


def dollars(amount_nano_usd: int) -> str:
    """An amount as it is typed: all its places and no unit."""
    return f"{Decimal(amount_nano_usd).scaleb(-9).normalize():f}"


def price(usd: str) -> str:
    """A price as it is stored, in dollars, with cents at least: `$0.10`."""
    whole, _, places = usd.partition(".")
    return f"${whole}.{places.ljust(2, '0')}"


def stamp(moment: datetime) -> Markup:
    """A moment in UTC to the minute, and to the second in the tooltip."""
    return _time(moment, f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}")


def _time(moment: datetime, words: str) -> Markup:
    exact = moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        moment.isoformat(), exact, words
    )


def number(value: float) -> str:
    """A measured value: four digits that count."""
    if value != 0 and not _SMALL <= abs(value) < _LARGE:
        return f"{value:.3e}"
    return f"{value:.4g}"


def seconds(value: float) -> str:
    """A time that was measured: `85 ms`, `1.2 s`."""
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.3g} s" if value < _LONG_S else span(value)


def percent(share: float) -> str:
    """A share: `12 %`, and how little it is where it is little."""
    value = 100 * share
    if 0 < value < _LITTLE_PERCENT:
        return f"< {_LITTLE_PERCENT} %"
    return (
        f"{value:.0f} %" if value == round(value) or value >= _LARGE_PERCENT else f"{value:.2g} %"
    )


def spark(values: list[float]) -> list[tuple[float, float]]:
    """The points of a sparkline in a box of 100 by 24, zero at its bottom."""
    top = max(values, default=0.0)
    width = 100 / max(1, len(values) - 1)
    return [
        (round(index * width, 2), round(23 - 22 * (value / top if top > 0 else 0.0), 2))
        for index, value in enumerate(values)
    ]


def plain(value: object) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


FILTERS: dict[str, Any] = {
    "count": count,
    "usd": usd,
    "size": size,
    "span": span,
    "ago": ago,
    "ahead": ahead,
    "price": price,
    "stamp": stamp,
    "is_over": is_over,
    "dollars": dollars,
    "moment": datetime.fromisoformat,
    "number": number,
    "plain": plain,
    "seconds": seconds,
    "percent": percent,
    "spark": spark,
}
