"""RetrieveFuture: a poll is held until there is a result, or the client's deadline is near."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_gateway.decoding import beside_the_loop
from river_gateway.dialects.river_grpc import request_ids
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.call import EITHER, Methods, Unary
from river_gateway.dialects.river_grpc.data import client_metrics, logprobs_body
from river_gateway.dialects.river_grpc.limits import POLL_MARGIN_S, POLL_MAX_S
from river_gateway.dialects.river_grpc.models import is_done
from river_gateway.dialects.river_grpc.versions import version_of
from river_gateway.errors import NotFoundError
from river_gateway.inference.futures import Done, Failed
from river_gateway.training import operations

if TYPE_CHECKING:
    from river_client import wire
    from river_gateway.dialects.river_grpc.call import Call
    from river_gateway.dialects.river_grpc.request_ids import OperationRequest


async def _retrieve(
    call: Call, asked: pb.RetrieveFutureRequest
) -> pb.RetrieveFutureResponse | bytes:
    """What has come of a request, or `try_again` with what it waits for."""
    timeout_s = call.time_left_s(at_most_s=POLL_MAX_S, margin_s=POLL_MARGIN_S)
    operation = request_ids.parse(asked.request_id)
    if operation is None:
        return await _kept_work(call, asked.request_id, timeout_s)
    run_id = operations.run_of_operation(operation.operation_id)
    run = await call.services.runs.find(run_id, call.principal.tenant_id)
    result = await operations.await_result(call.services, run, operation.operation_id, timeout_s)
    if operation.kind == "unload_model" and (
        result.status != "pending" or await is_done(call, run, operation.operation_id)
    ):
        return pb.RetrieveFutureResponse(unload_model=pb.UnloadModelResponse(type="unload_model"))
    if result.status == "pending":
        reason = result.queue.reason if result.queue is not None else ""
        return _try_again(asked.request_id, reason)
    if result.error is not None:
        return failed(result.error.type, result.error.message)
    size_bytes = sum(len(tensor.data) for tensor in result.logprobs or ())
    return await beside_the_loop(size_bytes, _answer, operation, run_id, result)


async def _kept_work(
    call: Call, request_id: str, timeout_s: float
) -> pb.RetrieveFutureResponse | bytes:
    """Samples and chats; their bodies are whole answers already."""
    outcome = await call.services.futures.result(call.principal.tenant_id, request_id, timeout_s)
    match outcome:
        case Done():
            return outcome.body
        case Failed():
            return failed(outcome.type, outcome.message)
        case _:
            return _try_again(request_id, getattr(outcome, "reason", None) or "")


def failed(category: str, message: str) -> pb.RetrieveFutureResponse:
    """What the client raises as `category: message`."""
    return pb.RetrieveFutureResponse(
        failed=pb.RequestFailedResponse(error_category=category, message=message)
    )


def _try_again(request_id: str, reason: str) -> pb.RetrieveFutureResponse:
    return pb.RetrieveFutureResponse(
        try_again=pb.TryAgainResponse(request_id=request_id, queue_state=reason)
    )


def _answer(operation: OperationRequest, run_id: str, result: wire.OperationResult) -> bytes:
    """The whole answer, encoded: log-probabilities may be many."""
    version = version_of(result.policy_version or "")
    answer = pb.RetrieveFutureResponse()
    match operation.kind:
        case "create_model":
            answer.create_model.CopyFrom(
                pb.CreateModelResponse(type="create_model", model_id=run_id, training_run_id=run_id)
            )
        case "forward_backward":
            answer.forward_backward.CopyFrom(_output(result))
        case "optim_step":
            metrics = result.metrics | {"step": float(version.step)}
            answer.optim_step.CopyFrom(
                pb.OptimStepResponse(type="optim_step", metrics=metrics, policy_version=version)
            )
        case "load_weights":
            answer.load_weights.CopyFrom(
                pb.LoadWeightsResponse(type="load_weights", policy_version=version)
            )
        case "save_weights":
            saved = result.checkpoint
            if saved is None:
                raise NotFoundError("the operation saved nothing", param="request_id")
            answer.save_weights.CopyFrom(
                pb.SaveWeightsResponse(
                    type="save_weights",
                    path=saved.path,
                    policy_version=version_of(saved.policy_version),
                )
            )
        case "unload_model":
            raise AssertionError("answered before")
    return answer.SerializeToString()


def _output(result: wire.OperationResult) -> pb.ForwardBackwardOutput:
    logprobs = result.logprobs or []
    output = pb.ForwardBackwardOutput(
        type="forward_backward",
        loss_fn_output_type="logprobs",
        metrics=client_metrics(result.metrics, len(logprobs)),
        usage=pb.Usage(total_tokens=result.training_tokens, training_tokens=result.training_tokens),
    )
    if result.logprobs is not None:
        output.loss_fn_outputs["logprobs"].data = logprobs_body(logprobs)
    return output


RESULT_METHODS: Methods = {
    "RetrieveFuture": Unary(pb.RetrieveFutureRequest, EITHER, _retrieve),
}
