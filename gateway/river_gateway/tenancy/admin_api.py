"""The training API under `/river/v1` for the scope `admin`: tenants and keys."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Response, delete, get, patch, post

from river_client import feedback_wire, wire
from river_gateway.codec import WireRequest, reply
from river_gateway.feedback import store
from river_gateway.services import services_of
from river_gateway.tenancy import accounts
from river_gateway.tenancy.auth import requires
from river_gateway.tenancy.messages import AccountChanged

_ADMIN = [requires("admin")]


@post("/tenants", guards=_ADMIN, status_code=HTTPStatus.CREATED)
async def create_tenant(request: WireRequest, data: wire.CreateTenant) -> Response[wire.Tenant]:
    """A new tenant."""
    tenant = await accounts.create_tenant(services_of(request).pool, data.name, data.limits)
    return reply(request, tenant, status=HTTPStatus.CREATED)


@get("/tenants", guards=_ADMIN)
async def get_tenants(request: WireRequest) -> Response[wire.Page]:
    """All tenants, oldest first."""
    tenants = await accounts.list_tenants(services_of(request).pool)
    return reply(request, wire.Page(tenants=tenants))


@post("/keys", guards=_ADMIN, status_code=HTTPStatus.CREATED)
async def create_key(request: WireRequest, data: wire.CreateKey) -> Response[wire.ApiKey]:
    """A new key; its secret is in this answer and nowhere else."""
    key = await accounts.create_key(
        services_of(request).pool,
        tenant=data.tenant,
        name=data.name,
        scopes=data.scopes,
        expires_at=data.expires_at,
        limits=data.limits,
    )
    return reply(request, key, status=HTTPStatus.CREATED)


@get("/keys", guards=_ADMIN)
async def get_keys(request: WireRequest, tenant: str | None = None) -> Response[wire.Page]:
    """The keys of one tenant or of all, without their secrets."""
    keys = await accounts.list_keys(services_of(request).pool, tenant)
    return reply(request, wire.Page(keys=keys))


@delete("/keys/{key_id:str}", guards=_ADMIN, status_code=HTTPStatus.NO_CONTENT)
async def revoke_key(request: WireRequest, key_id: str) -> None:
    """Ends a key, at once on all gateways; on one that NATS does not reach within `KEY_CACHE_FRESH_S`."""
    services = services_of(request)
    await accounts.announce(services, await accounts.revoke_key(services.pool, key_id))


@patch("/keys/{key_id:str}/limits", guards=_ADMIN)
async def change_key_limits(
    request: WireRequest, key_id: str, data: wire.ChangeLimits
) -> Response[wire.ApiKey]:
    """Changes the limits of a key that are given, with the next request; null ends one."""
    services = services_of(request)
    key = await accounts.change_key_limits(services.pool, key_id, data)
    await accounts.announce(services, AccountChanged(key_id=key.key_id))
    return reply(request, key)


@patch("/tenants/{tenant:str}/limits", guards=_ADMIN)
async def change_tenant_limits(
    request: WireRequest, tenant: str, data: wire.ChangeLimits
) -> Response[wire.Tenant]:
    """Changes the limits of a tenant, over all its keys, that are given; null ends one."""
    services = services_of(request)
    changed = await accounts.change_tenant_limits(services.pool, tenant, data)
    await accounts.announce(services, AccountChanged(tenant_id=changed.tenant_id))
    return reply(request, changed)


@patch("/tenants/{tenant:str}/retention", guards=_ADMIN)
async def change_retention(
    request: WireRequest, tenant: str, data: feedback_wire.ChangeRetention
) -> Response[wire.Tenant]:
    """Changes for how long a tenant's completions are kept, those that are there included; never for longer again."""
    services = services_of(request)
    changed = await accounts.change_retention(services.pool, tenant, data)
    if data.completions_kept_s is not msgspec.UNSET:
        kept_s = data.completions_kept_s
        await store.shorten(
            services.pool,
            tenant_id=changed.tenant_id,
            kept_s=services.settings.completions_kept_s if kept_s is None else kept_s,
        )
    return reply(request, changed)


ADMIN_HANDLERS: list[Any] = [
    create_tenant,
    get_tenants,
    change_tenant_limits,
    change_retention,
    create_key,
    get_keys,
    revoke_key,
    change_key_limits,
]
