"""The training API under `/river/v1`: runs that the gateways train on feedback, continually."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, delete, get, put

from river_client import wire
from river_client.learning_wire import LearningPage, LearningState, StartLearning
from river_gateway.checkpoints import aliases, catalog
from river_gateway.codec import WireRequest, reply
from river_gateway.errors import ConflictError, NotFoundError
from river_gateway.feedback import learning, rewards
from river_gateway.services import Services, services_of
from river_gateway.tenancy import audit
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import operations, validation

_TRAIN = [requires("train")]


@put("/runs/{run_id:str}/learning", guards=_TRAIN, status_code=HTTPStatus.OK)
async def start_learning(
    request: WireRequest, run_id: str, data: StartLearning
) -> Response[LearningState]:
    """Tells a run to train on the feedback on a model name until it is stopped; the same again is a no-op."""
    services, principal, by = services_of(request), principal_of(request), audit.actor_of(request)
    tenant_id = principal.tenant_id
    run = await services.runs.current(run_id, tenant_id)
    await _check(services, run, data, tenant_id)
    seq = await operations.next_seq(services, run)
    if data.publish == "live":
        follow = wire.PutAlias(target=f"{catalog.SCHEME}{run_id}")
        await aliases.point(services, tenant_id=tenant_id, name=data.alias, asked=follow, by=by)
    async with audit.recorded(services.pool, by, "learning.start") as line:
        state = await learning.start(
            line.connection,
            run_id=run_id,
            tenant_id=tenant_id,
            key_id=principal.key_id,
            settings=data,
            seq=seq,
            step=run.step,
        )
        line.about(run_id, tenant_id=tenant_id, details=data)
    await services.names.changed(tenant_id, learning.name_of(run_id))
    services.learning_wake.set()
    return reply(request, state)


async def _check(
    services: Services, run: catalog.RunRow, data: StartLearning, tenant_id: str
) -> None:
    """Makes sure that a run can learn as asked.

    Raises:
        InvalidFieldError: a setting is wrong.
        ConflictError: the run is lost, imported, or learning something else, or too many others are learning.
        NotFoundError: nobody can be served by the model name.
    """
    if run.imported:
        raise ConflictError(
            f"{run.run_id} is an imported adapter; start a run from its checkpoint", param="run_id"
        )
    if run.lost is not None:
        raise ConflictError(f"{run.run_id} is lost: {run.lost}", param="run_id")
    if data.publish == "live":
        validation.name(data.alias, "alias")
    rewards.check_size(data.min_batch, data.max_batch)
    validation.loss_config(data.loss_fn, data.loss_config)
    validation.adam(data.adam)
    if (
        data.publish == "none"
        and data.alias not in services.engines.bases()
        and await services.names.alias(data.alias, tenant_id) is None
    ):
        raise NotFoundError(f"there is no alias {data.alias!r}", param="alias")
    current = await learning.find(services.pool, run_id=run.run_id, tenant_id=tenant_id)
    learning.check_startable(current, data)
    await learning.check_room(services.pool, run_id=run.run_id, tenant_id=tenant_id)


@get("/runs/{run_id:str}/learning", guards=_TRAIN)
async def get_learning(request: WireRequest, run_id: str) -> Response[LearningState]:
    """How far a run has come that learns, or has learnt."""
    state = await learning.get(
        services_of(request).pool, run_id=run_id, tenant_id=principal_of(request).tenant_id
    )
    return reply(request, state)


@delete("/runs/{run_id:str}/learning", guards=_TRAIN, status_code=HTTPStatus.OK)
async def stop_learning(request: WireRequest, run_id: str) -> Response[LearningState]:
    """Ends it once the batch at hand has been applied: `status` says whether it has been; again is a no-op."""
    services, tenant_id = services_of(request), principal_of(request).tenant_id
    async with audit.recorded(services.pool, audit.actor_of(request), "learning.stop") as line:
        state = await learning.stop(line.connection, run_id=run_id, tenant_id=tenant_id)
        line.about(run_id, tenant_id=tenant_id)
    await services.names.changed(tenant_id, learning.name_of(run_id))
    return reply(request, state)


@get("/learning", guards=_TRAIN)
async def list_learning(request: WireRequest) -> Response[LearningPage]:
    """What the tenant's runs learn and have learnt, newest first."""
    found = await learning.list_all(services_of(request).pool, principal_of(request).tenant_id)
    return reply(request, LearningPage(learning=found))


LEARNING_HANDLERS: list[Any] = [start_learning, get_learning, stop_learning, list_learning]
