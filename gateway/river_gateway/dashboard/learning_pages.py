"""Runs that learn from the feedback on a model name: how far they have come, started and stopped."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from litestar import Request, Response, get, post
from litestar.response import ServerSentEvent

from river_client.learning_wire import StartLearning
from river_client.wire import AdamParams
from river_gateway.checkpoints import aliases
from river_gateway.dashboard import learnings, runs
from river_gateway.dashboard.pages import Page, follow, redirect, show
from river_gateway.dashboard.viewer import PATH, actor_of, checked_form, viewer_of
from river_gateway.errors import InvalidFieldError
from river_gateway.feedback.starting import start_learning, stop_learning
from river_gateway.services import services_of
from river_gateway.tenancy.auth import check_scopes

if TYPE_CHECKING:
    from river_gateway.dashboard.viewer import Viewer

_PAGE = Page("learning.html", {"learning": "parts/learning.html"})
_PATH = f"{PATH}/learning"
_MAY_CHANGE = ("train", "admin")


@get("/learning", include_in_schema=False)
async def learning_page(request: Request[Any, Any, Any]) -> Response[str]:
    """All of them, those that go on first, and a form to start one."""
    viewer = await viewer_of(request)
    pool, own = services_of(request).pool, viewer.principal.tenant_id
    opened = [run for run in await runs.list_runs(pool, own) if run.lost is None]
    values = {"runs": opened, "aliases": await aliases.list_all(pool, own)}
    return show(_PAGE, request, viewer, values | await _read(request, viewer))


@get("/learning/live", include_in_schema=False)
async def learning_live(request: Request[Any, Any, Any]) -> ServerSentEvent:
    """Their changes."""
    viewer = await viewer_of(request)
    return follow(_PAGE, request, viewer, lambda: _read(request, viewer))


async def _read(request: Request[Any, Any, Any], viewer: Viewer) -> dict[str, Any]:
    found = await learnings.list_learnings(services_of(request).pool, viewer.tenant_id)
    return {"learnings": found}


@post("/learning/start", include_in_schema=False, status_code=HTTPStatus.OK)
async def start(request: Request[Any, Any, Any]) -> Response[Any]:
    """Tells a run of the viewer's own tenant to learn."""
    viewer, form = await checked_form(request)
    check_scopes(viewer.principal, _MAY_CHANGE)
    settings = StartLearning(
        alias=form.get("alias", "").strip(),
        adam=AdamParams(lr=_number(form, "lr", float)),
        min_batch=_number(form, "min_batch", int),
        max_batch=_number(form, "max_batch", int),
        publish="live" if form.get("publish") else "none",
    )
    await start_learning(
        services_of(request),
        run_id=form.get("run_id", ""),
        tenant_id=viewer.principal.tenant_id,
        key_id=viewer.principal.key_id,
        settings=settings,
        by=actor_of(request, viewer),
    )
    return redirect(_PATH)


@post("/learning/again", include_in_schema=False, status_code=HTTPStatus.OK)
async def start_again(request: Request[Any, Any, Any]) -> Response[Any]:
    """Tells a run that has stopped to go on as it did, in the name of its tenant's key."""
    viewer, form = await checked_form(request)
    check_scopes(viewer.principal, _MAY_CHANGE)
    services = services_of(request)
    found = await learnings.find_learning(services.pool, viewer.tenant_id, form.get("run_id", ""))
    principal = viewer.principal
    await start_learning(
        services,
        run_id=found.state.run_id,
        tenant_id=found.tenant_id,
        key_id=principal.key_id if principal.tenant_id == found.tenant_id else found.key_id,
        settings=found.state.settings,
        by=actor_of(request, viewer),
    )
    return redirect(_PATH)


@post("/learning/stop", include_in_schema=False, status_code=HTTPStatus.OK)
async def stop(request: Request[Any, Any, Any]) -> Response[Any]:
    """Ends it, once the batch at hand has been applied."""
    viewer, form = await checked_form(request)
    check_scopes(viewer.principal, _MAY_CHANGE)
    services = services_of(request)
    found = await learnings.find_learning(services.pool, viewer.tenant_id, form.get("run_id", ""))
    await stop_learning(
        services,
        run_id=found.state.run_id,
        tenant_id=found.tenant_id,
        by=actor_of(request, viewer),
    )
    return redirect(_PATH)


def _number(form: dict[str, str], field: str, kind: type[Any]) -> Any:
    """A field of a form as a number.

    Raises:
        InvalidFieldError: it is none.
    """
    text = form.get(field, "")
    try:
        return kind(text)
    except ValueError:
        raise InvalidFieldError(f"{field}: {text!r} is no number", param=field) from None


LEARNING_PAGE_HANDLERS: list[Any] = [learning_page, learning_live, start, start_again, stop]
