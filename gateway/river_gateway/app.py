"""The web application: every route, the errors of each dialect, and the envelope around it all."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, cast

from litestar import Litestar, Request, Response, Router, get
from litestar.datastructures import State
from litestar.openapi import OpenAPIConfig
from litestar.types import ASGIApp, Receive, Scope, Send

from river_client.wire import API_PREFIX
from river_gateway.checkpoints.aliases_api import ALIAS_HANDLERS
from river_gateway.checkpoints.catalog_api import CATALOG_HANDLERS
from river_gateway.checkpoints.import_api import IMPORT_HANDLERS
from river_gateway.checkpoints.sharing_api import SHARING_HANDLERS
from river_gateway.codec import WireRequest
from river_gateway.context import Envelope
from river_gateway.dashboard.app import dashboard_router
from river_gateway.dashboard.pages import LiveStreams
from river_gateway.database import POSTGRES_AWAY
from river_gateway.described import DescribedPlugin
from river_gateway.dialects.tinker.app import tinker_router
from river_gateway.errors import EXCEPTION_HANDLERS
from river_gateway.feedback.feedback_api import FEEDBACK_HANDLERS
from river_gateway.feedback.learning_api import LEARNING_HANDLERS
from river_gateway.health.machines_api import MACHINE_HANDLERS
from river_gateway.inference.openai_api import completion_apps, openai_router
from river_gateway.limits import BODY_MAX_BYTES
from river_gateway.services import Services, services_of
from river_gateway.tenancy.admin_api import ADMIN_HANDLERS
from river_gateway.tenancy.audit_api import AUDIT_HANDLERS
from river_gateway.tenancy.credit_api import CREDIT_HANDLERS
from river_gateway.tenancy.invoices_api import INVOICE_HANDLERS
from river_gateway.tenancy.prices_api import PRICE_HANDLERS
from river_gateway.tenancy.usage_api import USAGE_HANDLERS
from river_gateway.training.samples_api import SAMPLES_HANDLERS
from river_gateway.training.training_api import TRAINING_HANDLERS

_TEXT = "text/plain; version=0.0.4"


@get("/healthz", media_type=_TEXT, include_in_schema=False)
async def healthz() -> bytes:
    """Alive."""
    return b"ok\n"


@get("/readyz", media_type=_TEXT, include_in_schema=False)
async def readyz(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Ready to answer, or what is missing."""
    services = services_of(request)
    try:
        missing = await services.ready()
    except POSTGRES_AWAY:
        missing = "Postgres is not reachable"
    if missing is None:
        return Response(b"ready\n", media_type=_TEXT)
    return Response(
        f"{missing}\n".encode(), media_type=_TEXT, status_code=HTTPStatus.SERVICE_UNAVAILABLE
    )


@get("/metrics", media_type=_TEXT, include_in_schema=False)
async def metrics(request: Request[Any, Any, Any]) -> bytes:
    """For Prometheus."""
    return services_of(request).telemetry.render()


def create_litestar(services: Services) -> Litestar:
    """The routes, without the envelope."""
    river_router = Router(
        API_PREFIX,
        route_handlers=[
            *TRAINING_HANDLERS,
            *SAMPLES_HANDLERS,
            *CATALOG_HANDLERS,
            *ALIAS_HANDLERS,
            *FEEDBACK_HANDLERS,
            *LEARNING_HANDLERS,
            *IMPORT_HANDLERS,
            *SHARING_HANDLERS,
            *ADMIN_HANDLERS,
            *CREDIT_HANDLERS,
            *PRICE_HANDLERS,
            *USAGE_HANDLERS,
            *INVOICE_HANDLERS,
            *MACHINE_HANDLERS,
            *AUDIT_HANDLERS,
        ],
        tags=["River"],
    )
    return Litestar(
        route_handlers=[
            healthz,
            readyz,
            metrics,
            openai_router,
            river_router,
            tinker_router,
            dashboard_router,
        ],
        request_class=WireRequest,
        exception_handlers=EXCEPTION_HANDLERS,
        request_max_body_size=BODY_MAX_BYTES,
        state=State({"services": services, "live_streams": LiveStreams()}),
        openapi_config=OpenAPIConfig(
            title="River",
            version="1",
            path="/schema",
            # The schema itself only: pages that show it load their scripts from elsewhere.
            render_plugins=[DescribedPlugin(path=["/", "/openapi.json"])],
        ),
        # The app is told by its own envelope, not by Litestar's.
        logging_config=None,
    )


def create_app(services: Services) -> ASGIApp:
    """The whole application. Completions take a shorter way to the same handlers as in Litestar's."""
    litestar = cast("ASGIApp", create_litestar(services))
    short_ways = completion_apps(services)

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        answer = litestar
        if scope["type"] == "http" and scope["method"] == "POST":
            answer = short_ways.get(scope["path"], litestar)
        await answer(scope, receive, send)

    return cast("ASGIApp", Envelope(dispatch, services.telemetry, services.health.window))
