"""Usage and billing: spending by day, CSV, credit, budgets and invoices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from litestar import Request, Response, get
from litestar.response import Stream

from river_billing import exports, invoices
from river_billing.budgets import list_budgets
from river_billing.ledger import credit_of
from river_client.usage_wire import DEFAULT_GROUP
from river_gateway.dashboard import spending
from river_gateway.dashboard.pages import Page, show
from river_gateway.dashboard.viewer import viewer_of
from river_gateway.services import services_of
from river_gateway.tenancy.invoices_api import find_invoice, printable
from river_gateway.tenancy.usage_api import csv_answer

if TYPE_CHECKING:
    from collections.abc import Sequence

_PAGE = Page("usage.html")
_INVOICES_SHOWN = 24


@get("/usage", include_in_schema=False)
async def usage_page(request: Request[Any, Any, Any]) -> Response[str]:
    """Spending by day, told apart as asked, and how it is paid. What is asked for is in the address."""
    viewer = await viewer_of(request)
    days = int(_choice(request, "days", [str(days) for days in spending.DAYS], "30"))
    told = cast("spending.Told", _choice(request, "by", spending.TOLD, "model"))
    measure = cast("spending.Measure", _choice(request, "measure", spending.MEASURES, "dollars"))
    pool, whose = services_of(request).pool, viewer.tenant_id
    found = await spending.read_spending(pool, whose, days=days, told=told)
    async with pool.acquire() as connection:
        billed = await invoices.list_invoices(connection, whose, count_max=_INVOICES_SHOWN)
        budgets = await list_budgets(connection, whose)
        credit = await credit_of(connection, whose) if whose is not None else None
    values = {
        "spending": found,
        "bars": found.bars(measure),
        "box": f"0 0 {spending.CHART_WIDTH:g} {spending.CHART_HEIGHT:g}",
        "credit": credit,
        "budgets": budgets,
        "invoices": billed,
        "chosen": {"days": days, "by": told, "measure": measure},
        "choices": {"days": spending.DAYS, "by": spending.TOLD, "measure": spending.MEASURES},
        "tenant": request.query_params.get("tenant", ""),
    }
    return show(_PAGE, request, viewer, values)


@get("/usage.csv", include_in_schema=False)
async def usage_csv(request: Request[Any, Any, Any]) -> Stream:
    """The month by day, model and tier: what `river usage --csv` writes."""
    viewer = await viewer_of(request)
    query = exports.usage_query(
        tenant_id=viewer.tenant_id, since=None, until=None, every="day", group=DEFAULT_GROUP
    )
    answer = csv_answer(services_of(request).pool, query)
    answer.headers["cache-control"] = "no-store"
    return answer


@get("/invoices/{number:int}", include_in_schema=False)
async def invoice(request: Request[Any, Any, Any], number: int) -> Response[str]:
    """A closed invoice, to be printed."""
    viewer = await viewer_of(request)
    found = await find_invoice(services_of(request), number, viewer.tenant_id)
    answer = printable(found)
    answer.headers["cache-control"] = "no-store"
    return answer


def _choice(
    request: Request[Any, Any, Any], name: str, choices: Sequence[str], default: str
) -> str:
    """What the address asks for, if it is one of `choices`."""
    asked = request.query_params.get(name, default)
    return asked if asked in choices else default


BILLING_HANDLERS: list[Any] = [usage_page, usage_csv, invoice]
