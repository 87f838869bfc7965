"""The training API under `/river/v1` for the scope `admin`: tenants and keys."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, delete, get, patch, post

from river_client import feedback_wire, wire
from river_gateway.codec import WireRequest, idempotency_key, reply
from river_gateway.services import services_of
from river_gateway.tenancy import accounts, administration
from river_gateway.tenancy.audit import actor_of
from river_gateway.tenancy.auth import requires

_ADMIN = [requires("admin")]


@post("/tenants", guards=_ADMIN, status_code=HTTPStatus.CREATED)
async def create_tenant(request: WireRequest, data: wire.CreateTenant) -> Response[wire.Tenant]:
    """A new tenant."""
    tenant = await administration.create_tenant(services_of(request), actor_of(request), data)
    return reply(request, tenant, status=HTTPStatus.CREATED)


@get("/tenants", guards=_ADMIN)
async def get_tenants(request: WireRequest) -> Response[wire.Page]:
    """All tenants, oldest first."""
    tenants = await accounts.list_tenants(services_of(request).pool)
    return reply(request, wire.Page(tenants=tenants))


@post("/keys", guards=_ADMIN, status_code=HTTPStatus.CREATED)
async def create_key(request: WireRequest, data: wire.CreateKey) -> Response[wire.ApiKey]:
    """A new key; its secret is in this answer and nowhere else."""
    key = await administration.create_key(services_of(request), actor_of(request), data)
    return reply(request, key, status=HTTPStatus.CREATED)


@get("/keys", guards=_ADMIN)
async def get_keys(request: WireRequest, tenant: str | None = None) -> Response[wire.Page]:
    """The keys of one tenant or of all, without their secrets."""
    keys = await accounts.list_keys(services_of(request).pool, tenant)
    return reply(request, wire.Page(keys=keys))


@delete("/keys/{key_id:str}", guards=_ADMIN, status_code=HTTPStatus.NO_CONTENT)
async def revoke_key(request: WireRequest, key_id: str) -> None:
    """Ends a key, at once on all gateways; on one that NATS does not reach within `KEY_CACHE_FRESH_S`."""
    await administration.revoke_key(services_of(request), actor_of(request), key_id)


@patch("/keys/{key_id:str}", guards=_ADMIN)
async def change_key(
    request: WireRequest, key_id: str, data: wire.ChangeKey
) -> Response[wire.ApiKey]:
    """Changes name, scopes and expiry of a key, those that are given, with the next request; null ends an expiry."""
    key = await administration.change_key(services_of(request), actor_of(request), key_id, data)
    return reply(request, key)


@post("/keys/{key_id:str}/rotate", guards=_ADMIN, status_code=HTTPStatus.OK)
async def rotate_key(
    request: WireRequest, key_id: str, data: wire.RotateKey
) -> Response[wire.ApiKey]:
    """Gives a key a new secret, in this answer and nowhere else; for `grace_s` the old one goes on beside it."""
    key = await administration.rotate_key(
        services_of(request),
        actor_of(request),
        key_id,
        data,
        identity=idempotency_key(request),
    )
    return reply(request, key)


@patch("/keys/{key_id:str}/limits", guards=_ADMIN)
async def change_key_limits(
    request: WireRequest, key_id: str, data: wire.ChangeLimits
) -> Response[wire.ApiKey]:
    """Changes the limits of a key that are given, with the next request; null ends one."""
    services, by = services_of(request), actor_of(request)
    return reply(request, await administration.change_key_limits(services, by, key_id, data))


@patch("/tenants/{tenant:str}/limits", guards=_ADMIN)
async def change_tenant_limits(
    request: WireRequest, tenant: str, data: wire.ChangeLimits
) -> Response[wire.Tenant]:
    """Changes the limits of a tenant, over all its keys, that are given; null ends one."""
    services, by = services_of(request), actor_of(request)
    return reply(request, await administration.change_tenant_limits(services, by, tenant, data))


@patch("/tenants/{tenant:str}/retention", guards=_ADMIN)
async def change_retention(
    request: WireRequest, tenant: str, data: feedback_wire.ChangeRetention
) -> Response[wire.Tenant]:
    """Changes for how long a tenant's completions are kept, those that are there included; never for longer again."""
    services, by = services_of(request), actor_of(request)
    return reply(request, await administration.change_retention(services, by, tenant, data))


ADMIN_HANDLERS: list[Any] = [
    create_tenant,
    get_tenants,
    change_tenant_limits,
    change_retention,
    create_key,
    get_keys,
    revoke_key,
    change_key,
    rotate_key,
    change_key_limits,
]
