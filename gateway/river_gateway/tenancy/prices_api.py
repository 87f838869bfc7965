"""The training API under `/river/v1` for what things cost: setting prices, and the discounts of tenants.

Everybody reads prices (`GET /prices`) and its own discounts; a key with the scope `admin` sets both, and reads all.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from litestar import Response, get, put

from river_billing import discounts, limits, prices
from river_billing.errors import PriceError
from river_billing.events import UsageKind
from river_client import price_wire, wire
from river_gateway.codec import WireRequest, reply
from river_gateway.errors import InvalidFieldError
from river_gateway.services import services_of
from river_gateway.tenancy.accounts import find_tenant, parse_time
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.tenancy.credit_api import ALL_TENANTS, tenant_of

if TYPE_CHECKING:
    from datetime import datetime

_ADMIN = [requires("admin")]
_ANY = [requires("infer", "train", "admin")]
_PERCENT = 100


@put("/prices", guards=_ADMIN)
async def set_price(request: WireRequest, data: price_wire.SetPrice) -> Response[wire.Page]:
    """Puts a price in force, from now or a later moment on; answers with all prices of the model."""
    _check_model(data.model)
    if not 1 <= data.context_length <= limits.CONTEXT_LENGTH_MAX:
        raise InvalidFieldError(
            f"context_length: {data.context_length}, must be 1 to {limits.CONTEXT_LENGTH_MAX}",
            param="context_length",
        )
    kind = UsageKind(data.kind)
    usd = _number(data.usd_per_million, "usd_per_million")
    valid_from = _moment(data.valid_from)
    async with services_of(request).pool.acquire() as connection:
        try:
            await prices.set_price(
                connection,
                model=data.model,
                context_length=data.context_length,
                kind=kind,
                nano_usd_per_unit=prices.per_unit(kind, usd),
                valid_from=valid_from,
            )
        except PriceError as error:
            raise _invalid(error) from None
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
    _check_model(data.model)
    percent = _number(data.percent, "percent")
    if not 0 <= percent <= _PERCENT:
        raise InvalidFieldError(f"percent: {percent}, must be 0 to {_PERCENT}", param="percent")
    valid_from = _moment(data.valid_from)
    services = services_of(request)
    tenant_id = await find_tenant(services.pool, data.tenant)
    async with services.pool.acquire() as connection:
        try:
            await discounts.set_discount(
                connection,
                tenant_id=tenant_id,
                model=data.model,
                kind=None if data.kind == discounts.ANY_KIND else UsageKind(data.kind),
                share=percent / _PERCENT,
                valid_from=valid_from,
            )
        except PriceError as error:
            raise _invalid(error) from None
        found = await discounts.list_discounts(connection, tenant_id)
    return reply(request, price_wire.Discounts(discounts=found))


def _check_model(model: str) -> None:
    if not 0 < len(model) <= limits.MODEL_NAME_MAX_CHARS:
        raise InvalidFieldError(
            f"model: {len(model)} characters, must be 1 to {limits.MODEL_NAME_MAX_CHARS}",
            param="model",
        )


def _number(text: str, param: str) -> Decimal:
    """A finite decimal, exactly as written."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = None
    if number is None or not number.is_finite() or len(text) > limits.NUMBER_MAX_CHARS:
        raise InvalidFieldError(f"{param}: {text[:50]!r} is no decimal number", param=param)
    return number


def _moment(text: str | None) -> datetime | None:
    return None if text is None else parse_time(text, "valid_from")


def _invalid(error: PriceError) -> InvalidFieldError:
    message = str(error)
    param, _, _ = message.partition(":")
    # What is set is a percentage here, and a price in dollars.
    param = {"share": "percent", "nano_usd_per_unit": "usd_per_million"}.get(param, param)
    return InvalidFieldError(message, param=param)


PRICE_HANDLERS: list[Any] = [set_price, get_discounts, set_discount]
