"""OpenAI's API: `/v1/chat/completions`, `/v1/completions`, `/v1/models`."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.types import ASGIApp

from river_gateway.checkpoints import aliases, catalog
from river_gateway.errors import NotSupportedError
from river_gateway.feedback.stored_api import STORED_HANDLERS
from river_gateway.inference.completions import Completions
from river_gateway.inference.dialects import Dialect, OpenAICompletions
from river_gateway.inference.fields import CHAT_COMPLETIONS, COMPLETIONS
from river_gateway.inference.messages_api import COUNT_TOKENS_DIALECT, MESSAGES_DIALECT
from river_gateway.inference.models import resolve_model
from river_gateway.inference.operations_schema import (
    ChatCompletionsOperation,
    CompletionsOperation,
    CountTokensOperation,
    EmbeddingsOperation,
    MessagesOperation,
    ModelOperation,
    ModelsOperation,
    ResponsesOperation,
)
from river_gateway.inference.responses_api import Responses
from river_gateway.services import Services, services_of
from river_gateway.tenancy.auth import principal_of, requires

OWNER = "river"
_JSON = "application/json"

AnyRequest = Request[Any, Any, Any]

# ---- Completions -----------------------------------------------------------------------------------------------------

CHAT = OpenAICompletions("/v1/chat/completions", CHAT_COMPLETIONS)
TEXT = OpenAICompletions("/v1/completions", COMPLETIONS)
RESPONSES = Responses()


def completion_apps(services: Services) -> dict[str, ASGIApp]:
    """What answers POST on these paths."""
    dialects: tuple[Dialect, ...] = (
        CHAT,
        TEXT,
        RESPONSES,
        MESSAGES_DIALECT,
        COUNT_TOKENS_DIALECT,
    )
    return {dialect.path: Completions(services, dialect) for dialect in dialects}


@post("/chat/completions", status_code=200, operation_class=ChatCompletionsOperation)
async def chat_completions(request: AnyRequest) -> ASGIApp:
    """A chat completion, streamed or whole."""
    return Completions(services_of(request), CHAT)


@post("/completions", status_code=200, operation_class=CompletionsOperation)
async def completions(request: AnyRequest) -> ASGIApp:
    """A text completion, streamed or whole."""
    return Completions(services_of(request), TEXT)


@post("/responses", status_code=200, operation_class=ResponsesOperation)
async def responses(request: AnyRequest) -> ASGIApp:
    """A response, streamed or whole. Nothing is stored: each request brings its whole conversation."""
    return Completions(services_of(request), RESPONSES)


@post("/messages", status_code=200, operation_class=MessagesOperation, tags=["Anthropic"])
async def messages(request: AnyRequest) -> ASGIApp:
    """Anthropic's Messages, streamed or whole."""
    return Completions(services_of(request), MESSAGES_DIALECT)


@post(
    "/messages/count_tokens",
    status_code=200,
    operation_class=CountTokensOperation,
    tags=["Anthropic"],
)
async def count_tokens(request: AnyRequest) -> ASGIApp:
    """How many tokens the prompt of a message has."""
    return Completions(services_of(request), COUNT_TOKENS_DIALECT)


@post(
    "/embeddings",
    guards=[requires("infer")],
    status_code=200,
    operation_class=EmbeddingsOperation,
)
async def embeddings(request: AnyRequest) -> Response[bytes]:  # noqa: ARG001 - refused unread
    """Not offered by any engine here."""
    raise NotSupportedError("embeddings are not supported")


# ---- Models ----------------------------------------------------------------------------------------------------------


@get("/models", guards=[requires("infer", "train")], operation_class=ModelsOperation)
async def list_models(request: AnyRequest) -> Response[bytes]:
    """The base models, and this tenant's aliases and checkpoints."""
    services = services_of(request)
    tenant_id = principal_of(request).tenant_id
    models = [_model(name) for name in sorted(_served_bases(services))]
    models += [_model(alias.name) for alias in await aliases.list_all(services.pool, tenant_id)]
    models += [
        _model(row.checkpoint.path)
        for row in await catalog.list_checkpoints(services.pool, tenant_id)
    ]
    return _json({"object": "list", "data": models})


@get(
    "/models/{model_id:path}",
    guards=[requires("infer", "train")],
    operation_class=ModelOperation,
)
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
    route_handlers=[
        chat_completions,
        completions,
        responses,
        messages,
        count_tokens,
        embeddings,
        list_models,
        get_model,
        *STORED_HANDLERS,
    ],
    tags=["OpenAI"],
)
