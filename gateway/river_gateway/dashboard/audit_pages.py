"""The audit log: who changed what, filtered by what the address says, and the same as CSV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from litestar import Request, Response, get
from litestar.response import Stream

from river_client.audit_wire import AuditAction
from river_gateway.dashboard.forms import Typed
from river_gateway.dashboard.pages import Page, show
from river_gateway.dashboard.viewer import viewer_of
from river_gateway.errors import InvalidFieldError
from river_gateway.services import services_of
from river_gateway.tenancy import accounts, audit
from river_gateway.tenancy.audit_api import csv_answer
from river_gateway.tenancy.auth import check_scopes

if TYPE_CHECKING:
    import datetime as dt

    from river_gateway.dashboard.viewer import Viewer

_PAGE = Page("audit.html")
_ENTRIES_SHOWN = 100
_ENTRY_DIGITS_MAX = 18
ACTIONS: tuple[str, ...] = get_args(AuditAction)
# `keys` is all of its actions.
_NOUNS = tuple(dict.fromkeys(action.partition(".")[0] for action in ACTIONS))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the address asks for."""

    viewer: Viewer
    day: dt.date | None
    action: str | None


@get("/audit", include_in_schema=False)
async def audit_page(request: Request[Any, Any, Any]) -> Response[str]:
    """Lines that the viewer may see, newest first."""
    viewer, pool = await _reader(request), services_of(request).pool
    typed, entries = Typed(dict(request.query_params)), []
    try:
        asked = _asked(request, viewer)
    except InvalidFieldError as error:
        typed = Typed(dict(request.query_params), error)
    else:
        before = request.query_params.get("before", "")
        known = before.isdecimal() and len(before) <= _ENTRY_DIGITS_MAX
        entries = await audit.read(
            pool,
            viewer.tenant_id,
            day=asked.day,
            action=asked.action,
            before=int(before) if known else None,
            count_max=_ENTRIES_SHOWN,
        )
    values = {
        "entries": entries,
        "more": entries[-1].entry_id if len(entries) == _ENTRIES_SHOWN else None,
        "typed": typed,
        "nouns": _NOUNS,
        "actions": ACTIONS,
        "tenants": await accounts.list_tenants(pool) if viewer.is_admin else [],
        "asked": {name: typed.value(name) for name in ("day", "action", "tenant")},
    }
    return show(_PAGE, request, viewer, values, status=200 if typed.error is None else 422)


@get("/audit.csv", include_in_schema=False)
async def audit_csv(request: Request[Any, Any, Any]) -> Stream:
    """All that the same filters find."""
    viewer = await _reader(request)
    asked = _asked(request, viewer)
    pool = services_of(request).pool
    answer = csv_answer(pool, viewer.tenant_id, day=asked.day, action=asked.action)
    answer.headers["cache-control"] = "no-store"
    return answer


async def _reader(request: Request[Any, Any, Any]) -> Viewer:
    viewer = await viewer_of(request)
    check_scopes(viewer.principal, audit.READERS)
    return viewer


def _asked(request: Request[Any, Any, Any], viewer: Viewer) -> _Asked:
    day, action = (request.query_params.get(name, "") for name in ("day", "action"))
    return _Asked(
        viewer,
        audit.parse_day(day) if day else None,
        action if action in (*_NOUNS, *ACTIONS) else None,
    )


AUDIT_PAGES: list[Any] = [audit_page, audit_csv]
