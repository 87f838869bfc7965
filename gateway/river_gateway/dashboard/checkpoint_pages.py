"""Checkpoints and the aliases that point at them: look, promote, roll back, download, delete."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from litestar import Request, Response, get, post
from litestar.response import ServerSentEvent, Stream

from river_client import wire
from river_gateway.checkpoints import aliases
from river_gateway.checkpoints.catalog_api import file_answer
from river_gateway.checkpoints.files import list_files
from river_gateway.checkpoints.lifetime import set_ttl
from river_gateway.checkpoints.removal import remove_checkpoint
from river_gateway.context import context_of
from river_gateway.dashboard import checkpoints
from river_gateway.dashboard.pages import Page, follow, redirect, show
from river_gateway.dashboard.viewer import PATH, actor_of, checked_form, viewer_of
from river_gateway.errors import InvalidFieldError
from river_gateway.limits import CHECKPOINT_TTL_MAX_S
from river_gateway.services import services_of
from river_gateway.tenancy.auth import check_scopes

if TYPE_CHECKING:
    from river_gateway.dashboard.checkpoints import ShownCheckpoint
    from river_gateway.dashboard.viewer import Viewer

_LIST_PAGE = Page("checkpoints.html", {"checkpoints": "parts/checkpoints.html"})
_ONE_PAGE = Page("checkpoint.html", {"checkpoint": "parts/checkpoint.html"})
_LIST_PATH = f"{PATH}/checkpoints"
_ONE_PATH = f"{PATH}/checkpoint"
_MAY_CHANGE = ("train", "admin")
_DAY_S = 86_400


# ---- All of them -----------------------------------------------------------------------------------------------------


@get("/checkpoints", include_in_schema=False)
async def checkpoints_page(request: Request[Any, Any, Any]) -> Response[str]:
    """The list, newest first, with search, and the tenant's aliases."""
    viewer = await viewer_of(request)
    return show(_LIST_PAGE, request, viewer, await _read_list(request, viewer))


@get("/checkpoints/live", include_in_schema=False)
async def checkpoints_live(request: Request[Any, Any, Any]) -> ServerSentEvent:
    """Its changes."""
    viewer = await viewer_of(request)
    return follow(_LIST_PAGE, request, viewer, lambda: _read_list(request, viewer))


async def _read_list(request: Request[Any, Any, Any], viewer: Viewer) -> dict[str, Any]:
    asked = {
        name: request.query_params.get(name, "") for name in ("search", "tenant", "left", "before")
    }
    services, before = services_of(request), asked.pop("before")
    found = await checkpoints.list_checkpoints(
        services.pool,
        viewer.tenant_id,
        search=asked["search"],
        before=await checkpoints.find_checkpoint(services.pool, viewer.tenant_id, before)
        if before
        else None,
    )
    more = found[-1].path if len(found) == checkpoints.PAGE_CHECKPOINTS else None
    named = await aliases.list_all(services.pool, _aliases_of(viewer))
    engines = services.engines.alive()
    return {"checkpoints": found, "aliases": named, "engines": engines, "more": more, **asked}


def _aliases_of(viewer: Viewer) -> str:
    """Whose aliases are shown: those of the tenant that is looked at, else the viewer's own."""
    return viewer.tenant_id or viewer.principal.tenant_id


# ---- One -------------------------------------------------------------------------------------------------------------


@get("/checkpoint", include_in_schema=False)
async def checkpoint_page(request: Request[Any, Any, Any], path: str = "") -> Response[str]:
    """One checkpoint, with what can be done with it."""
    viewer = await viewer_of(request)
    values = await _read_one(request, viewer, path)
    found: ShownCheckpoint = values["checkpoint"]
    files = await list_files(found.location)
    days_max = CHECKPOINT_TTL_MAX_S // _DAY_S
    return show(_ONE_PAGE, request, viewer, {**values, "files": files, "days_max": days_max})


@get("/checkpoint/live", include_in_schema=False)
async def checkpoint_live(request: Request[Any, Any, Any], path: str = "") -> ServerSentEvent:
    """Its changes."""
    viewer = await viewer_of(request)
    await checkpoints.find_checkpoint(services_of(request).pool, viewer.tenant_id, path)
    return follow(_ONE_PAGE, request, viewer, lambda: _read_one(request, viewer, path))


@get("/checkpoint/file", include_in_schema=False)
async def download(request: Request[Any, Any, Any], path: str = "", name: str = "") -> Stream:
    """A file of it; a `Range` is honoured, so that a broken download goes on."""
    viewer = await viewer_of(request)
    pool = services_of(request).pool
    found = await checkpoints.find_checkpoint(pool, viewer.tenant_id, path)
    answer = await file_answer(found.location, name, request.headers.get("range"))
    answer.headers["content-disposition"] = f"attachment; filename*=UTF-8''{quote(name)}"
    return answer


async def _read_one(request: Request[Any, Any, Any], viewer: Viewer, path: str) -> dict[str, Any]:
    services = services_of(request)
    found = await checkpoints.find_checkpoint(services.pool, viewer.tenant_id, path)
    named = await aliases.list_all(services.pool, found.tenant_id)
    return {"checkpoint": found, "aliases": named, "engines": services.engines.alive()}


# ---- What is done with them ------------------------------------------------------------------------------------------


@post("/checkpoint/promote", include_in_schema=False, status_code=HTTPStatus.OK)
async def promote(request: Request[Any, Any, Any]) -> Response[Any]:
    """Points an alias of the checkpoint's tenant at it."""
    viewer, form = await checked_form(request)
    check_scopes(viewer.principal, _MAY_CHANGE)
    services, path = services_of(request), form.get("path", "")
    found = await checkpoints.find_checkpoint(services.pool, viewer.tenant_id, path)
    await aliases.point(
        services,
        tenant_id=found.tenant_id,
        name=form.get("alias", "").strip(),
        asked=wire.PutAlias(target=found.path),
        by=actor_of(request, viewer),
    )
    return redirect(f"{_ONE_PATH}?path={quote(found.path)}")


@post("/checkpoint/ttl", include_in_schema=False, status_code=HTTPStatus.OK)
async def keep(request: Request[Any, Any, Any]) -> Response[Any]:
    """Keeps a checkpoint for so many days from now on, or for ever."""
    viewer, form = await checked_form(request)
    check_scopes(viewer.principal, _MAY_CHANGE)
    services, path = services_of(request), form.get("path", "")
    found = await checkpoints.find_checkpoint(services.pool, viewer.tenant_id, path)
    await set_ttl(
        services,
        tenant_id=found.tenant_id,
        path=found.path,
        ttl_s=None if form.get("keep") == "forever" else _days_s(form.get("days", "")),
        by=actor_of(request, viewer),
    )
    return redirect(f"{_ONE_PATH}?path={quote(found.path)}")


def _days_s(text: str) -> int:
    """A form's days in seconds.

    Raises:
        InvalidFieldError: they are no number of days.
    """
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days <= CHECKPOINT_TTL_MAX_S / _DAY_S:
        raise InvalidFieldError(
            f"days: {text!r}, must be a number up to {CHECKPOINT_TTL_MAX_S // _DAY_S:,}",
            param="days",
        )
    return max(1, round(days * _DAY_S))


@post("/aliases/roll-back", include_in_schema=False, status_code=HTTPStatus.OK)
async def roll_back(request: Request[Any, Any, Any]) -> Response[Any]:
    """Points an alias at what it pointed at before the version that the page showed."""
    viewer, form = await checked_form(request)
    check_scopes(viewer.principal, _MAY_CHANGE)
    version = form.get("version", "")
    if not version.isdecimal():
        raise InvalidFieldError(f"version: {version!r} is no version", param="version")
    await aliases.roll_back(
        services_of(request),
        tenant_id=_tenant_named(viewer, form),
        name=form.get("alias", ""),
        version=int(version),
        by=actor_of(request, viewer),
    )
    return redirect(_LIST_PATH)


@post("/checkpoint/delete", include_in_schema=False, status_code=HTTPStatus.OK)
async def delete(request: Request[Any, Any, Any]) -> Response[Any]:
    """Deletes a checkpoint whose name was typed to confirm it."""
    viewer, form = await checked_form(request)
    check_scopes(viewer.principal, _MAY_CHANGE)
    services, path = services_of(request), form.get("path", "")
    found = await checkpoints.find_checkpoint(services.pool, viewer.tenant_id, path)
    if form.get("confirmation", "").strip() != found.name:
        raise InvalidFieldError(
            f"confirmation: type {found.name!r} to delete this checkpoint", param="confirmation"
        )
    await remove_checkpoint(
        services,
        path=found.path,
        tenant_id=found.tenant_id,
        log_ids=context_of(request.scope).log_ids(),
        by=actor_of(request, viewer),
    )
    return redirect(_LIST_PATH)


def _tenant_named(viewer: Viewer, form: dict[str, str]) -> str:
    """The tenant that a form is about; only an admin's may name another."""
    own = viewer.principal.tenant_id
    return form.get("tenant", own) if viewer.is_admin else own


CHECKPOINT_HANDLERS: list[Any] = [
    checkpoints_page,
    checkpoints_live,
    checkpoint_page,
    checkpoint_live,
    download,
    promote,
    keep,
    roll_back,
    delete,
]
