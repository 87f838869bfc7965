"""What tenants pay less than the price: versioned as prices are, and kept by every event that had it.

A discount is a share of the price. It holds for a tenant, a model or all (`*`), a kind or all, during
[valid_from, valid_to). One at most applies: that of the model before that of all, and of these that of the kind before
that of all kinds. An amount is `quantity * price * (1 - share)`, rounded once, half to even.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from river_billing.database import REFUSALS, Connection
from river_billing.errors import PriceError
from river_billing.events import UsageKind
from river_billing.prices import check_not_past
from river_client.price_wire import Discount

ANY_KIND = "*"
SHARE_DIGITS = 8

_CLOSE = """
update discount set valid_to = coalesce($4, now())
where tenant_id = $1 and model = $2 and kind = $3 and valid_to is null
"""
_OPEN = """
insert into discount (tenant_id, model, kind, share, valid_from) values ($1, $2, $3, $4, coalesce($5, now()))
"""
_LIST = """
select * from discount where $1::text is null or tenant_id = $1 order by tenant_id, model, kind, valid_from
"""


async def set_discount(
    connection: Connection,
    *,
    tenant_id: str,
    model: str,
    kind: UsageKind | None,
    share: Decimal,
    valid_from: datetime | None = None,
) -> None:
    """Puts a discount in force from `valid_from` (None: now) and ends the one before it; a share of 0 ends it only.

    Raises:
        PriceError: it is out of range, or `valid_from` lies before now or a planned change.
    """
    if not 0 <= share <= 1 or share != round(share, SHARE_DIGITS):
        raise PriceError(f"share: {share}, must be 0 to 1 with up to {SHARE_DIGITS} places")
    check_not_past(valid_from)
    bounds = (tenant_id, model, ANY_KIND if kind is None else kind.value)
    try:
        async with connection.transaction():
            await connection.execute(_CLOSE, *bounds, valid_from)
            if share:
                await connection.execute(_OPEN, *bounds, share, valid_from)
    except REFUSALS as error:
        raise PriceError(f"valid_from: {error}") from error


async def list_discounts(connection: Connection, tenant_id: str | None) -> list[Discount]:
    """Every discount that one tenant, or (None) anybody, has or had."""
    return [
        Discount(
            tenant=row["tenant_id"],
            model=row["model"],
            kind=row["kind"],
            percent=shown_percent(row["share"]),
            valid_from=row["valid_from"].isoformat(),
            valid_to=row["valid_to"].isoformat() if row["valid_to"] else None,
        )
        for row in await connection.fetch(_LIST, tenant_id)
    ]


def shown_percent(share: Decimal) -> str:
    """A share as people quote it: `12.5`."""
    return f"{(100 * share).normalize():f}"
