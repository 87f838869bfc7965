"""The training API under `/river/v1` for invoices: lists, each as JSON or as a page to print, and closing them.

A tenant reads its own; a key with the scope `admin` reads anybody's (`?tenant=`, or `*` for all) and closes them.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Literal

from litestar import Response, get, post

from river_billing import invoices, limits
from river_billing.errors import ClosingError
from river_billing.invoice_page import CONTENT_SECURITY_POLICY, invoice_page
from river_client import invoice_wire as wire
from river_gateway.codec import WireRequest, reply
from river_gateway.errors import ConflictError, InvalidFieldError, NotFoundError
from river_gateway.services import Services, services_of
from river_gateway.tenancy import money
from river_gateway.tenancy.audit import actor_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.tenancy.usage_api import tenant_asked

HTML = "text/html"
_ADMIN = [requires("admin")]
_ANY = [requires("infer", "train", "admin")]
_LIST_DEFAULT = 100
_NUMBER_MAX = 2**63 - 1

Format = Literal["html"] | None


@get("/invoices", guards=_ANY)
async def get_invoices(
    request: WireRequest,
    tenant: str | None = None,
    before: int | None = None,
    limit: int = _LIST_DEFAULT,
) -> Response[wire.Invoices]:
    """Closed invoices, newest first, without their lines."""
    if not 1 <= limit <= limits.INVOICES_MAX:
        raise InvalidFieldError(
            f"limit: {limit}, must be 1 to {limits.INVOICES_MAX}", param="limit"
        )
    if before is not None and not 0 <= before <= _NUMBER_MAX:
        raise InvalidFieldError(f"before: {before}, must be 0 to {_NUMBER_MAX}", param="before")
    tenant_id = await tenant_asked(request, tenant)
    async with services_of(request).pool.acquire() as connection:
        found = await invoices.list_invoices(connection, tenant_id, before=before, count_max=limit)
    return reply(request, wire.Invoices(invoices=found))


@get("/invoices/open", guards=_ANY)
async def get_open_invoices(
    request: WireRequest, tenant: str | None = None
) -> Response[wire.Invoices]:
    """What the months that are not closed come to, this one included, with their lines."""
    tenant_id = await tenant_asked(request, tenant)
    if tenant_id is None:
        raise InvalidFieldError("tenant: open invoices are of one tenant", param="tenant")
    async with services_of(request).pool.acquire() as connection:
        try:
            found = await invoices.open_invoices(connection, tenant_id)
        except ClosingError as error:
            raise ConflictError(str(error), param="month") from None
    return reply(request, wire.Invoices(invoices=found))


@get("/invoices/{number:int}", guards=_ANY)
async def get_invoice(
    request: WireRequest,
    number: int,
    format: Format = None,  # noqa: A002 - its name in the URL
) -> Response[wire.Invoice] | Response[str]:
    """One invoice, as JSON or, by `format` or Accept, as a page to print."""
    principal = principal_of(request)
    tenant_id = None if "admin" in principal.scopes else principal.tenant_id
    found = await find_invoice(services_of(request), number, tenant_id)
    if format == "html" or HTML in request.headers.get("accept", ""):
        return printable(found)
    return reply(request, found)


async def find_invoice(services: Services, number: int, tenant_id: str | None) -> wire.Invoice:
    """The closed invoice of a number, of one tenant or (None) of any.

    Raises:
        NotFoundError: there is none.
    """
    found = None
    if 0 < number <= _NUMBER_MAX:
        async with services.pool.acquire() as connection:
            found = await invoices.find_invoice(connection, number, tenant_id)
    if found is None:
        raise NotFoundError(f"there is no invoice {number}", param="number")
    return found


def printable(invoice: wire.Invoice) -> Response[str]:
    """An invoice as a page to print."""
    headers = {"content-security-policy": CONTENT_SECURITY_POLICY}
    return Response(invoice_page(invoice), media_type=HTML, headers=headers)


@post("/invoices", guards=_ADMIN, status_code=HTTPStatus.OK)
async def close_invoices(request: WireRequest, data: wire.CloseInvoices) -> Response[wire.Invoices]:
    """Closes a tenant's invoices up to that of a month; again answers with that of the month."""
    closed = await money.close_invoices(services_of(request), actor_of(request), data)
    return reply(request, wire.Invoices(invoices=closed))


INVOICE_HANDLERS: list[Any] = [get_invoices, get_open_invoices, get_invoice, close_invoices]
