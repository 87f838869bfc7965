"""The training API under `/river/v1` for what things cost: setting prices, and the discounts of tenants.

Everybody reads prices (`GET /prices`) and its own discounts; a key with the scope `admin` sets both, and reads all.
"""

from __future__ import annotations

from typing import Any

from litestar import Response, get, put

from river_billing import discounts, prices
from river_client import price_wire, wire
from river_gateway.codec import WireRequest, reply
from river_gateway.services import services_of
from river_gateway.tenancy import money
from river_gateway.tenancy.audit import actor_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.tenancy.credit_api import ALL_TENANTS, tenant_of

_ADMIN = [requires("admin")]
_ANY = [requires("infer", "train", "admin")]


@put("/prices", guards=_ADMIN)
async def set_price(request: WireRequest, data: price_wire.SetPrice) -> Response[wire.Page]:
    """Puts a price in force, from now or a later moment on; answers with all prices of the model."""
    services = services_of(request)
    await money.set_price(services, actor_of(request), data)
    async with services.pool.acquire() as connection:
        known = await prices.list_prices(connection)
    return reply(request, wire.Page(prices=[price for price in known if price.model == data.model]))


@get("/discounts", guards=_ANY)
async def get_discounts(
    request: WireRequest, tenant: str | None = None
) -> Response[price_wire.Discounts]:
    """Every discount that a tenant has or had; for an admin also another's, or with `*` everybody's."""
    if tenant == ALL_TENANTS and "admin" in principal_of(request).scopes:
        tenant_id = None
    else:
        tenant_id = await tenant_of(request, tenant)
    async with services_of(request).pool.acquire() as connection:
        found = await discounts.list_discounts(connection, tenant_id)
    return reply(request, price_wire.Discounts(discounts=found))


@put("/discounts", guards=_ADMIN)
async def set_discount(
    request: WireRequest, data: price_wire.SetDiscount
) -> Response[price_wire.Discounts]:
    """Puts a tenant's discount in force, from now or a later moment on; answers with all of the tenant's."""
    services = services_of(request)
    tenant_id = await money.set_discount(services, actor_of(request), data)
    async with services.pool.acquire() as connection:
        found = await discounts.list_discounts(connection, tenant_id)
    return reply(request, price_wire.Discounts(discounts=found))


PRICE_HANDLERS: list[Any] = [set_price, get_discounts, set_discount]
