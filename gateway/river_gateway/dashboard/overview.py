"""The first page: tokens, money, activity and health at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litestar import Request, Response, get
from litestar.response import ServerSentEvent

from river_gateway.dashboard.figures import read_overview
from river_gateway.dashboard.health_pages import read_health
from river_gateway.dashboard.pages import Page, follow, show
from river_gateway.dashboard.viewer import viewer_of
from river_gateway.services import services_of

if TYPE_CHECKING:
    from river_gateway.dashboard.viewer import Viewer

_PAGE = Page("overview.html", {"overview": "parts/overview.html"})


@get("/", include_in_schema=False)
async def overview_page(request: Request[Any, Any, Any]) -> Response[str]:
    """The page."""
    viewer = await viewer_of(request)
    return show(_PAGE, request, viewer, await _read(request, viewer))


@get("/live", include_in_schema=False)
async def overview_live(request: Request[Any, Any, Any]) -> ServerSentEvent:
    """Its changes."""
    viewer = await viewer_of(request)
    return follow(_PAGE, request, viewer, lambda: _read(request, viewer))


async def _read(request: Request[Any, Any, Any], viewer: Viewer) -> dict[str, Any]:
    services = services_of(request)
    # What all gateways saw says how much others are asking for, so only those who may see everybody's see it.
    fleet = read_health(services) if viewer.is_admin and viewer.tenant_id is None else None
    return {
        "fleet": fleet,
        "overview": await read_overview(services.pool, viewer.tenant_id),
        "engines": services.engines.alive(),
        "trainers": services.trainers.alive(),
        "bases": sorted(services.engines.bases() | services.trainers.bases()),
    }
