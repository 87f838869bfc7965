"""One key, and one tenant: what they may do and use, changed in the browser by the API's own rules; keys rotated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litestar import Request, Response, get, post

from river_billing.budgets import list_budgets
from river_client.credit_wire import SetBudget
from river_client.feedback_wire import ChangeRetention
from river_client.wire import ChangeKey, ChangeLimits, RotateKey
from river_gateway.dashboard.forms import Typed, moment_typed, nano_usd, whole_number
from river_gateway.dashboard.pages import Page, redirect, show
from river_gateway.dashboard.viewer import PATH, actor_of, admin_form, admin_of
from river_gateway.errors import InvalidFieldError
from river_gateway.ids import uuid7
from river_gateway.limits import IDEMPOTENCY_KEY_MAX_CHARS
from river_gateway.services import services_of
from river_gateway.tenancy import accounts, administration, money
from river_gateway.tenancy.auth import SCOPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from river_client.credit_wire import Budget
    from river_gateway.dashboard.viewer import Viewer

_KEY_PAGE = Page("key.html")
_TENANT_PAGE = Page("tenant.html")
_SECONDS_PER_DAY = 86_400
GRACES = (
    (0, "no time: it ends at once"),
    (3_600, "1 hour"),
    (86_400, "1 day"),
    (3 * 86_400, "3 days"),
    (7 * 86_400, "7 days"),
)


# ---- A key -----------------------------------------------------------------------------------------------------------


@get("/keys/{key_id:str}", include_in_schema=False)
async def key_page(request: Request[Any, Any, Any], key_id: str) -> Response[str]:
    """What a key may do and use, and when it was last used."""
    return await _show_key(request, await admin_of(request), key_id)


@post("/keys/change", include_in_schema=False, status_code=200)
async def change_key(request: Request[Any, Any, Any]) -> Response[Any]:
    """Changes name, scopes and expiry."""
    viewer, form = await admin_form(request)
    scopes = [str(scope) for scope in (await request.form()).getall("scopes", [])]
    key_id, by = form.get("key_id", ""), actor_of(request, viewer)
    change = ChangeKey(
        name=form.get("name", "").strip(),
        scopes=scopes,
        expires_at=moment_typed(form.get("expires_at", "")),
    )
    try:
        await administration.change_key(services_of(request), by, key_id, change)
    except InvalidFieldError as error:
        return await _show_key(request, viewer, key_id, Typed(form, error))
    return redirect(f"{PATH}/keys/{key_id}")


@post("/keys/limits", include_in_schema=False, status_code=200)
async def change_key_limits(request: Request[Any, Any, Any]) -> Response[Any]:
    """Changes what the key may use; an empty field is no limit."""
    viewer, form = await admin_form(request)
    key_id, by = form.get("key_id", ""), actor_of(request, viewer)
    try:
        change = _limits_typed(form)
        await administration.change_key_limits(services_of(request), by, key_id, change)
    except InvalidFieldError as error:
        return await _show_key(request, viewer, key_id, Typed(form, error))
    return redirect(f"{PATH}/keys/{key_id}")


@post("/keys/rotate", include_in_schema=False, status_code=200)
async def rotate_key(request: Request[Any, Any, Any]) -> Response[Any]:
    """Gives the key a new secret; the page that answers is the only one that ever shows it."""
    viewer, form = await admin_form(request)
    key_id, by = form.get("key_id", ""), actor_of(request, viewer)
    try:
        grace_s = whole_number(form.get("grace_s", ""), "grace_s") or 0
        asked = RotateKey(grace_s=grace_s)
        # The form again, by a second click or a reload, is the same rotation: what is in use goes on.
        identity = form.get("identity", "")[:IDEMPOTENCY_KEY_MAX_CHARS] or None
        made = await administration.rotate_key(
            services_of(request), by, key_id, asked, identity=identity
        )
    except InvalidFieldError as error:
        return await _show_key(request, viewer, key_id, Typed(form, error))
    return await _show_key(request, viewer, key_id, secret=made.secret)


async def _show_key(
    request: Request[Any, Any, Any],
    viewer: Viewer,
    key_id: str,
    typed: Typed | None = None,
    *,
    secret: str | None = None,
) -> Response[str]:
    pool = services_of(request).pool
    key = await accounts.get_key(pool, key_id)
    values = {
        "key": key,
        "tenant": await accounts.get_tenant(pool, key.tenant),
        "budget": await _budget(request, key.tenant, key_id),
        "typed": typed or Typed(),
        "scopes": SCOPES,
        "graces": GRACES,
        "secret": secret,
        "identity": uuid7(),
        "is_own": key_id == viewer.principal.key_id,
    }
    refused = typed is not None and typed.error is not None
    return show(_KEY_PAGE, request, viewer, values, status=422 if refused else 200)


# ---- A tenant --------------------------------------------------------------------------------------------------------


@get("/tenants/{tenant_id:str}", include_in_schema=False)
async def tenant_page(request: Request[Any, Any, Any], tenant_id: str) -> Response[str]:
    """What a tenant may use over all its keys, and those keys."""
    return await _show_tenant(request, await admin_of(request), tenant_id)


@post("/tenants/limits", include_in_schema=False, status_code=200)
async def change_tenant_limits(request: Request[Any, Any, Any]) -> Response[Any]:
    """Changes what the tenant may use over all its keys; an empty field is no limit."""
    viewer, form = await admin_form(request)
    tenant_id, by = form.get("tenant_id", ""), actor_of(request, viewer)
    try:
        change = _limits_typed(form)
        tenant = await administration.change_tenant_limits(
            services_of(request), by, tenant_id, change
        )
    except InvalidFieldError as error:
        return await _show_tenant(request, viewer, tenant_id, Typed(form, error))
    return redirect(f"{PATH}/tenants/{tenant.tenant_id}")


@post("/tenants/retention", include_in_schema=False, status_code=200)
async def change_retention(request: Request[Any, Any, Any]) -> Response[Any]:
    """Changes for how many days the tenant's stored completions are kept; empty is the server's own time."""
    viewer, form = await admin_form(request)
    tenant_id, by = form.get("tenant_id", ""), actor_of(request, viewer)
    try:
        days = whole_number(form.get("completions_kept_s", ""), "completions_kept_s")
        change = ChangeRetention(
            completions_kept_s=None if days is None else days * _SECONDS_PER_DAY
        )
        tenant = await administration.change_retention(services_of(request), by, tenant_id, change)
    except InvalidFieldError as error:
        return await _show_tenant(request, viewer, tenant_id, Typed(form, error))
    return redirect(f"{PATH}/tenants/{tenant.tenant_id}")


async def _show_tenant(
    request: Request[Any, Any, Any], viewer: Viewer, tenant_id: str, typed: Typed | None = None
) -> Response[str]:
    pool = services_of(request).pool
    tenant = await accounts.get_tenant(pool, tenant_id)
    kept_s = tenant.completions_kept_s
    values = {
        "tenant": tenant,
        "keys": await accounts.list_keys(pool, tenant.tenant_id),
        "budget": await _budget(request, tenant.tenant_id, None),
        "kept_days": None if kept_s is None else f"{kept_s / _SECONDS_PER_DAY:g}",
        "typed": typed or Typed(),
    }
    refused = typed is not None and typed.error is not None
    return show(_TENANT_PAGE, request, viewer, values, status=422 if refused else 200)


# ---- Both ------------------------------------------------------------------------------------------------------------


@post("/budgets", include_in_schema=False, status_code=200)
async def set_budget(request: Request[Any, Any, Any]) -> Response[Any]:
    """Sets the monthly budget of a key or a tenant; an empty field removes it."""
    viewer, form = await admin_form(request)
    key_id, tenant_id = form.get("key_id"), form.get("tenant_id")
    try:
        amount = nano_usd(form.get("monthly_budget_nano_usd", ""), "monthly_budget_nano_usd")
        asked = SetBudget(
            tenant=None if key_id else tenant_id, key_id=key_id, monthly_budget_nano_usd=amount
        )
        owner = await money.set_budget(services_of(request), actor_of(request, viewer), asked)
    except InvalidFieldError as error:
        if key_id:
            return await _show_key(request, viewer, key_id, Typed(form, error))
        return await _show_tenant(request, viewer, tenant_id or "", Typed(form, error))
    return redirect(f"{PATH}/keys/{key_id}" if key_id else f"{PATH}/tenants/{owner}")


async def _budget(
    request: Request[Any, Any, Any], tenant_id: str, key_id: str | None
) -> Budget | None:
    async with services_of(request).pool.acquire() as connection:
        found = await list_budgets(connection, tenant_id)
    return next((budget for budget in found if budget.key_id == key_id), None)


def _limits_typed(form: Mapping[str, str]) -> ChangeLimits:
    names = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
    return ChangeLimits(**{name: whole_number(form.get(name, ""), name) for name in names})


KEY_PAGES: list[Any] = [
    key_page,
    change_key,
    change_key_limits,
    rotate_key,
    tenant_page,
    change_tenant_limits,
    change_retention,
    set_budget,
]
