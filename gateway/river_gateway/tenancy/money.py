"""What admins decide about money, from wherever they do it: prices, discounts, credit, budgets, closed invoices.

Each is checked, done and written down in one transaction; the errors of billing become the gateway's own here.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from river_billing import budgets, discounts, invoices, ledger, limits, prices
from river_billing.errors import (
    AmountError,
    ClosingError,
    PriceError,
    ReferenceTakenError,
    UnknownAccountError,
)
from river_billing.events import UsageKind
from river_gateway.errors import ConflictError, InvalidFieldError, NotFoundError
from river_gateway.tenancy import audit
from river_gateway.tenancy.accounts import announce, find_tenant, parse_time
from river_gateway.tenancy.messages import AccountChanged

if TYPE_CHECKING:
    from datetime import datetime

    from river_client import credit_wire, invoice_wire, price_wire
    from river_gateway.services import Services
    from river_gateway.tenancy.audit import Actor

_PERCENT = 100

# ---- Prices and discounts --------------------------------------------------------------------------------------------


async def set_price(services: Services, by: Actor, asked: price_wire.SetPrice) -> None:
    """Puts a price in force, from now or a later moment on.

    Raises:
        InvalidFieldError: a field is out of range, or it would change the past or what is planned.
    """
    nano_usd_per_unit = check_price(asked)
    with known_errors():
        async with audit.recorded(services.pool, by, "prices.set") as line:
            await prices.set_price(
                line.connection,
                model=asked.model,
                context_length=asked.context_length,
                kind=UsageKind(asked.kind),
                nano_usd_per_unit=nano_usd_per_unit,
                valid_from=_moment(asked.valid_from),
            )
            line.about(asked.model, tenant_id=None, details=asked)


def check_price(asked: price_wire.SetPrice) -> Decimal:
    """What a unit would cost, in nano-dollars; what is planned already is known only when it is set.

    Raises:
        InvalidFieldError: a field is out of range, or it would change the past.
    """
    _check_model(asked.model)
    if not 1 <= asked.context_length <= limits.CONTEXT_LENGTH_MAX:
        raise InvalidFieldError(
            f"context_length: {asked.context_length}, must be 1 to {limits.CONTEXT_LENGTH_MAX}",
            param="context_length",
        )
    usd = parse_number(asked.usd_per_million, "usd_per_million")
    with known_errors():
        prices.check_not_past(_moment(asked.valid_from))
        return prices.per_unit(UsageKind(asked.kind), usd)


async def set_discount(services: Services, by: Actor, asked: price_wire.SetDiscount) -> str:
    """Puts a tenant's discount in force, from now or a later moment on; returns the tenant's id.

    Raises:
        InvalidFieldError: a field is out of range, or it would change the past or what is planned.
        NotFoundError: there is no such tenant.
    """
    _check_model(asked.model)
    percent = parse_number(asked.percent, "percent")
    if not 0 <= percent <= _PERCENT:
        raise InvalidFieldError(f"percent: {percent}, must be 0 to {_PERCENT}", param="percent")
    tenant_id = await find_tenant(services.pool, asked.tenant)
    with known_errors():
        async with audit.recorded(services.pool, by, "discounts.set") as line:
            await discounts.set_discount(
                line.connection,
                tenant_id=tenant_id,
                model=asked.model,
                kind=None if asked.kind == discounts.ANY_KIND else UsageKind(asked.kind),
                share=percent / _PERCENT,
                valid_from=_moment(asked.valid_from),
            )
            line.about(asked.model, tenant_id=tenant_id, details=asked)
    return tenant_id


# ---- Credit, budgets, invoices ---------------------------------------------------------------------------------------


async def add_credit(
    services: Services, by: Actor, asked: credit_wire.AddCredit
) -> credit_wire.CreditTransaction:
    """Books credit, once for each reference.

    Raises:
        InvalidFieldError: a field is out of range.
        ConflictError: something else was booked under the reference.
        NotFoundError: there is no such tenant.
    """
    _check_text(asked.reference, "reference", limits.REFERENCE_MAX_CHARS)
    if asked.note is not None:
        _check_text(asked.note, "note", limits.NOTE_MAX_CHARS)
    tenant_id = await find_tenant(services.pool, asked.tenant)
    with known_errors():
        async with audit.recorded(services.pool, by, "credit.add") as line:
            booked = await ledger.add_credit(
                line.connection,
                tenant_id=tenant_id,
                amount_nano_usd=asked.amount_nano_usd,
                reference=asked.reference,
                kind=asked.kind,
                note=asked.note,
                actor=by.key_id,
            )
            line.about(asked.reference, tenant_id=tenant_id, details=asked)
    return booked


async def set_billing(
    services: Services, by: Actor, asked: credit_wire.SetBilling
) -> credit_wire.Credit:
    """Decides whether a tenant's credit bounds what it may use.

    Raises:
        NotFoundError: there is no such tenant.
    """
    tenant_id = await find_tenant(services.pool, asked.tenant)
    with known_errors():
        async with audit.recorded(services.pool, by, "credit.billing") as line:
            await ledger.set_billing(line.connection, tenant_id, asked.billing)
            credit = await ledger.credit_of(line.connection, tenant_id)
            line.about(tenant_id, tenant_id=tenant_id, details=asked)
    await announce(services, AccountChanged(tenant_id=tenant_id))
    return credit


async def set_budget(services: Services, by: Actor, asked: credit_wire.SetBudget) -> str:
    """Sets or removes the monthly budget of a tenant or a key; returns the tenant's id.

    Raises:
        InvalidFieldError: it is not of exactly one of them, or out of range.
        NotFoundError: there is no such tenant or key.
    """
    if (asked.tenant is None) == (asked.key_id is None):
        raise InvalidFieldError(
            "tenant, key_id: a budget is of exactly one of them", param="tenant"
        )
    tenant_id = None if asked.tenant is None else await find_tenant(services.pool, asked.tenant)
    with known_errors():
        async with audit.recorded(services.pool, by, "budgets.set") as line:
            owner = await budgets.set_budget(
                line.connection,
                budget_nano_usd=asked.monthly_budget_nano_usd,
                tenant_id=tenant_id,
                key_id=asked.key_id,
            )
            line.about(asked.key_id or owner, tenant_id=owner, details=asked)
    await announce(services, AccountChanged(tenant_id=owner))
    return owner


async def close_invoices(
    services: Services, by: Actor, asked: invoice_wire.CloseInvoices
) -> list[invoice_wire.Invoice]:
    """Closes a tenant's invoices up to that of a month; again answers with that of the month.

    Raises:
        InvalidFieldError: the month is none.
        ConflictError: it cannot be closed yet.
        NotFoundError: there is no such tenant.
    """
    try:
        month = invoices.parse_month(asked.month)
    except ClosingError as error:
        raise InvalidFieldError(str(error), param="month") from None
    tenant_id = await find_tenant(services.pool, asked.tenant)
    with known_errors():
        # Closing sees one moment of the tables, which is for the transaction to say before it begins to look.
        async with audit.recorded(services.pool, by, "invoices.close", one_moment=True) as line:
            closed = await invoices.close_invoices(
                line.connection, tenant_id, month, actor=by.key_id
            )
            numbers = [invoice.number for invoice in closed]
            details = {"tenant": asked.tenant, "month": asked.month, "numbers": numbers}
            line.about(asked.month, tenant_id=tenant_id, details=details)
    return closed


# ---- What is wrong ---------------------------------------------------------------------------------------------------


@contextmanager
def known_errors() -> Generator[None]:
    """The errors of billing, as the gateway's own."""
    try:
        yield
    except PriceError as error:
        param = str(error).partition(":")[0]
        # What is set is a percentage here, and a price in dollars.
        param = {"share": "percent", "nano_usd_per_unit": "usd_per_million"}.get(param, param)
        raise InvalidFieldError(str(error), param=param) from None
    except AmountError as error:
        raise InvalidFieldError(str(error), param=str(error).partition(":")[0]) from None
    except ReferenceTakenError as error:
        raise ConflictError(str(error), param="reference") from None
    except ClosingError as error:
        raise ConflictError(str(error), param="month") from None
    except UnknownAccountError as error:
        raise NotFoundError(str(error)) from None


def parse_number(text: str, param: str) -> Decimal:
    """A finite decimal, exactly as written.

    Raises:
        InvalidFieldError: it is none.
    """
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = None
    # An exponent makes a few characters a number that nothing can be computed with.
    plain = (
        number is not None
        and number.is_finite()
        and abs(number.adjusted()) <= limits.NUMBER_MAX_CHARS
    )
    if number is None or not plain or len(text) > limits.NUMBER_MAX_CHARS:
        raise InvalidFieldError(f"{param}: {text[:50]!r} is no decimal number", param=param)
    return number


def _moment(text: str | None) -> datetime | None:
    return None if text is None else parse_time(text, "valid_from")


def _check_model(model: str) -> None:
    _check_text(model, "model", limits.MODEL_NAME_MAX_CHARS)


def _check_text(text: str, field: str, chars_max: int) -> None:
    if not 0 < len(text) <= chars_max:
        raise InvalidFieldError(
            f"{field}: {len(text)} characters, must be 1 to {chars_max}", param=field
        )
