"""The training API under `/river/v1` for money: credit, the ledger's transactions, budgets and their warnings.

A tenant reads its own; a key with the scope `admin` reads anybody's (`?tenant=`) and changes them.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, get, post, put

from river_billing import budgets, ledger, limits
from river_billing.errors import AmountError, ReferenceTakenError, UnknownAccountError
from river_client import credit_wire as wire
from river_gateway.codec import WireRequest, reply
from river_gateway.errors import (
    ConflictError,
    GatewayError,
    InvalidFieldError,
    NotFoundError,
    PermissionDeniedError,
)
from river_gateway.services import services_of
from river_gateway.tenancy.accounts import announce, find_tenant
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.tenancy.messages import AccountChanged

_ADMIN = [requires("admin")]
_ANY = [requires("infer", "train", "admin")]
ALL_TENANTS = "*"


@get("/credit", guards=_ANY)
async def get_credit(request: WireRequest, tenant: str | None = None) -> Response[wire.Credit]:
    """A tenant's credit, what of it is set aside, and what it owes."""
    tenant_id = await tenant_of(request, tenant)
    async with services_of(request).pool.acquire() as connection:
        return reply(request, await _known(ledger.credit_of(connection, tenant_id)))


@post("/credit", guards=_ADMIN, status_code=HTTPStatus.CREATED)
async def add_credit(
    request: WireRequest, data: wire.AddCredit
) -> Response[wire.CreditTransaction]:
    """Books credit, once for each reference."""
    _check_text(data.reference, "reference", limits.REFERENCE_MAX_CHARS)
    if data.note is not None:
        _check_text(data.note, "note", limits.NOTE_MAX_CHARS)
    services = services_of(request)
    tenant_id = await find_tenant(services.pool, data.tenant)
    async with services.pool.acquire() as connection:
        booked = await _known(
            ledger.add_credit(
                connection,
                tenant_id=tenant_id,
                amount_nano_usd=data.amount_nano_usd,
                reference=data.reference,
                kind=data.kind,
                note=data.note,
                actor=principal_of(request).key_id,
            )
        )
    return reply(request, booked, status=HTTPStatus.CREATED)


@put("/credit/billing", guards=_ADMIN)
async def set_billing(request: WireRequest, data: wire.SetBilling) -> Response[wire.Credit]:
    """Decides whether a tenant's credit bounds what it may use."""
    services = services_of(request)
    tenant_id = await find_tenant(services.pool, data.tenant)
    async with services.pool.acquire() as connection:
        await _known(ledger.set_billing(connection, tenant_id, data.billing))
        credit = await ledger.credit_of(connection, tenant_id)
    await announce(services, AccountChanged(tenant_id=tenant_id))
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
    if (data.tenant is None) == (data.key_id is None):
        raise InvalidFieldError(
            "tenant, key_id: a budget is of exactly one of them", param="tenant"
        )
    services = services_of(request)
    tenant_id = None if data.tenant is None else await find_tenant(services.pool, data.tenant)
    async with services.pool.acquire() as connection:
        owner = await _known(
            budgets.set_budget(
                connection,
                budget_nano_usd=data.monthly_budget_nano_usd,
                tenant_id=tenant_id,
                key_id=data.key_id,
            )
        )
        found = wire.Budgets(
            budgets=await budgets.list_budgets(connection, owner),
            warnings=await budgets.list_warnings(connection, owner),
        )
    await announce(services, AccountChanged(tenant_id=owner))
    return reply(request, found)


async def tenant_of(request: WireRequest, tenant: str | None) -> str:
    """Whose money a request is about: the caller's own, or for an admin anybody's."""
    principal = principal_of(request)
    if tenant is None or tenant == principal.tenant_id:
        return principal.tenant_id
    if "admin" not in principal.scopes:
        raise PermissionDeniedError("tenant: only an admin key may ask about other tenants")
    return await find_tenant(services_of(request).pool, tenant)


async def _known(work: Any) -> Any:
    """The outcome of some billing, its errors as the gateway's own."""
    try:
        return await work
    except (AmountError, ReferenceTakenError, UnknownAccountError) as error:
        raise _as_gateway_error(error) from None


def _as_gateway_error(
    error: AmountError | ReferenceTakenError | UnknownAccountError,
) -> GatewayError:
    message = str(error)
    match error:
        case AmountError():
            return InvalidFieldError(message, param=message.partition(":")[0])
        case ReferenceTakenError():
            return ConflictError(message, param="reference")
        case UnknownAccountError():
            return NotFoundError(message)


def _check_text(text: str, field: str, chars_max: int) -> None:
    if not 0 < len(text) <= chars_max:
        raise InvalidFieldError(
            f"{field}: {len(text)} characters, must be 1 to {chars_max}", param=field
        )


CREDIT_HANDLERS: list[Any] = [
    get_credit,
    add_credit,
    set_billing,
    get_entries,
    get_budgets,
    set_budget,
]
