"""What quantities cost, in whole nano-dollars, as Postgres would say it: one half-even rounding per kind."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from river_billing.database import Connection
from river_billing.events import UsageKind

UNITS_PER_NANO_USD = 10**9
"""Prices have nine digits after the point, so that these units are whole."""

UnitPrices = Mapping[UsageKind, int]
"""The price of one token, or kilobyte-hour, of each kind: nano-dollars times `UNITS_PER_NANO_USD`."""

_PRICES = """
select k.kind, p.nano_usd_per_unit
from unnest($3::text[]) as k (kind), price_in_force($1, $2, k.kind, now()) as p
"""

# Rounded up to whole units, so that what is held for a discounted amount always suffices for it.
_DISCOUNTED = """
select t.tenant_id, k.kind, ceil(p.nano_usd_per_unit * (1 - coalesce(d.share, 0)) * $4::bigint) as units
from (
  select distinct tenant_id from discount where valid_from <= now() and (valid_to is null or now() < valid_to)
    and model = any (array[$1, regexp_replace($1, '^.*/', ''), '*'])
) t
cross join unnest($3::text[]) as k (kind)
cross join price_in_force($1, $2, k.kind, now()) as p
left join lateral discount_in_force(t.tenant_id, $1, k.kind, now()) as d on true
"""


async def unit_prices(
    connection: Connection, base_model: str, context_length: int
) -> dict[UsageKind, int]:
    """The prices in force now for a model at a tier; a kind without one is left out."""
    kinds = [kind.value for kind in UsageKind]
    rows = await connection.fetch(_PRICES, base_model, context_length, kinds)
    return {UsageKind(row["kind"]): _units(row["nano_usd_per_unit"]) for row in rows}


async def discounted_unit_prices(
    connection: Connection, base_model: str, context_length: int
) -> dict[str, dict[UsageKind, int]]:
    """The same for each tenant that has a discount on the model now: less it, and a fraction of a unit rounded up."""
    kinds = [kind.value for kind in UsageKind]
    rows = await connection.fetch(
        _DISCOUNTED, base_model, context_length, kinds, UNITS_PER_NANO_USD
    )
    found: dict[str, dict[UsageKind, int]] = {}
    for row in rows:
        found.setdefault(row["tenant_id"], {})[UsageKind(row["kind"])] = int(row["units"])
    return found


def amount_nano_usd(quantities: Mapping[UsageKind, int], prices: UnitPrices) -> int:
    """What `quantities` cost; what has no price costs nothing."""
    total = 0
    for kind, quantity in quantities.items():
        price = prices.get(kind)
        if price and quantity:
            total += divide_half_even(quantity * price, UNITS_PER_NANO_USD)
    return total


def divide_half_even(numerator: int, denominator: int) -> int:
    """The quotient as the nearest whole number, of two equally near the even one."""
    assert denominator > 0
    quotient, rest = divmod(numerator, denominator)
    if 2 * rest > denominator or (2 * rest == denominator and quotient % 2):
        quotient += 1
    return quotient


def _units(nano_usd_per_unit: Decimal) -> int:
    units = nano_usd_per_unit * UNITS_PER_NANO_USD
    assert units == int(units)
    return int(units)
