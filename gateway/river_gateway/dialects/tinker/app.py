"""All routes of the Tinker dialect, under `/api/v1`: translations of what `training`, `inference` and others do."""

from __future__ import annotations

from litestar import Router

from river_gateway.dialects.tinker.account_api import ACCOUNT_HANDLERS
from river_gateway.dialects.tinker.errors import EXCEPTION_HANDLERS
from river_gateway.dialects.tinker.futures_api import FUTURE_HANDLERS
from river_gateway.dialects.tinker.runs_api import RUN_HANDLERS
from river_gateway.dialects.tinker.sampling_api import SAMPLING_HANDLERS
from river_gateway.dialects.tinker.session_list_api import SESSION_LIST_HANDLERS
from river_gateway.dialects.tinker.sessions_api import SESSION_HANDLERS
from river_gateway.dialects.tinker.training_api import TRAINING_HANDLERS

tinker_router = Router(
    "/api/v1",
    route_handlers=[
        *SESSION_HANDLERS,
        *TRAINING_HANDLERS,
        *SAMPLING_HANDLERS,
        *FUTURE_HANDLERS,
        *RUN_HANDLERS,
        *SESSION_LIST_HANDLERS,
        *ACCOUNT_HANDLERS,
    ],
    exception_handlers=EXCEPTION_HANDLERS,
    include_in_schema=False,
)
