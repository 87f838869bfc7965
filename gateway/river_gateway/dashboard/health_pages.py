"""How requests went in the last half hour, over all gateways: for admins, since it is of all tenants."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from litestar import Request, Response, get
from litestar.response import ServerSentEvent

from river_gateway.dashboard.pages import Page, follow, show
from river_gateway.dashboard.viewer import admin_of
from river_gateway.health.readings import POINT_S
from river_gateway.health.slots import STREAM_BROKEN
from river_gateway.services import services_of

if TYPE_CHECKING:
    from river_gateway.services import Services

_PAGE = Page("health.html", {"health": "parts/health.html"})


@get("/health", include_in_schema=False)
async def health_page(request: Request[Any, Any, Any]) -> Response[str]:
    """The page."""
    viewer = await admin_of(request)
    return show(_PAGE, request, viewer, read_health(services_of(request)))


@get("/health/live", include_in_schema=False)
async def health_live(request: Request[Any, Any, Any]) -> ServerSentEvent:
    """Its changes."""
    viewer = await admin_of(request)

    async def now() -> dict[str, Any]:
        return read_health(services_of(request))

    return follow(_PAGE, request, viewer, now)


def read_health(services: Services) -> dict[str, Any]:
    """What the page and the overview show."""
    return {
        "readings": services.health.readings(),
        "failures": [
            (datetime.fromtimestamp(failure.at, UTC), failure)
            for failure in services.health.failures()
        ],
        "point_s": POINT_S,
        "broken": STREAM_BROKEN,
    }


HEALTH_HANDLERS: list[Any] = [health_page, health_live]
