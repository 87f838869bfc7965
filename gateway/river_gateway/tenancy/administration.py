"""What admins do to tenants and keys, from wherever they do it: done, written down, and told to all gateways."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from river_gateway.feedback import store
from river_gateway.tenancy import accounts, audit
from river_gateway.tenancy.messages import AccountChanged

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from river_client import feedback_wire, wire
    from river_client.audit_wire import AuditAction
    from river_gateway.services import Services
    from river_gateway.tenancy.audit import Actor

# ---- Tenants ---------------------------------------------------------------------------------------------------------


async def create_tenant(services: Services, by: Actor, asked: wire.CreateTenant) -> wire.Tenant:
    """A new tenant; raises as `accounts.create_tenant` does, and the others as theirs."""
    async with audit.recorded(services.pool, by, "tenants.create") as line:
        tenant = await accounts.create_tenant(line.connection, asked.name, asked.limits)
        line.about(tenant.tenant_id, tenant_id=tenant.tenant_id, details=asked)
    return tenant


async def change_tenant_limits(
    services: Services, by: Actor, tenant: str, change: wire.ChangeLimits
) -> wire.Tenant:
    """Changes limits over all keys of a tenant, with the next request."""
    async with audit.recorded(services.pool, by, "tenants.limits") as line:
        changed = await accounts.change_tenant_limits(line.connection, tenant, change)
        line.about(changed.tenant_id, tenant_id=changed.tenant_id, details=change)
    await accounts.announce(services, AccountChanged(tenant_id=changed.tenant_id))
    return changed


async def change_retention(
    services: Services, by: Actor, tenant: str, change: feedback_wire.ChangeRetention
) -> wire.Tenant:
    """Changes for how long a tenant's completions are kept, those that are there included; never for longer again."""
    async with audit.recorded(services.pool, by, "tenants.retention") as line:
        changed = await accounts.change_retention(line.connection, tenant, change)
        line.about(changed.tenant_id, tenant_id=changed.tenant_id, details=change)
    if change.completions_kept_s is not msgspec.UNSET:
        kept_s = change.completions_kept_s
        await store.shorten(
            services.pool,
            tenant_id=changed.tenant_id,
            kept_s=services.settings.completions_kept_s if kept_s is None else kept_s,
        )
    return changed


# ---- Keys ------------------------------------------------------------------------------------------------------------


async def create_key(services: Services, by: Actor, asked: wire.CreateKey) -> wire.ApiKey:
    """A new key; its secret is in this answer and nowhere else."""
    async with audit.recorded(services.pool, by, "keys.create") as line:
        key = await accounts.create_key(
            line.connection,
            tenant=asked.tenant,
            name=asked.name,
            scopes=asked.scopes,
            expires_at=asked.expires_at,
            limits=asked.limits,
        )
        line.about(key.key_id, tenant_id=key.tenant, details=_said(key))
    return key


async def revoke_key(services: Services, by: Actor, key_id: str) -> None:
    """Ends a key, at once on all gateways; on one that NATS does not reach within `KEY_CACHE_FRESH_S`."""
    async with _changing_key(services, by, "keys.revoke", key_id) as line:
        key = await accounts.revoke_key(line.connection, key_id)
        line.about(key_id, tenant_id=key.tenant, details={"name": key.name})


async def rotate_key(
    services: Services,
    by: Actor,
    key_id: str,
    asked: wire.RotateKey,
    *,
    identity: str | None = None,
) -> wire.ApiKey:
    """Gives a key a new secret, in this answer and nowhere else; the old one goes on for its grace period."""
    async with _changing_key(services, by, "keys.rotate", key_id) as line:
        key = await accounts.rotate_key(line.connection, key_id, asked.grace_s, identity=identity)
        line.about(key_id, tenant_id=key.tenant, details=asked)
    return key


async def change_key(
    services: Services, by: Actor, key_id: str, change: wire.ChangeKey
) -> wire.ApiKey:
    """Changes name, scopes and expiry of a key, with the next request."""
    async with _changing_key(services, by, "keys.change", key_id) as line:
        key = await accounts.change_key(line.connection, key_id, change)
        line.about(key_id, tenant_id=key.tenant, details=change)
    return key


async def change_key_limits(
    services: Services, by: Actor, key_id: str, change: wire.ChangeLimits
) -> wire.ApiKey:
    """Changes limits of a key, with the next request."""
    async with _changing_key(services, by, "keys.limits", key_id) as line:
        key = await accounts.change_key_limits(line.connection, key_id, change)
        line.about(key_id, tenant_id=key.tenant, details=change)
    return key


@asynccontextmanager
async def _changing_key(
    services: Services, by: Actor, action: AuditAction, key_id: str
) -> AsyncGenerator[audit.Line]:
    """The block that changes a key, recorded with it; all gateways are told once it is written."""
    async with audit.recorded(services.pool, by, action) as line:
        yield line
    await accounts.announce(services, AccountChanged(key_id=key_id))


def _said(key: wire.ApiKey) -> dict[str, object]:
    """What the log says of a new key: never its secret, and nothing that is longer than it is stored."""
    return {
        "name": key.name,
        "scopes": key.scopes,
        "expires_at": key.expires_at,
        "limits": key.limits,
    }
