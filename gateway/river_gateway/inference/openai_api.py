"""OpenAI's API: `/v1/chat/completions`, `/v1/completions`, `/v1/models`.

A completion's body goes to the engine as it came but for `model` and `stream_options`; the engine's answer comes back
as it is, but for usage that the client has not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.response.base import ASGIResponse

from river_billing.events import UsageEvent
from river_gateway.checkpoints import catalog
from river_gateway.codec import storable
from river_gateway.context import context_of
from river_gateway.disconnect import unless_client_leaves
from river_gateway.engines.http_client import EngineLostError
from river_gateway.engines.upstream import Opened
from river_gateway.errors import (
    InvalidFieldError,
    MalformedBodyError,
    NotSupportedError,
    UnavailableError,
)
from river_gateway.inference.metering import Chunk, UsageTally, usage_event
from river_gateway.inference.models import Target, ask_current, resolve_model
from river_gateway.inference.relay import Relay
from river_gateway.inference.sse import UsageWishes
from river_gateway.limits import USER_MAX_CHARS
from river_gateway.services import Services, services_of
from river_gateway.tenancy.auth import Principal, principal_of, requires

POLICY_HEADER = "x-river-policy-version"
OWNER = "river"
_JSON = "application/json"

AnyRequest = Request[Any, Any, Any]

# ---- Requests --------------------------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Understood(msgspec.Struct, frozen=True):
    """The fields of a completion's body that matter here; everything else is the engine's affair."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    user: Annotated[str, msgspec.Meta(max_length=USER_MAX_CHARS)] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One request on its way: what the client said, and who answers."""

    asked: Understood
    target: Target

    @property
    def wishes(self) -> UsageWishes:
        """Which usage the client is to see in a stream."""
        options = self.asked.stream_options or StreamOptions()
        return UsageWishes(
            final=bool(options.include_usage),
            continuous=bool(options.include_usage and options.continuous_usage_stats),
        )


_understood_decoder = msgspec.json.Decoder(Understood)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_chunk_decoder = msgspec.json.Decoder(Chunk)


def understand(body: bytes) -> Understood:
    """Reads a completion's body.

    Raises:
        MalformedBodyError: it is no JSON object.
        InvalidFieldError: a field has the wrong type, or `user` cannot be written down.
    """
    try:
        asked = _understood_decoder.decode(body)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        param = path.rstrip("`") or ("model" if "`model`" in message else None)
        if param == "model" and not path:
            message = "you must provide a model parameter"
        raise InvalidFieldError(message, param=param) from None
    except msgspec.DecodeError as error:
        raise MalformedBodyError(f"the body is not valid JSON: {error}") from None
    if asked.user is not None:
        storable(asked.user, "user")
    return asked


def engine_body(body: bytes, asked: Understood, base_model: str) -> bytes:
    """The body for the engine: the base model's name, and in a stream usage in every chunk."""
    fields = _fields_decoder.decode(body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(base_model))
    if asked.stream:
        options = msgspec.json.decode(
            fields.get("stream_options", b"null"), type=dict[str, Any] | None
        )
        fields["stream_options"] = msgspec.Raw(
            msgspec.json.encode(
                {**(options or {}), "include_usage": True, "continuous_usage_stats": True}
            )
        )
    return msgspec.json.encode(fields)


# ---- Completions -----------------------------------------------------------------------------------------------------


@post("/chat/completions", guards=[requires("infer")], status_code=200)
async def chat_completions(request: AnyRequest) -> ASGIResponse:
    """A chat completion, streamed or whole."""
    return await _complete(request, "/v1/chat/completions")


@post("/completions", guards=[requires("infer")], status_code=200)
async def completions(request: AnyRequest) -> ASGIResponse:
    """A text completion, streamed or whole."""
    return await _complete(request, "/v1/completions")


@post("/embeddings", guards=[requires("infer")], status_code=200)
async def embeddings(request: AnyRequest) -> Response[bytes]:  # noqa: ARG001 - refused unread
    """Not offered by any engine here."""
    raise NotSupportedError("embeddings are not supported")


async def _complete(request: AnyRequest, path: str) -> ASGIResponse:
    services = services_of(request)
    services.meter.admit()
    principal = principal_of(request)
    body = await request.body()
    asked = understand(body)
    target = await resolve_model(services, asked.model, principal.tenant_id)
    for_engine = engine_body(body, asked, target.base_model)

    async def ask(current: Target) -> Opened:
        return await services.upstream.open(
            path,
            for_engine,
            target=current,
            tenant_id=principal.tenant_id,
            request_id=context_of(request.scope).request_id,
            content_type=_JSON,
            model_name=asked.model,
        )

    target, opened = await unless_client_leaves(
        request.receive, ask_current(services, asked.model, principal.tenant_id, target, ask)
    )
    completion = Completion(asked, target)
    if asked.stream:
        return _stream(request, services, principal, completion, opened)
    return await _answer_whole(request, services, principal, completion, opened)


def _stream(
    request: AnyRequest,
    services: Services,
    principal: Principal,
    completion: Completion,
    opened: Opened,
) -> Relay:
    tally = UsageTally(choices_per_prompt=max(completion.asked.n or 1, 1))
    request_id = context_of(request.scope).request_id

    def event() -> UsageEvent | None:
        return usage_event(
            request_id=request_id,
            principal=principal,
            target=completion.target,
            context_length=opened.engine.context_length,
            quantities=tally.quantities(),
            user=completion.asked.user,
        )

    return Relay(
        opened,
        meter=services.meter,
        tally=tally,
        wishes=completion.wishes,
        event=event,
        headers={
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            POLICY_HEADER: completion.target.policy_version,
        },
    )


async def _answer_whole(
    request: AnyRequest,
    services: Services,
    principal: Principal,
    completion: Completion,
    opened: Opened,
) -> ASGIResponse:
    try:
        body = await unless_client_leaves(request.receive, opened.answer.read())
    except EngineLostError:
        raise UnavailableError("the engine was lost in the middle of the answer") from None
    finally:
        opened.close()
    tally = UsageTally()
    tally.finish(_chunk_decoder.decode(body).usage)
    await services.meter.record(
        usage_event(
            request_id=context_of(request.scope).request_id,
            principal=principal,
            target=completion.target,
            context_length=opened.engine.context_length,
            quantities=tally.quantities(),
            user=completion.asked.user,
        )
    )
    return ASGIResponse(
        body=body,
        media_type=_JSON,
        status_code=200,
        headers={POLICY_HEADER: completion.target.policy_version},
    )


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
