"""What is known of the request being answered, and the outermost ASGI layer that makes and reports it.

The layer wraps the whole Litestar app rather than being one of its middlewares, so that answers to unknown routes and
broken requests carry `x-request-id` and are counted too.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from river_gateway.ids import uuid7

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

    from river_gateway.health.window import Window
    from river_gateway.telemetry import Telemetry

logger = logging.getLogger("river.gateway")

_SCOPE_KEY = "river.context"


@dataclass(slots=True)
class RequestContext:
    """`request_id` is a UUIDv7 and the identity of the usage event that the request may cause.

    `base_model` is known once it is known who answers, `first_token_s` is how long the first token of a stream took,
    `broken` whether a stream ended in an error event, and `problem` what went wrong that is ours to mend.
    """

    request_id: str = field(default_factory=uuid7)
    started_at: float = field(default_factory=time.perf_counter)
    status: int = 0
    tenant_id: str | None = None
    base_model: str | None = None
    first_token_s: float | None = None
    broken: bool = False
    problem: str | None = None

    def log_ids(self) -> dict[str, Any]:
        """The ids that every log line about this request carries."""
        return {"request": self.request_id, "tenant": self.tenant_id}


def context_of(scope: Scope) -> RequestContext:
    """The context of a request."""
    return cast("dict[str, RequestContext]", scope)[_SCOPE_KEY]


class Envelope:
    """Gives each request its id, and each answer `x-request-id` and `openai-processing-ms`."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, window: Window) -> None:
        self._app = app
        self._telemetry = telemetry
        self._window = window

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext()
        cast("dict[str, RequestContext]", scope)[_SCOPE_KEY] = context

        async def send_enveloped(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                elapsed_ms = int((time.perf_counter() - context.started_at) * 1000)
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", context.request_id.encode()),
                    (b"openai-processing-ms", str(elapsed_ms).encode()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_enveloped)
        finally:
            elapsed_s = time.perf_counter() - context.started_at
            # A template, not the path: labels must stay few.
            route = scope.get("path_template", "unmatched")
            self._telemetry.answered(route, scope["method"], context.status, elapsed_s)
            self._window.count(context, route, elapsed_s)
            if logger.isEnabledFor(logging.INFO):
                outcome = {
                    "method": scope["method"],
                    "route": route,
                    "status": context.status,
                    "duration_ms": round(elapsed_s * 1000, 1),
                }
                logger.info("answered", extra=context.log_ids() | outcome)
