"""OpenAI's API: `/v1/chat/completions`, `/v1/completions`, `/v1/models`."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.types import ASGIApp

from river_gateway.checkpoints import catalog
from river_gateway.errors import NotSupportedError
from river_gateway.inference.completions import Completions
from river_gateway.inference.models import resolve_model
from river_gateway.services import Services, services_of
from river_gateway.tenancy.auth import principal_of, requires

OWNER = "river"
_JSON = "application/json"

AnyRequest = Request[Any, Any, Any]

# ---- Completions -----------------------------------------------------------------------------------------------------

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"


def completion_apps(services: Services) -> dict[str, ASGIApp]:
    """What answers POST on these paths."""
    return {path: Completions(services, path) for path in (CHAT_PATH, COMPLETIONS_PATH)}


@post("/chat/completions", status_code=200)
async def chat_completions(request: AnyRequest) -> ASGIApp:
    """A chat completion, streamed or whole."""
    return Completions(services_of(request), CHAT_PATH)


@post("/completions", status_code=200)
async def completions(request: AnyRequest) -> ASGIApp:
    """A text completion, streamed or whole."""
    return Completions(services_of(request), COMPLETIONS_PATH)


@post("/embeddings", guards=[requires("infer")], status_code=200)
async def embeddings(request: AnyRequest) -> Response[bytes]:  # noqa: ARG001 - refused unread
    """Not offered by any engine here."""
    raise NotSupportedError("embeddings are not supported")


# ---- Models ----------------------------------------------------------------------------------------------------------


@get("/models", guards=[requires("infer", "train")])
async def list_models(request: AnyRequest) -> Response[bytes]:
    """The base models, and this tenant's aliases and checkpoints."""
    services = services_of(request)
    tenant_id = principal_of(request).tenant_id
    models = [_model(name) for name in sorted(_served_bases(services))]
    models += [_model(alias.name) for alias in await catalog.list_aliases(services.pool, tenant_id)]
    models += [
        _model(row.checkpoint.path)
        for row in await catalog.list_checkpoints(services.pool, tenant_id)
    ]
    return _json({"object": "list", "data": models})


@get("/models/{model_id:path}", guards=[requires("infer", "train")])
async def get_model(request: AnyRequest, model_id: str) -> Response[bytes]:  # noqa: ARG001 - see below
    """One model, by any name that a completion takes."""
    services = services_of(request)
    # Litestar folds the double slash of `river://…`, so the name is taken from the path as it was sent.
    raw_path = request.scope["raw_path"].decode("latin-1").partition("?")[0]
    name = unquote(raw_path.partition("/models/")[2])
    await resolve_model(services, name, principal_of(request).tenant_id)
    return _json(_model(name))


def _served_bases(services: Services) -> set[str]:
    return {engine.base_model for engine in services.engines.alive()}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": OWNER}


def _json(value: Any) -> Response[bytes]:
    return Response(msgspec.json.encode(value), media_type=_JSON)


openai_router = Router(
    "/v1",
    route_handlers=[chat_completions, completions, embeddings, list_models, get_model],
    tags=["OpenAI"],
)
