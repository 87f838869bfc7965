"""The training API under `/river/v1` for the audit log: who changed what, as pages or CSV.

A key with the scope `admin` reads all lines, or those that concern one tenant (`?tenant=`); others read their tenant's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
from litestar import Response, get
from litestar.response import Stream

from river_billing.exports import csv_bytes
from river_client.audit_wire import AuditEntry, AuditPage
from river_gateway.codec import WireRequest, reply
from river_gateway.errors import InvalidFieldError, PermissionDeniedError
from river_gateway.limits import AUDIT_PAGE_ROWS_MAX
from river_gateway.services import services_of
from river_gateway.tenancy import audit
from river_gateway.tenancy.accounts import find_tenant
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.tenancy.usage_api import ALL_TENANTS, CSV

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import AsyncGenerator

    from river_gateway.database import Database

_ENTRY_MAX = 2**63 - 1
_COLUMNS = tuple(field for field in AuditEntry.__struct_fields__ if field != "details")


@get("/audit", guards=[requires(*audit.READERS)])
async def get_audit(
    request: WireRequest,
    day: str | None = None,
    action: str | None = None,
    tenant: str | None = None,
    before: int | None = None,
    limit: int = 100,
    format: Literal["csv"] | None = None,  # noqa: A002 - its name in the URL
) -> Response[AuditPage] | Stream:
    """Who changed what, newest first: of a UTC day, of one action or, by its noun, a kind of them; or all as CSV."""
    if not 1 <= limit <= AUDIT_PAGE_ROWS_MAX:
        raise InvalidFieldError(
            f"limit: {limit}, must be 1 to {AUDIT_PAGE_ROWS_MAX}", param="limit"
        )
    if before is not None and not 0 <= before <= _ENTRY_MAX:
        raise InvalidFieldError(f"before: {before}, must be 0 to {_ENTRY_MAX}", param="before")
    pool = services_of(request).pool
    tenant_id = await _tenant_asked(request, tenant)
    of_day = audit.parse_day(day) if day else None
    if format == "csv" or CSV in request.headers.get("accept", ""):
        return csv_answer(pool, tenant_id, day=of_day, action=action or None)
    entries = await audit.read(
        pool, tenant_id, day=of_day, action=action or None, before=before, count_max=limit
    )
    return reply(request, AuditPage(entries=entries))


def csv_answer(
    database: Database, tenant_id: str | None, *, day: dt.date | None, action: str | None
) -> Stream:
    """All that is found, as a file: a line an action, its details as JSON."""
    return Stream(
        _csv(database, tenant_id, day, action),
        media_type=CSV,
        headers={"content-disposition": 'attachment; filename="audit.csv"'},
    )


async def _csv(
    database: Database, tenant_id: str | None, day: dt.date | None, action: str | None
) -> AsyncGenerator[bytes]:
    yield csv_bytes([[*_COLUMNS, "details"]])
    before: int | None = None
    while True:
        entries = await audit.read(
            database,
            tenant_id,
            day=day,
            action=action,
            before=before,
            count_max=AUDIT_PAGE_ROWS_MAX,
        )
        if entries:
            yield csv_bytes([_cells(entry) for entry in entries])
        if len(entries) < AUDIT_PAGE_ROWS_MAX:
            return
        before = entries[-1].entry_id


def _cells(entry: AuditEntry) -> list[object]:
    details = msgspec.json.encode(entry.details).decode()
    return [*(getattr(entry, column) for column in _COLUMNS), details]


async def _tenant_asked(request: WireRequest, tenant: str | None) -> str | None:
    """Whose lines a request is about; None is everybody's, for admins."""
    principal = principal_of(request)
    if "admin" not in principal.scopes:
        if tenant not in (None, principal.tenant_id):
            raise PermissionDeniedError("tenant: only an admin key may ask about other tenants")
        return principal.tenant_id
    if tenant is None or tenant == ALL_TENANTS:
        return None
    return await find_tenant(services_of(request).pool, tenant)


AUDIT_HANDLERS: list[Any] = [get_audit]
