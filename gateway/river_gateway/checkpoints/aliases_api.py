"""The training API under `/river/v1`: aliases."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, delete, get, post, put

from river_client import wire
from river_gateway.checkpoints import aliases
from river_gateway.codec import WireRequest, reply
from river_gateway.services import services_of
from river_gateway.tenancy.audit import actor_of
from river_gateway.tenancy.auth import principal_of, requires

_EITHER = [requires("train", "infer")]


@get("/aliases", guards=_EITHER)
async def get_aliases(request: WireRequest) -> Response[wire.Page]:
    """The tenant's aliases, by name."""
    found = await aliases.list_all(services_of(request).pool, principal_of(request).tenant_id)
    return reply(request, wire.Page(aliases=found))


@get("/aliases/{name:str}", guards=_EITHER)
async def get_alias(request: WireRequest, name: str) -> Response[wire.Alias]:
    """What an alias points at."""
    alias = await aliases.get(
        services_of(request).pool, name=name, tenant_id=principal_of(request).tenant_id
    )
    return reply(request, alias)


@get("/aliases/{name:str}/history", guards=_EITHER)
async def get_alias_history(request: WireRequest, name: str) -> Response[wire.Page]:
    """What an alias has pointed at, newest first."""
    found = await aliases.history(
        services_of(request).pool, name=name, tenant_id=principal_of(request).tenant_id
    )
    return reply(request, wire.Page(aliases=found))


@put("/aliases/{name:str}", guards=[requires("train")])
async def put_alias(request: WireRequest, name: str, data: wire.PutAlias) -> Response[wire.Alias]:
    """Points a name at a base model, a checkpoint or a run's live version, or shares its requests among several."""
    alias = await aliases.point(
        services_of(request),
        tenant_id=principal_of(request).tenant_id,
        name=name,
        asked=data,
        by=actor_of(request),
    )
    return reply(request, alias)


@post("/aliases/{name:str}/rollback", guards=[requires("train")], status_code=HTTPStatus.OK)
async def roll_back_alias(
    request: WireRequest, name: str, version: int | None = None
) -> Response[wire.Alias]:
    """Points a name at what it pointed at before; again goes back one more.

    With `version`, that to be left, a request that is sent again goes back once only.
    """
    services, tenant_id = services_of(request), principal_of(request).tenant_id
    by = actor_of(request)
    alias = await aliases.roll_back(
        services, tenant_id=tenant_id, name=name, version=version, by=by
    )
    return reply(request, alias)


@delete("/aliases/{name:str}", guards=[requires("train")], status_code=HTTPStatus.NO_CONTENT)
async def delete_alias(request: WireRequest, name: str) -> None:
    """Removes an alias and its history; what it pointed at stays."""
    services, tenant_id = services_of(request), principal_of(request).tenant_id
    await aliases.delete(services, tenant_id=tenant_id, name=name, by=actor_of(request))


ALIAS_HANDLERS: list[Any] = [
    get_aliases,
    get_alias,
    get_alias_history,
    put_alias,
    roll_back_alias,
    delete_alias,
]
