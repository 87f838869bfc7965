"""All routes of the Tinker dialect, under `/api/v1`: translations of what `training`, `inference` and others do."""

from __future__ import annotations

from litestar import Router

from river_gateway.dialects.tinker.errors import EXCEPTION_HANDLERS
from river_gateway.dialects.tinker.futures_api import FUTURE_HANDLERS
from river_gateway.dialects.tinker.sampling_api import SAMPLING_HANDLERS
from river_gateway.dialects.tinker.sessions_api import SESSION_HANDLERS
from river_gateway.dialects.tinker.training_api import TRAINING_HANDLERS

tinker_router = Router(
    "/api/v1",
    route_handlers=[*SESSION_HANDLERS, *TRAINING_HANDLERS, *SAMPLING_HANDLERS, *FUTURE_HANDLERS],
    exception_handlers=EXCEPTION_HANDLERS,
    include_in_schema=False,
)
