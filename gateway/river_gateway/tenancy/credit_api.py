"""The training API under `/river/v1` for money: credit, the ledger's transactions, budgets and their warnings.

A tenant reads its own; a key with the scope `admin` reads anybody's (`?tenant=`) and changes them.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, get, post, put

from river_billing import budgets, ledger, limits
from river_client import credit_wire as wire
from river_gateway.codec import WireRequest, reply
from river_gateway.errors import InvalidFieldError, PermissionDeniedError
from river_gateway.services import services_of
from river_gateway.tenancy import money
from river_gateway.tenancy.accounts import find_tenant
from river_gateway.tenancy.audit import actor_of
from river_gateway.tenancy.auth import principal_of, requires

_ADMIN = [requires("admin")]
_ANY = [requires("infer", "train", "admin")]
ALL_TENANTS = "*"


@get("/credit", guards=_ANY)
async def get_credit(request: WireRequest, tenant: str | None = None) -> Response[wire.Credit]:
    """A tenant's credit, what of it is set aside, and what it owes."""
    tenant_id = await tenant_of(request, tenant)
    with money.known_errors():
        async with services_of(request).pool.acquire() as connection:
            return reply(request, await ledger.credit_of(connection, tenant_id))


@post("/credit", guards=_ADMIN, status_code=HTTPStatus.CREATED)
async def add_credit(
    request: WireRequest, data: wire.AddCredit
) -> Response[wire.CreditTransaction]:
    """Books credit, once for each reference."""
    booked = await money.add_credit(services_of(request), actor_of(request), data)
    return reply(request, booked, status=HTTPStatus.CREATED)


@put("/credit/billing", guards=_ADMIN)
async def set_billing(request: WireRequest, data: wire.SetBilling) -> Response[wire.Credit]:
    """Decides whether a tenant's credit bounds what it may use."""
    credit = await money.set_billing(services_of(request), actor_of(request), data)
    return reply(request, credit)


@get("/credit/entries", guards=_ANY)
async def get_entries(
    request: WireRequest, tenant: str | None = None, before: int | None = None, limit: int = 100
) -> Response[wire.CreditTransactions]:
    """A tenant's transactions, newest first."""
    if not 1 <= limit <= limits.TRANSACTIONS_MAX:
        raise InvalidFieldError(
            f"limit: {limit}, must be 1 to {limits.TRANSACTIONS_MAX}", param="limit"
        )
    tenant_id = await tenant_of(request, tenant)
    async with services_of(request).pool.acquire() as connection:
        found = await ledger.transactions(connection, tenant_id, before=before, count_max=limit)
    return reply(request, wire.CreditTransactions(transactions=found))


@get("/budgets", guards=_ANY)
async def get_budgets(request: WireRequest, tenant: str | None = None) -> Response[wire.Budgets]:
    """The budgets of a tenant and its keys, what this month has cost, and the warnings there were."""
    if tenant == ALL_TENANTS and "admin" in principal_of(request).scopes:
        tenant_id = None
    else:
        tenant_id = await tenant_of(request, tenant)
    async with services_of(request).pool.acquire() as connection:
        found = wire.Budgets(
            budgets=await budgets.list_budgets(connection, tenant_id),
            warnings=await budgets.list_warnings(connection, tenant_id),
        )
    return reply(request, found)


@put("/budgets", guards=_ADMIN)
async def set_budget(request: WireRequest, data: wire.SetBudget) -> Response[wire.Budgets]:
    """Sets or removes a monthly budget; answers with all of the tenant's."""
    services = services_of(request)
    owner = await money.set_budget(services, actor_of(request), data)
    async with services.pool.acquire() as connection:
        found = wire.Budgets(
            budgets=await budgets.list_budgets(connection, owner),
            warnings=await budgets.list_warnings(connection, owner),
        )
    return reply(request, found)


async def tenant_of(request: WireRequest, tenant: str | None) -> str:
    """Whose money a request is about: the caller's own, or for an admin anybody's."""
    principal = principal_of(request)
    if tenant is None or tenant == principal.tenant_id:
        return principal.tenant_id
    if "admin" not in principal.scopes:
        raise PermissionDeniedError("tenant: only an admin key may ask about other tenants")
    return await find_tenant(services_of(request).pool, tenant)


CREDIT_HANDLERS: list[Any] = [
    get_credit,
    add_credit,
    set_billing,
    get_entries,
    get_budgets,
    set_budget,
]
