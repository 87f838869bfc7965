"""The dashboard under `/admin`: pages rendered on the server, kept current by server-sent events."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from litestar import Request, Response, Router

from river_gateway.context import context_of
from river_gateway.dashboard.account_pages import ACCOUNT_HANDLERS
from river_gateway.dashboard.audit_pages import AUDIT_PAGES
from river_gateway.dashboard.billing_pages import BILLING_HANDLERS
from river_gateway.dashboard.chat_pages import CHAT_HANDLERS
from river_gateway.dashboard.checkpoint_pages import CHECKPOINT_HANDLERS
from river_gateway.dashboard.health_pages import HEALTH_HANDLERS
from river_gateway.dashboard.key_pages import KEY_PAGES
from river_gateway.dashboard.learning_pages import LEARNING_PAGE_HANDLERS
from river_gateway.dashboard.machine_pages import MACHINE_PAGES
from river_gateway.dashboard.overview import overview_live, overview_page
from river_gateway.dashboard.pages import Page, redirect, show
from river_gateway.dashboard.price_pages import PRICE_PAGES
from river_gateway.dashboard.run_pages import get_series, run_live, run_page, runs_live, runs_page
from river_gateway.dashboard.sample_pages import SAMPLE_HANDLERS
from river_gateway.dashboard.signing_in import SIGN_IN, sign_in, sign_in_page, sign_out
from river_gateway.dashboard.static_files import get_static
from river_gateway.dashboard.viewer import PATH, sign_out_cookie
from river_gateway.errors import UnauthenticatedError, as_gateway_error

_ERROR_PAGE = Page("error.html")


def _error_page(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """What went wrong, as a page; who is not signed in is asked to."""
    found = as_gateway_error(error, context_of(request.scope))
    if isinstance(found, UnauthenticatedError):
        onward = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return redirect(f"{SIGN_IN}?next={quote(onward)}", cookies=[sign_out_cookie()])
    status = int(found.status)
    return show(_ERROR_PAGE, request, None, {"error": found, "status": status}, status=status)


dashboard_router = Router(
    PATH,
    route_handlers=[
        sign_in_page,
        sign_in,
        sign_out,
        overview_page,
        overview_live,
        runs_page,
        runs_live,
        run_page,
        run_live,
        get_series,
        *SAMPLE_HANDLERS,
        *CHECKPOINT_HANDLERS,
        *CHAT_HANDLERS,
        *LEARNING_PAGE_HANDLERS,
        *BILLING_HANDLERS,
        *ACCOUNT_HANDLERS,
        *KEY_PAGES,
        *PRICE_PAGES,
        *AUDIT_PAGES,
        *MACHINE_PAGES,
        *HEALTH_HANDLERS,
        get_static,
    ],
    exception_handlers={Exception: _error_page},
)
