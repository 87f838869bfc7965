"""`client.invoices`: what a tenant used in each month and owes; and what an admin does about it."""

from __future__ import annotations

import builtins

from river_client import wire
from river_client.invoice_wire import CloseInvoices, Invoice, Invoices
from river_client.transport import MSGPACK, Transport


class AsyncInvoices:
    """`client.invoices`: a tenant's own, or as an admin anybody's, by id or name."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def list(
        self, tenant: str | None = None, *, before: int | None = None, limit: int = 100
    ) -> builtins.list[Invoice]:
        """Closed invoices, newest first, without their lines; with `*` all tenants'; those `before` a number."""
        params = _of(tenant) | {"limit": str(limit)}
        if before is not None:
            params["before"] = str(before)
        found = await self._transport.call("GET", "/invoices", Invoices, params=params)
        return found.invoices

    async def open(self, tenant: str | None = None) -> builtins.list[Invoice]:
        """What the months that are not closed come to, this one included, with their lines."""
        found = await self._transport.call("GET", "/invoices/open", Invoices, params=_of(tenant))
        return found.invoices

    async def get(self, number: int) -> Invoice:
        """A closed invoice with its lines.

        Raises:
            NotFoundError: there is none of that number, or it is another tenant's.
        """
        return await self._transport.call("GET", f"/invoices/{number}", Invoice)

    async def page(self, number: int) -> str:
        """A closed invoice as a page of HTML to print; raises as `get` does."""
        response = await self._transport.send(
            "GET",
            f"{wire.API_PREFIX}/invoices/{number}",
            headers={"accept": MSGPACK},
            params={"format": "html"},
        )
        return response.text

    async def close(self, tenant: str, month: str) -> builtins.list[Invoice]:
        """Closes a tenant's invoices up to that of `month` (`2026-10`), for admins; those it closed.

        Where that is none, it is the one of that month, if there is one.

        Raises:
            InvalidRequestError: the month is not over yet, or not all of it may be recorded.
        """
        body = CloseInvoices(tenant=tenant, month=month)
        found = await self._transport.call("POST", "/invoices", Invoices, body=body)
        return found.invoices


def _of(tenant: str | None) -> dict[str, str]:
    return {} if tenant is None else {"tenant": tenant}
