"""The training API under `/river/v1`: sessions, runs, operations, sampling."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from litestar import Response, delete, get, post
from litestar.response import Stream

from river_client import wire
from river_gateway.checkpoints import catalog
from river_gateway.checkpoints.catalog import RunRow
from river_gateway.codec import (
    WireRequest,
    encoder_for,
    idempotency_key,
    preferred_wait_s,
    reply,
)
from river_gateway.context import context_of
from river_gateway.disconnect import WhileClientStays, unless_client_leaves
from river_gateway.inference import sampling
from river_gateway.inference.models import POLICY_VERSION_HEADER
from river_gateway.limits import LONG_POLL_DEFAULT_S, LONG_POLL_MAX_S, SESSION_HEARTBEAT_INTERVAL_S
from river_gateway.services import services_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import opening, operations, sessions, submitting, validation

# ---- Sessions --------------------------------------------------------------------------------------------------------


@post("/sessions", guards=[requires("train")], status_code=HTTPStatus.CREATED)
async def create_session(request: WireRequest, data: wire.CreateSession) -> Response[wire.Session]:
    """Opens a session; its client is expected to send heartbeats."""
    session_id = await sessions.open_session(
        services_of(request),
        principal_of(request),
        tags=data.tags,
        identity=idempotency_key(request),
    )
    session = wire.Session(session_id=session_id, heartbeat_interval_s=SESSION_HEARTBEAT_INTERVAL_S)
    return reply(request, session, status=HTTPStatus.CREATED)


@post(
    "/sessions/{session_id:str}/heartbeat",
    guards=[requires("train")],
    status_code=HTTPStatus.NO_CONTENT,
)
async def beat_session(request: WireRequest, session_id: str) -> None:
    """Says that the client of a session is alive."""
    await sessions.beat_session(services_of(request), principal_of(request), session_id)


@delete("/sessions/{session_id:str}", guards=[requires("train")], status_code=HTTPStatus.NO_CONTENT)
async def end_session(request: WireRequest, session_id: str) -> None:
    """Ends a session; its runs and checkpoints stay."""
    await sessions.end_session(services_of(request), principal_of(request), session_id)


# ---- Runs ------------------------------------------------------------------------------------------------------------


@post("/runs", guards=[requires("train")], status_code=HTTPStatus.CREATED)
async def create_run(request: WireRequest, data: wire.CreateRun) -> Response[wire.Run]:
    """Opens a run. The trainer makes its adapter as operation 0, which can be awaited."""
    run = await opening.open_run(
        services_of(request), principal_of(request), data, identity=idempotency_key(request)
    )
    return reply(request, run.to_wire(), status=HTTPStatus.CREATED)


@get("/runs", guards=[requires("train", "infer")])
async def list_runs(request: WireRequest) -> Response[wire.Page]:
    """The tenant's runs, newest first."""
    rows = await catalog.list_runs(services_of(request).pool, principal_of(request).tenant_id)
    return reply(request, wire.Page(runs=[row.to_wire() for row in rows]))


@get("/runs/{run_id:str}", guards=[requires("train", "infer")])
async def get_run(request: WireRequest, run_id: str) -> Response[wire.Run]:
    """One run."""
    run = await catalog.find_run(
        services_of(request).pool, run_id=run_id, tenant_id=principal_of(request).tenant_id
    )
    return reply(request, run.to_wire())


@post("/runs/{run_id:str}/metrics", guards=[requires("train")], status_code=HTTPStatus.NO_CONTENT)
async def log_metrics(request: WireRequest, run_id: str, data: wire.LogMetrics) -> None:
    """Keeps a user's own metrics with a run."""
    if data.step is not None:
        validation.in_range(data.step, "step", 0, 2**53)
    await catalog.insert_metrics(
        services_of(request).pool,
        run_id=run_id,
        tenant_id=principal_of(request).tenant_id,
        step=data.step,
        metrics=validation.metrics(data.metrics),
    )


async def _own_run(request: WireRequest, run_id: str) -> RunRow:
    return await services_of(request).runs.find(run_id, principal_of(request).tenant_id)


# ---- Operations ------------------------------------------------------------------------------------------------------


@post("/runs/{run_id:str}/operations", guards=[requires("train")], status_code=HTTPStatus.ACCEPTED)
async def submit_operation(
    request: WireRequest, run_id: str, data: wire.SubmitOperation
) -> Response[wire.OperationAccepted]:
    """Accepts an operation, once it is known to be right and durably stored.

    A client that prefers to wait gets the status and the headers at once, and the body with the result.
    """
    services = services_of(request)
    run = await _own_run(request, run_id)
    accepted = await submitting.submit(services, principal_of(request), run, data)
    operation = accepted.operation_id
    wait_s = preferred_wait_s(request, at_most_s=LONG_POLL_MAX_S)
    if not wait_s:
        return reply(
            request,
            wire.OperationAccepted(operation_id=operation),
            status=HTTPStatus.ACCEPTED,
            headers=accepted.headers,
        )
    encode, media_type = encoder_for(request)

    async def answer() -> AsyncGenerator[bytes]:
        result = await operations.result_if_any(services, run, operation, wait_s)
        yield encode(wire.OperationAccepted(operation_id=operation, result=result))

    headers = {"location": f"{wire.API_PREFIX}/operations/{operation}"}
    headers |= {name.decode(): value.decode() for name, value in accepted.headers}
    return Stream(  # type: ignore[return-value]
        answer(), status_code=HTTPStatus.ACCEPTED, media_type=media_type, headers=headers
    )


@get("/operations/{operation_id:str}", guards=[requires("train")])
async def get_operation(
    request: WireRequest, operation_id: str, timeout_s: float = LONG_POLL_DEFAULT_S
) -> Response[wire.OperationResult]:
    """The result of an operation, waiting up to `timeout_s` for it; `pending` and why when there is none by then."""
    validation.in_range(timeout_s, "timeout_s", 0, LONG_POLL_MAX_S)
    services = services_of(request)
    run = await _own_run(request, operations.run_of_operation(operation_id))
    result = await unless_client_leaves(
        request.receive, operations.await_result(services, run, operation_id, timeout_s)
    )
    return reply(request, result)


# ---- Sampling --------------------------------------------------------------------------------------------------------


@post("/sample", guards=[requires("infer")], status_code=HTTPStatus.OK)
async def sample(request: WireRequest, data: wire.SampleRequest) -> Response[wire.SampleResponse]:
    """Draws samples of one policy version, token in and token out."""
    sampled = await sampling.sample(
        services_of(request),
        principal_of(request),
        data,
        request_id=context_of(request.scope).request_id,
        pin=request.headers.get(POLICY_VERSION_HEADER),
        while_wanted=WhileClientStays(request.receive),
    )
    return reply(request, sampled.response, headers=sampled.headers)


TRAINING_HANDLERS: list[Any] = [
    create_session,
    beat_session,
    end_session,
    create_run,
    list_runs,
    get_run,
    log_metrics,
    submit_operation,
    get_operation,
    sample,
]
