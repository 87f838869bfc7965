"""The routes of a client's beginning: its configuration, what there is, and its session."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, get, post

from river_gateway.dialects.tinker import bodies
from river_gateway.dialects.tinker.errors import answer_to
from river_gateway.dialects.tinker.http import AnyRequest, identity_of, read, told
from river_gateway.errors import GoneError, InvalidFieldError, NotFoundError, NotSupportedError
from river_gateway.limits import TAG_MAX_CHARS
from river_gateway.services import services_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import session_list, sessions, validation

_SCOPES = requires("train", "infer")


@get("/healthz")
async def healthz() -> Response[bytes]:
    """Alive."""
    return Response(b'{"status":"ok"}', media_type="application/json")


@post("/client/config", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def client_config() -> Response[bytes]:
    """How clients are to behave, told once."""
    return told(bodies.ClientConfig())


@post("/client/dynamic_config", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def dynamic_config() -> Response[bytes]:
    """The same of what may change while they run."""
    return told(bodies.DynamicConfig())


@post("/auth/token", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def auth_token() -> Response[bytes]:
    """There are no tokens besides keys; `client/config` says so."""
    raise NotSupportedError("auth/token: this server takes API keys, and gives no tokens for them")


@get("/get_server_capabilities", guards=[_SCOPES])
async def get_server_capabilities(request: AnyRequest) -> Response[bytes]:
    """The base models, and what can be done with each."""
    services = services_of(request)
    names = sorted(services.engines.bases() | services.trainers.bases())
    models: list[bodies.SupportedModel] = []
    for name in names:
        engine, trainer = services.engines.last_of(name), services.trainers.last_of(name)
        lengths = [record.context_length for record in (engine, trainer) if record is not None]
        models.append(
            bodies.SupportedModel(
                model_name=name,
                max_context_length=min(lengths),
                trainable=trainer is not None,
                sampleable=engine is not None,
            )
        )
    return told(bodies.Capabilities(supported_models=models))


@post("/create_session", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def create_session(request: AnyRequest) -> Response[bytes]:
    """Opens a session; its client sends a heartbeat every ten seconds."""
    asked = await read(request, bodies.CreateSession)
    services, principal = services_of(request), principal_of(request)
    metadata = validation.tags(asked.user_metadata or {}, "user_metadata")
    project = asked.project_id and validation.name(asked.project_id, "project_id")
    if asked.display_name is not None and len(asked.display_name) > TAG_MAX_CHARS:
        raise InvalidFieldError(
            f"display_name: at most {TAG_MAX_CHARS} characters", param="display_name"
        )
    session_id = await sessions.open_session(
        services, principal, tags=_tags(asked), identity=identity_of(request)
    )
    await session_list.describe_session(
        services.pool,
        session_id=session_id,
        tenant_id=principal.tenant_id,
        display_name=asked.display_name,
        user_metadata=metadata,
        project_id=project or None,
    )
    return told(bodies.SessionCreated(session_id=session_id))


def _tags(asked: bodies.CreateSession) -> dict[str, str]:
    """A session's tags: those without a value have an empty one."""
    tags: dict[str, str] = {}
    for tag in asked.tags:
        name, _, value = tag.partition("=")
        if name:
            tags[name] = value
    return tags


@post("/session_heartbeat", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def session_heartbeat(request: AnyRequest) -> Response[bytes]:
    """Says that a session's client is alive; 410 tells it to stop, for its session has ended."""
    asked = await read(request, bodies.Heartbeat)
    try:
        await sessions.beat_session(services_of(request), principal_of(request), asked.session_id)
    except NotFoundError as error:
        return answer_to(GoneError(error.message))
    return told(bodies.Typed(type="session_heartbeat"))


@post("/telemetry", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def telemetry() -> Response[bytes]:
    """What clients tell of themselves is not kept: it may hold what users typed."""
    return Response(b'{"status":"accepted"}', media_type="application/json")


SESSION_HANDLERS: list[Any] = [
    healthz,
    client_config,
    dynamic_config,
    auth_token,
    get_server_capabilities,
    create_session,
    session_heartbeat,
    telemetry,
]
