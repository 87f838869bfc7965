"""The training API under `/river/v1`: runs that the gateways train on feedback, continually."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, delete, get, put

from river_client.learning_wire import LearningPage, LearningState, StartLearning
from river_gateway.codec import WireRequest, reply
from river_gateway.feedback import learning, starting
from river_gateway.services import services_of
from river_gateway.tenancy import audit
from river_gateway.tenancy.auth import principal_of, requires

_TRAIN = [requires("train")]


@put("/runs/{run_id:str}/learning", guards=_TRAIN, status_code=HTTPStatus.OK)
async def start_learning(
    request: WireRequest, run_id: str, data: StartLearning
) -> Response[LearningState]:
    """Tells a run to train on the feedback on a model name until it is stopped; the same again is a no-op."""
    principal = principal_of(request)
    state = await starting.start_learning(
        services_of(request),
        run_id=run_id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        settings=data,
        by=audit.actor_of(request),
    )
    return reply(request, state)


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
    state = await starting.stop_learning(
        services_of(request),
        run_id=run_id,
        tenant_id=principal_of(request).tenant_id,
        by=audit.actor_of(request),
    )
    return reply(request, state)


@get("/learning", guards=_TRAIN)
async def list_learning(request: WireRequest) -> Response[LearningPage]:
    """What the tenant's runs learn and have learnt, newest first."""
    found = await learning.list_all(services_of(request).pool, principal_of(request).tenant_id)
    return reply(request, LearningPage(learning=found))


LEARNING_HANDLERS: list[Any] = [start_learning, get_learning, stop_learning, list_learning]
