"""`client.credit` and `client.budgets`: what a tenant has, used and may use; and what an admin does about it."""

from __future__ import annotations

from river_client.credit_wire import (
    AddCredit,
    BillingMode,
    Budgets,
    Credit,
    CreditKind,
    CreditTransaction,
    CreditTransactions,
    SetBilling,
    SetBudget,
)
from river_client.transport import Transport


class AsyncCredit:
    """`client.credit`: a tenant's own, or as an admin anybody's, by id or name. Money is in nano-dollars (1e-9 USD)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def show(self, tenant: str | None = None) -> Credit:
        """How a tenant stands."""
        return await self._transport.call("GET", "/credit", Credit, params=_of(tenant))

    async def entries(
        self, tenant: str | None = None, *, before: int | None = None, limit: int = 100
    ) -> list[CreditTransaction]:
        """The latest transactions, newest first; those `before` an id are the next page."""
        params = _of(tenant) | {"limit": str(limit)}
        if before is not None:
            params["before"] = str(before)
        found = await self._transport.call(
            "GET", "/credit/entries", CreditTransactions, params=params
        )
        return found.transactions

    async def add(
        self,
        tenant: str,
        amount_nano_usd: int,
        *,
        reference: str,
        kind: CreditKind = "top_up",
        note: str | None = None,
    ) -> CreditTransaction:
        """Books credit for a tenant, once for each `reference` (for admins)."""
        body = AddCredit(
            tenant=tenant,
            amount_nano_usd=amount_nano_usd,
            reference=reference,
            kind=kind,
            note=note,
        )
        return await self._transport.call("POST", "/credit", CreditTransaction, body=body)

    async def set_billing(self, tenant: str, billing: BillingMode) -> Credit:
        """Decides whether a tenant's credit bounds what it may use (for admins)."""
        body = SetBilling(tenant=tenant, billing=billing)
        return await self._transport.call("PUT", "/credit/billing", Credit, body=body)


class AsyncBudgets:
    """`client.budgets`: for a calendar month (UTC), of tenants and of keys."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def show(self, tenant: str | None = None) -> Budgets:
        """A tenant's budgets and warnings; for admins also another's, or with `*` everybody's."""
        return await self._transport.call("GET", "/budgets", Budgets, params=_of(tenant))

    async def set(
        self,
        amount_nano_usd: int | None,
        *,
        tenant: str | None = None,
        key_id: str | None = None,
    ) -> Budgets:
        """Sets the monthly budget of a tenant or of a key; None takes it away (for admins)."""
        body = SetBudget(monthly_budget_nano_usd=amount_nano_usd, tenant=tenant, key_id=key_id)
        return await self._transport.call("PUT", "/budgets", Budgets, body=body)


def _of(tenant: str | None) -> dict[str, str]:
    return {} if tenant is None else {"tenant": tenant}
