"""The training API under `/river/v1`: samples that clients log with their runs, to be read by people."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from litestar import Response, get, post
from litestar.params import Parameter

from river_client.samples_wire import LogSamples, SamplesLogged, SamplesPage
from river_gateway.checkpoints import catalog
from river_gateway.codec import WireRequest, idempotency_key, reply
from river_gateway.limits import LOGGED_PAGE_DEFAULT, LOGGED_PAGE_MAX, SEQ_MAX
from river_gateway.services import services_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import samples, validation

_Step = Annotated[int | None, Parameter(ge=0, le=SEQ_MAX)]
_Before = Annotated[int | None, Parameter(ge=1, le=SEQ_MAX)]
_Limit = Annotated[int, Parameter(ge=1, le=LOGGED_PAGE_MAX)]


@post("/runs/{run_id:str}/samples", guards=[requires("train")], status_code=HTTPStatus.OK)
async def log_samples(
    request: WireRequest, run_id: str, data: LogSamples
) -> Response[SamplesLogged]:
    """Keeps samples with a run, within bounds: the answer says what was dropped, cut, or forgotten for them."""
    if data.step is not None:
        validation.in_range(data.step, "step", 0, SEQ_MAX)
    logged = await samples.log_samples(
        services_of(request).pool,
        run_id=run_id,
        tenant_id=principal_of(request).tenant_id,
        asked=data,
        identity=idempotency_key(request),
    )
    return reply(request, logged)


@get("/runs/{run_id:str}/samples", guards=[requires("train")])
async def get_samples(
    request: WireRequest,
    run_id: str,
    step: _Step = None,
    reward_min: float | None = None,
    reward_max: float | None = None,
    before: _Before = None,
    limit: _Limit = LOGGED_PAGE_DEFAULT,
) -> Response[SamplesPage]:
    """What is kept of a run's samples, newest first; `before` of a page is that of the next one."""
    pool, tenant_id = services_of(request).pool, principal_of(request).tenant_id
    run = await catalog.find_run(pool, run_id=run_id, tenant_id=tenant_id)
    page = await samples.list_samples(
        pool,
        run.run_id,
        step=step,
        reward_min=reward_min,
        reward_max=reward_max,
        before=before,
        limit=limit,
    )
    return reply(request, page)


SAMPLES_HANDLERS: list[Any] = [log_samples, get_samples]
