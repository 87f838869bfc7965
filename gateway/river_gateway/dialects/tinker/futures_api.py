"""The routes that results are asked for with: of operations, which River's journal knows, and of samples.

A result that is not there yet is answered 408 with what it waits for, whereupon the client asks again at once. A large
one is announced first by its size, if the client says that it would like that.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from litestar import Response, post

from river_gateway.codec import JSON
from river_gateway.decoding import beside_the_loop
from river_gateway.dialects.tinker import bodies, results
from river_gateway.dialects.tinker.errors import UNHURRIED_HANDLERS, in_their_words
from river_gateway.dialects.tinker.http import AnyRequest, read, told
from river_gateway.dialects.tinker.ids import OperationRequest, of_river, parse_request
from river_gateway.dialects.tinker.results import PROTOBUF
from river_gateway.dialects.tinker.runs import find_run
from river_gateway.disconnect import unless_client_leaves
from river_gateway.errors import EngineRefusedError, NotFoundError
from river_gateway.inference.futures import Done, Failed, Large, Pending
from river_gateway.limits import TINKER_INLINE_MAX_BYTES, TINKER_POLL_S
from river_gateway.services import services_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import operations
from river_trainer import protocol

if TYPE_CHECKING:
    from river_client import wire
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

_SCOPES = requires("train", "infer")

_QUEUE_STATES: dict[str, bodies.QueueState] = {
    "running": "active",
    "queued": "active",
    "waiting_for_gap": "active",
    "recovering": "paused_capacity",
    "no_trainer": "paused_capacity",
}


@post(
    "/retrieve_future",
    guards=[_SCOPES],
    status_code=HTTPStatus.OK,
    exception_handlers=UNHURRIED_HANDLERS,
)
async def retrieve_future(request: AnyRequest) -> Response[bytes]:
    """The result of a request, waiting for it."""
    asked = await read(request, bodies.RetrieveFuture)
    services, principal = services_of(request), principal_of(request)
    operation = parse_request(asked.request_id)
    if operation is None:
        body_max_bytes = TINKER_INLINE_MAX_BYTES if asked.allow_metadata_only else None
        work = _sampled(services, principal, asked.request_id, body_max_bytes)
    else:
        in_json = PROTOBUF not in request.headers.get("accept", "")
        work = _operated(services, principal, operation, in_json=in_json)
    answer = await unless_client_leaves(request.receive, work)
    if asked.allow_metadata_only and len(answer.content) > TINKER_INLINE_MAX_BYTES:
        return told(bodies.MetadataOnly(response_payload_size=len(answer.content)))
    return answer


@post("/cancel_future", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def cancel_future(request: AnyRequest) -> Response[bytes]:
    """Says that nobody waits for a sample any more; operations go on, for those after them stand on them."""
    asked = await read(request, bodies.OfRequest)
    if parse_request(asked.request_id) is None:
        await services_of(request).futures.cancel(principal_of(request).tenant_id, asked.request_id)
    return told(bodies.Typed(type="cancel_future"))


# ---- Samples ---------------------------------------------------------------------------------------------------------


async def _sampled(
    services: Services, principal: Principal, request_id: str, body_max_bytes: int | None
) -> Response[bytes]:
    outcome = await services.futures.result(
        principal.tenant_id, request_id, TINKER_POLL_S, body_max_bytes=body_max_bytes
    )
    match outcome:
        case Large():
            return told(bodies.MetadataOnly(response_payload_size=outcome.size_bytes))
        case Done():
            return Response(outcome.body, media_type=PROTOBUF)
        case Pending():
            state = "active" if outcome.reason is None else "paused_rate_limit"
            reason = outcome.reason or "the samples are being drawn"
            return _try_again(request_id, state, reason)
        case Failed(status=HTTPStatus.PAYMENT_REQUIRED | HTTPStatus.GONE):
            # Either way the client asks for the samples anew, in the first case when it has waited for credit.
            raise EngineRefusedError(outcome.status, outcome.message)
        case Failed():
            category = "user" if outcome.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server"
            return told(bodies.Failed(error=in_their_words(outcome.message), category=category))
        case _:
            raise AssertionError(f"an outcome that results never have: {outcome}")


# ---- Operations ------------------------------------------------------------------------------------------------------


async def _operated(
    services: Services, principal: Principal, asked: OperationRequest, *, in_json: bool
) -> Response[bytes]:
    run = await find_run(services, asked.model, principal.tenant_id)
    operation = protocol.operation_id(run.run_id, asked.seq)
    result = await operations.await_result(services, run, operation, TINKER_POLL_S)
    if result.status == "pending":
        assert result.queue is not None
        state = _QUEUE_STATES.get(result.queue.state, "active")
        return _try_again(str(asked), state, result.queue.reason)
    if result.error is not None:
        category = "server" if results.is_ours(result.error) else "user"
        return told(bodies.Failed(error=in_their_words(result.error.message), category=category))
    if asked.kind == "forward_backward":
        size_bytes = sum(len(tensor.data) for tensor in result.logprobs or ())
        return await beside_the_loop(size_bytes, _computed, result, in_json=in_json)
    return _json(_told_of(asked, result))


def _computed(result: wire.OperationResult, *, in_json: bool) -> Response[bytes]:
    if in_json:
        return _json(results.forward_backward_json(result))
    return Response(results.forward_backward_output(result), media_type=PROTOBUF)


def _told_of(asked: OperationRequest, result: wire.OperationResult) -> dict[str, object]:
    """What the result of an operation says that has no arrays."""
    match asked.kind:
        case "create_model":
            return {"type": asked.kind, "model_id": asked.model}
        case "load_weights":
            return {"type": asked.kind, "model_id": asked.model, "path": asked.detail}
        case "optim_step":
            return {"metrics": result.metrics}
        case "save_weights_for_sampler" if asked.detail is not None:
            return {"type": asked.kind, "path": None, "sampling_session_id": asked.detail}
        case _:
            if result.checkpoint is None:
                raise NotFoundError(
                    f"there is no request {str(asked)!r}: that operation was another one",
                    param="request_id",
                )
            return {
                "type": asked.kind,
                "path": of_river(result.checkpoint.path, asked.model),
                "size_bytes": result.checkpoint.size_bytes,
            }


def _json(value: dict[str, object]) -> Response[bytes]:
    return Response(msgspec.json.encode(value), media_type=JSON)


def _try_again(request_id: str, state: bodies.QueueState, reason: str) -> Response[bytes]:
    body = bodies.TryAgain(request_id=request_id, queue_state=state, queue_state_reason=reason)
    return told(body, HTTPStatus.REQUEST_TIMEOUT)


FUTURE_HANDLERS: list[Any] = [retrieve_future, cancel_future]
