"""The training API under `/river/v1` for the scope `admin`: tenants and keys."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, delete, get, post

from river_client import wire
from river_gateway.codec import WireRequest, reply
from river_gateway.services import services_of
from river_gateway.tenancy import auth
from river_gateway.tenancy.auth import requires

_ADMIN = [requires("admin")]


@post("/tenants", guards=_ADMIN, status_code=HTTPStatus.CREATED)
async def create_tenant(request: WireRequest, data: wire.CreateTenant) -> Response[wire.Tenant]:
    """A new tenant."""
    tenant = await auth.create_tenant(services_of(request).pool, data.name)
    return reply(request, tenant, status=HTTPStatus.CREATED)


@get("/tenants", guards=_ADMIN)
async def get_tenants(request: WireRequest) -> Response[wire.Page]:
    """All tenants, oldest first."""
    tenants = await auth.list_tenants(services_of(request).pool)
    return reply(request, wire.Page(tenants=tenants))


@post("/keys", guards=_ADMIN, status_code=HTTPStatus.CREATED)
async def create_key(request: WireRequest, data: wire.CreateKey) -> Response[wire.ApiKey]:
    """A new key; its secret is in this answer and nowhere else."""
    key = await auth.create_key(
        services_of(request).pool,
        tenant=data.tenant,
        name=data.name,
        scopes=data.scopes,
        expires_at=data.expires_at,
    )
    return reply(request, key, status=HTTPStatus.CREATED)


@get("/keys", guards=_ADMIN)
async def get_keys(request: WireRequest, tenant: str | None = None) -> Response[wire.Page]:
    """The keys of one tenant or of all, without their secrets."""
    keys = await auth.list_keys(services_of(request).pool, tenant)
    return reply(request, wire.Page(keys=keys))


@delete("/keys/{key_id:str}", guards=_ADMIN, status_code=HTTPStatus.NO_CONTENT)
async def revoke_key(request: WireRequest, key_id: str) -> None:
    """Ends a key: at once here, within `KEY_CACHE_FRESH_S` on other gateways."""
    services = services_of(request)
    services.keys.forget(await auth.revoke_key(services.pool, key_id))


ADMIN_HANDLERS: list[Any] = [create_tenant, get_tenants, create_key, get_keys, revoke_key]
