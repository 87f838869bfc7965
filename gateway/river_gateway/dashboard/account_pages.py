"""Tenants and keys, for admins: made, shown once, revoked."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from litestar import Request, Response, get, post

from river_client import wire
from river_gateway.dashboard.forms import Typed, moment_typed
from river_gateway.dashboard.pages import Page, redirect, show
from river_gateway.dashboard.viewer import PATH, actor_of, admin_form, admin_of
from river_gateway.errors import ConflictError, InvalidFieldError
from river_gateway.services import services_of
from river_gateway.tenancy import accounts, administration
from river_gateway.tenancy.auth import SCOPES

if TYPE_CHECKING:
    from river_gateway.dashboard.viewer import Viewer

_KEYS_PAGE = Page("keys.html")
_KEYS_PATH = f"{PATH}/keys"


# ---- Keys and tenants ------------------------------------------------------------------------------------------------


@get("/keys", include_in_schema=False)
async def keys_page(request: Request[Any, Any, Any]) -> Response[str]:
    """All tenants and keys."""
    return await _show_keys(request, await admin_of(request))


@post("/keys", include_in_schema=False, status_code=HTTPStatus.CREATED)
async def create_key(request: Request[Any, Any, Any]) -> Response[str]:
    """Makes a key; the page that answers is the only one that ever shows it."""
    viewer, form = await admin_form(request)
    fields = await request.form()
    asked = wire.CreateKey(
        tenant=form.get("tenant", ""),
        name=form.get("name", ""),
        scopes=[str(scope) for scope in fields.getall("scopes", [])],
        expires_at=moment_typed(form.get("expires_at", "")),
    )
    by = actor_of(request, viewer)
    try:
        made = await administration.create_key(services_of(request), by, asked)
    except InvalidFieldError as error:
        return await _show_keys(request, viewer, key=Typed(form, error))
    return await _show_keys(request, viewer, made=made, status=HTTPStatus.CREATED)


@post("/keys/revoke", include_in_schema=False, status_code=HTTPStatus.OK)
async def revoke_key(request: Request[Any, Any, Any]) -> Response[Any]:
    """Ends a key, at once on every gateway."""
    viewer, form = await admin_form(request)
    by = actor_of(request, viewer)
    await administration.revoke_key(services_of(request), by, form.get("key_id", ""))
    return redirect(_KEYS_PATH)


@post("/tenants", include_in_schema=False, status_code=HTTPStatus.OK)
async def create_tenant(request: Request[Any, Any, Any]) -> Response[Any]:
    """Makes a tenant."""
    viewer, form = await admin_form(request)
    asked = wire.CreateTenant(name=form.get("name", "").strip())
    try:
        await administration.create_tenant(services_of(request), actor_of(request, viewer), asked)
    except (InvalidFieldError, ConflictError) as error:
        return await _show_keys(request, viewer, tenant=Typed(form, error))
    return redirect(_KEYS_PATH)


async def _show_keys(
    request: Request[Any, Any, Any],
    viewer: Viewer,
    *,
    made: wire.ApiKey | None = None,
    key: Typed | None = None,
    tenant: Typed | None = None,
    status: int = HTTPStatus.OK,
) -> Response[str]:
    if key is not None or tenant is not None:
        status = HTTPStatus.UNPROCESSABLE_ENTITY
    pool = services_of(request).pool
    tenants = await accounts.list_tenants(pool)
    names = {tenant.tenant_id: tenant.name for tenant in tenants}
    keys = await accounts.list_keys(pool, viewer.tenant_id)
    values = {
        "tenants": tenants,
        "names": names,
        "keys": keys,
        "scopes": SCOPES,
        "made": made,
        "new_key": key or Typed(),
        "new_tenant": tenant or Typed(),
        "own_key": viewer.principal.key_id,
    }
    return show(_KEYS_PAGE, request, viewer, values, status=status)


ACCOUNT_HANDLERS: list[Any] = [
    keys_page,
    create_key,
    revoke_key,
    create_tenant,
]
