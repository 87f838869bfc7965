"""Engines and trainers: how each is, live, and telling it to drain or to start again. For admins."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from litestar import Request, Response, get, post
from litestar.response import ServerSentEvent

from river_gateway.dashboard.pages import Page, follow, redirect, show
from river_gateway.dashboard.viewer import PATH, actor_of, admin_form, admin_of
from river_gateway.errors import InvalidFieldError
from river_gateway.health import machines
from river_gateway.services import services_of

if TYPE_CHECKING:
    from river_client.machine_wire import MachineAction
    from river_gateway.services import Services

_LIST_PAGE = Page("machines.html", {"machines": "parts/machines.html"})
_ENGINE_PAGE = Page("engine.html", {"engine": "parts/engine.html"})
_TRAINER_PAGE = Page("trainer.html", {"trainer": "parts/trainer.html"})
_PATH = f"{PATH}/machines"
_CONFIRMED = "restart"
"""Whoever asks for it has typed what it is done to."""


@get("/machines", include_in_schema=False)
async def machines_page(request: Request[Any, Any, Any]) -> Response[str]:
    """Every engine and trainer that is alive."""
    viewer = await admin_of(request)
    return show(_LIST_PAGE, request, viewer, _read(services_of(request)))


@get("/machines/live", include_in_schema=False)
async def machines_live(request: Request[Any, Any, Any]) -> ServerSentEvent:
    """Their changes."""
    viewer = await admin_of(request)

    async def read() -> dict[str, Any]:
        return _read(services_of(request))

    return follow(_LIST_PAGE, request, viewer, read)


def _read(services: Services) -> dict[str, Any]:
    return {
        "engines": machines.list_engines(services),
        "trainers": machines.list_trainers(services),
    }


# ---- One engine ------------------------------------------------------------------------------------------------------


@get("/machines/engines/{engine_id:str}", include_in_schema=False)
async def engine_page(request: Request[Any, Any, Any], engine_id: str) -> Response[str]:
    """An engine."""
    viewer = await admin_of(request)
    engine = machines.find_engine(services_of(request), engine_id)
    return show(_ENGINE_PAGE, request, viewer, {"engine": engine})


@get("/machines/engines/{engine_id:str}/live", include_in_schema=False)
async def engine_live(request: Request[Any, Any, Any], engine_id: str) -> ServerSentEvent:
    """Its changes; while it is away, what is shown stays."""
    viewer = await admin_of(request)

    async def read() -> dict[str, Any]:
        return {"engine": machines.find_engine(services_of(request), engine_id)}

    return follow(_ENGINE_PAGE, request, viewer, read)


@post("/machines/engines/{engine_id:str}", include_in_schema=False, status_code=HTTPStatus.OK)
async def tell_engine(request: Request[Any, Any, Any], engine_id: str) -> Response[Any]:
    """Tells it what to do."""
    viewer, form = await admin_form(request)
    action = _confirmed(form, engine_id)
    by = actor_of(request, viewer)
    await machines.tell_engine(services_of(request), by, engine_id, action)
    return redirect(_PATH if action == _CONFIRMED else f"{_PATH}/engines/{engine_id}")


# ---- One trainer -----------------------------------------------------------------------------------------------------


@get("/machines/trainers/{trainer_id:str}", include_in_schema=False)
async def trainer_page(request: Request[Any, Any, Any], trainer_id: str) -> Response[str]:
    """A trainer."""
    viewer = await admin_of(request)
    trainer = machines.find_trainer(services_of(request), trainer_id)
    return show(_TRAINER_PAGE, request, viewer, {"trainer": trainer})


@get("/machines/trainers/{trainer_id:str}/live", include_in_schema=False)
async def trainer_live(request: Request[Any, Any, Any], trainer_id: str) -> ServerSentEvent:
    """Its changes; when it has gone, what is shown stays."""
    viewer = await admin_of(request)

    async def read() -> dict[str, Any]:
        return {"trainer": machines.find_trainer(services_of(request), trainer_id)}

    return follow(_TRAINER_PAGE, request, viewer, read)


@post("/machines/trainers/{trainer_id:str}", include_in_schema=False, status_code=HTTPStatus.OK)
async def tell_trainer(request: Request[Any, Any, Any], trainer_id: str) -> Response[Any]:
    """Tells it what to do."""
    viewer, form = await admin_form(request)
    action = _confirmed(form, trainer_id)
    by = actor_of(request, viewer)
    await machines.tell_trainer(services_of(request), by, trainer_id, action)
    return redirect(_PATH if action == _CONFIRMED else f"{_PATH}/trainers/{trainer_id}")


def _confirmed(form: dict[str, str], machine_id: str) -> MachineAction:
    """What a form asks for.

    Raises:
        InvalidFieldError: nothing that there is, or what has to be typed was not.
    """
    action = form.get("action", "")
    if action not in machines.ACTIONS:
        raise InvalidFieldError(f"there is no action {action!r}", param="action")
    if action == _CONFIRMED and form.get("confirmation") != machine_id:
        raise InvalidFieldError("the id that was typed is another one", param="confirmation")
    return action


MACHINE_PAGES: list[Any] = [
    machines_page,
    machines_live,
    engine_page,
    engine_live,
    tell_engine,
    trainer_page,
    trainer_live,
    tell_trainer,
]
