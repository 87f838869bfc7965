"""Engines and trainers under `/river/v1`, for the scope `admin`."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from litestar import Response, get, post

from river_client.machine_wire import MachineAction, Machines, MachineTold
from river_gateway.codec import WireRequest, reply
from river_gateway.health import machines
from river_gateway.services import services_of
from river_gateway.tenancy.audit import actor_of
from river_gateway.tenancy.auth import requires

if TYPE_CHECKING:
    from collections.abc import Sequence

_ADMIN = [requires("admin")]


@get("/engines", guards=_ADMIN)
async def get_engines(request: WireRequest) -> Response[Machines]:
    """Every engine that is alive, and how it is."""
    return reply(request, Machines(engines=machines.list_engines(services_of(request))))


@get("/trainers", guards=_ADMIN)
async def get_trainers(request: WireRequest) -> Response[Machines]:
    """Every trainer that is alive, and how it is."""
    return reply(request, Machines(trainers=machines.list_trainers(services_of(request))))


async def _tell_engine(
    request: WireRequest, engine_id: str, action: MachineAction
) -> Response[MachineTold]:
    services, by = services_of(request), actor_of(request)
    return reply(request, await machines.tell_engine(services, by, engine_id, action))


async def _tell_trainer(
    request: WireRequest, trainer_id: str, action: MachineAction
) -> Response[MachineTold]:
    services, by = services_of(request), actor_of(request)
    return reply(request, await machines.tell_trainer(services, by, trainer_id, action))


@post("/engines/{engine_id:str}/drain", guards=_ADMIN, status_code=HTTPStatus.OK)
async def drain_engine(request: WireRequest, engine_id: str) -> Response[MachineTold]:
    """Has an engine end what it has begun and take nothing new."""
    return await _tell_engine(request, engine_id, "drain")


@post("/engines/{engine_id:str}/undrain", guards=_ADMIN, status_code=HTTPStatus.OK)
async def undrain_engine(request: WireRequest, engine_id: str) -> Response[MachineTold]:
    """Has an engine take requests again."""
    return await _tell_engine(request, engine_id, "undrain")


@post("/engines/{engine_id:str}/restart", guards=_ADMIN, status_code=HTTPStatus.OK)
async def restart_engine(request: WireRequest, engine_id: str) -> Response[MachineTold]:
    """Has an engine drain, leave and come back, with the adapters that it holds."""
    return await _tell_engine(request, engine_id, "restart")


@post("/trainers/{trainer_id:str}/drain", guards=_ADMIN, status_code=HTTPStatus.OK)
async def drain_trainer(request: WireRequest, trainer_id: str) -> Response[MachineTold]:
    """Has a trainer end its batch and begin none; operations are still accepted, and wait."""
    return await _tell_trainer(request, trainer_id, "drain")


@post("/trainers/{trainer_id:str}/undrain", guards=_ADMIN, status_code=HTTPStatus.OK)
async def undrain_trainer(request: WireRequest, trainer_id: str) -> Response[MachineTold]:
    """Has a trainer go on."""
    return await _tell_trainer(request, trainer_id, "undrain")


@post("/trainers/{trainer_id:str}/restart", guards=_ADMIN, status_code=HTTPStatus.OK)
async def restart_trainer(request: WireRequest, trainer_id: str) -> Response[MachineTold]:
    """Has a trainer drain and leave; its successor goes on where it was."""
    return await _tell_trainer(request, trainer_id, "restart")


MACHINE_HANDLERS: Sequence[Any] = [
    get_engines,
    get_trainers,
    drain_engine,
    undrain_engine,
    restart_engine,
    drain_trainer,
    undrain_trainer,
    restart_trainer,
]
