"""`client.audit`: who changed what."""

from __future__ import annotations

import builtins
import datetime as dt

from river_client.audit_wire import AuditEntry, AuditPage
from river_client.transport import Transport


class AsyncAudit:
    """`client.audit`: what concerns a key's own tenant, or for an admin everything."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def list(
        self,
        *,
        day: dt.date | str | None = None,
        action: str | None = None,
        tenant: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> builtins.list[AuditEntry]:
        """What was changed, newest first.

        Of a UTC `day` (`2026-10-31`); of an `action` such as `keys.create`, or by its noun, `keys`, of all of its
        actions; that concerns one `tenant`, by id or name, for admins; and `before` an `entry_id`, for the next page.
        """
        asked = {"day": day, "action": action, "tenant": tenant, "before": before, "limit": limit}
        params = {name: str(value) for name, value in asked.items() if value is not None}
        found = await self._transport.call("GET", "/audit", AuditPage, params=params)
        return found.entries
