"""Operations on a model, each with the seq that its client gave it: sent again, it is the same operation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from google.protobuf.message import DecodeError

from river_client import wire
from river_gateway.decoding import beside_the_loop
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.call import TRAIN, Methods, Unary
from river_gateway.dialects.river_grpc.data import read_data, read_loss_config
from river_gateway.dialects.river_grpc.limits import (
    LIMIT_PATIENCE_S,
    POLL_MARGIN_S,
    TEMPORARY_TTL_S,
)
from river_gateway.dialects.river_grpc.models import accepted, model_of
from river_gateway.dialects.river_grpc.uploads import (
    Upload,
    find_upload,
    finish_upload,
    read_upload,
)
from river_gateway.dialects.river_grpc.versions import expected_of
from river_gateway.errors import (
    AheadError,
    GatewayError,
    InvalidFieldError,
    MalformedBodyError,
    NotSupportedError,
    RateLimitedError,
    UnavailableError,
)
from river_gateway.limits import RETRY_AFTER_S
from river_gateway.training import submitting
from river_trainer import protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.dialects.river_grpc.call import Call
    from river_gateway.dialects.river_grpc.request_ids import Kind

AnyRequest = (
    pb.ForwardRequest
    | pb.ForwardBackwardRequest
    | pb.OptimStepRequest
    | pb.LoadWeightsRequest
    | pb.SaveWeightsRequest
)

# ---- Submitting ------------------------------------------------------------------------------------------------------


async def _submit(
    call: Call,
    kind: Kind,
    asked: AnyRequest,
    make: Callable[[RunRow], wire.AnyOperation],
    *,
    size_bytes: int = 0,
) -> pb.AsyncResponse:
    """Accepts the operation that `make` reads from a request of so many bytes.

    One that is wrong is refused at once, and fails in its turn as well: the client has used up its seq, and what it
    sends behind must not wait for ever. What only has to wait for a limit is not refused while the client waits.
    """
    run = await _model_of(call, asked)
    try:
        operation = await beside_the_loop(size_bytes, make, run)
        submitted = wire.SubmitOperation(seq=asked.seq_id, operation=operation)
        done = await _patiently(call, run, submitted)
    except (UnavailableError, AheadError):
        raise  # The client sends it again.
    except GatewayError as error:
        await _refuse(call, asked, error)
        raise
    return accepted(kind, done.operation_id)


async def _model_of(call: Call, asked: AnyRequest) -> RunRow:
    """The run that an operation is for.

    Raises:
        NotFoundError: there is none of the caller's.
        InvalidFieldError: the operation has no seq.
    """
    run = await model_of(call, asked.model_id)
    if not asked.HasField("seq_id"):
        raise InvalidFieldError(
            "seq_id: missing; it is what makes an operation that is sent again the same one",
            param="seq_id",
        )
    return run


async def _refuse(call: Call, asked: AnyRequest, error: GatewayError) -> None:
    """Lets an operation that is wrong fail in its turn."""
    run = await _model_of(call, asked)
    await submitting.refuse(call.services, call.principal, run, asked.seq_id, error)


async def _patiently(
    call: Call, run: RunRow, submitted: wire.SubmitOperation
) -> submitting.Accepted:
    """Submits, waiting while the key is over a limit or the client is far ahead of the trainer."""
    give_up_s = call.time_left_s(at_most_s=LIMIT_PATIENCE_S, margin_s=POLL_MARGIN_S)
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + give_up_s
    while True:
        try:
            return await submitting.submit(call.services, call.principal, run, submitted)
        except (RateLimitedError, AheadError) as error:
            pause_s = error.retry_after_s or RETRY_AFTER_S
            if loop.time() + pause_s > give_up_at:
                raise
        await asyncio.sleep(pause_s)


# ---- With data -------------------------------------------------------------------------------------------------------


async def _forward(call: Call, asked: pb.ForwardRequest) -> pb.AsyncResponse:
    """Losses and log-probabilities; no gradient."""
    given = asked.forward_input

    def make(run: RunRow) -> wire.Forward:
        return wire.Forward(
            data=read_data(given.data),
            loss_fn=_loss_name(given),
            loss_config=read_loss_config(given.loss_fn, given.loss_fn_config),
            force_routing_replay=_replays(given),
            expected_policy=expected_of(run.run_id, asked.expected_policy_id),
        )

    return await _submit(call, "forward_backward", asked, make, size_bytes=_size_of(given))


async def _forward_backward(call: Call, asked: pb.ForwardBackwardRequest) -> pb.AsyncResponse:
    """Gradients, added to those of before unless these are to be cleared."""
    if asked.upload_id:
        return await _forward_backward_uploaded(call, asked)
    return await _submit_gradients(call, asked, asked.forward_backward_input)


async def _forward_backward_uploaded(
    call: Call, asked: pb.ForwardBackwardRequest
) -> pb.AsyncResponse:
    """The same, of a body that has come in parts."""
    try:
        upload = await _upload_of(call, asked)
        if upload.operation is not None:  # Our answer was lost.
            return accepted("forward_backward", upload.operation)
        body = await read_upload(call, upload)
        uploaded = await beside_the_loop(len(body), _parse, body)
    except UnavailableError:
        raise
    except GatewayError as error:
        await _refuse(call, asked, error)
        raise
    answer = await _submit_gradients(call, asked, uploaded.forward_backward_input)
    await finish_upload(call, upload, protocol.operation_id(asked.model_id, asked.seq_id))
    return answer


async def _upload_of(call: Call, asked: pb.ForwardBackwardRequest) -> Upload:
    """The upload that a request names, if it is for it.

    Raises:
        NotFoundError: there is none of the caller's.
        InvalidFieldError: it is for another model or operation, or the data have come with the request as well.
    """
    if asked.HasField("forward_backward_input"):
        raise InvalidFieldError(
            "upload_id: the data come with it, so forward_backward_input must be absent",
            param="upload_id",
        )
    upload = await find_upload(call, asked.upload_id)
    if upload.run_id != asked.model_id:
        raise InvalidFieldError(
            f"upload_id: it is for the model {upload.run_id}", param="upload_id"
        )
    operation = protocol.operation_id(asked.model_id, asked.seq_id)
    if upload.operation not in (None, operation):
        raise InvalidFieldError(
            f"upload_id: it has been used for {upload.operation}", param="upload_id"
        )
    return upload


async def _submit_gradients(
    call: Call, asked: pb.ForwardBackwardRequest, given: pb.ForwardBackwardInput
) -> pb.AsyncResponse:
    def make(run: RunRow) -> wire.ForwardBackward:
        return wire.ForwardBackward(
            data=read_data(given.data),
            loss_fn=_loss_name(given),
            loss_config=read_loss_config(given.loss_fn, given.loss_fn_config),
            force_routing_replay=_replays(given),
            zero_gradients=given.init_gradients or not given.gradient_accumulation,
            expected_policy=expected_of(run.run_id, asked.expected_policy_id),
        )

    return await _submit(call, "forward_backward", asked, make, size_bytes=_size_of(given))


def _parse(body: bytes) -> pb.ForwardBackwardRequest:
    try:
        return pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise MalformedBodyError("upload_id: what was uploaded is no request") from None


def _size_of(given: pb.ForwardBackwardInput) -> int:
    return sum(len(datum.data) for datum in given.data)


def _loss_name(given: pb.ForwardBackwardInput) -> wire.LossName:
    """The loss; whether there is such a one is checked with all else."""
    return cast("wire.LossName", given.loss_fn or "cross_entropy")


def _replays(given: pb.ForwardBackwardInput) -> bool:
    if given.resolved_images:
        raise NotSupportedError(
            "resolved_images: images are not supported", param="resolved_images"
        )
    if given.force_routing_replay not in ("", "ids"):
        raise InvalidFieldError(
            f"force_routing_replay: {given.force_routing_replay!r}, must be 'ids' or absent",
            param="force_routing_replay",
        )
    return given.force_routing_replay == "ids"


# ---- Without data ----------------------------------------------------------------------------------------------------


async def _optim_step(call: Call, asked: pb.OptimStepRequest) -> pb.AsyncResponse:
    """One step of AdamW.

    `idempotency_key` says no more than the seq does: the same seq is the same step, and every step has another.
    """

    def make(run: RunRow) -> wire.OptimStep:
        given = asked.adam_params
        adam = wire.AdamParams(
            lr=given.learning_rate,
            beta1=given.beta1 if given.HasField("beta1") else 0.9,
            beta2=given.beta2 if given.HasField("beta2") else 0.999,
            eps=given.eps if given.HasField("eps") else 1e-8,
            weight_decay=given.weight_decay,
            grad_clip_norm=given.grad_clip_norm if given.HasField("grad_clip_norm") else None,
            gradient_scale=given.gradient_scale if given.HasField("gradient_scale") else 1.0,
        )
        expected = expected_of(run.run_id, asked.expected_policy_id)
        return wire.OptimStep(adam=adam, expected_policy=expected)

    return await _submit(call, "optim_step", asked, make)


async def _save_weights(call: Call, asked: pb.SaveWeightsRequest) -> pb.AsyncResponse:
    """Keeps a checkpoint; one that is not `durable` only for a day, unless its `ttl_seconds` say otherwise."""

    def make(run: RunRow) -> wire.SaveWeights:
        if asked.mode == "publish":
            raise NotSupportedError(
                "mode: 'publish' is for training all weights; samples of a LoRA model come from its newest version by "
                "themselves",
                param="mode",
            )
        if asked.mode not in ("training", "inference"):
            raise InvalidFieldError(
                f"mode: {asked.mode!r}, must be 'training' or 'inference'", param="mode"
            )
        name = asked.path.removeprefix(f"{run.run_id}/")
        if asked.immutable:  # Each save has a path of its own, and sent again it has the same.
            name = f"{name}.{asked.seq_id}"
        ttl_s = asked.ttl_seconds if asked.HasField("ttl_seconds") else None
        is_temporary = asked.HasField("durable") and not asked.durable
        if ttl_s is None and is_temporary:
            ttl_s = TEMPORARY_TTL_S
        return wire.SaveWeights(
            name=name,
            mode="training" if asked.mode == "training" else "inference",
            ttl_s=ttl_s,
            expected_policy=expected_of(run.run_id, asked.expected_policy_id),
        )

    return await _submit(call, "save_weights", asked, make)


async def _load_weights(call: Call, asked: pb.LoadWeightsRequest) -> pb.AsyncResponse:
    """Goes on from a checkpoint of the same base model and shape."""

    def make(_run: RunRow) -> wire.LoadWeights:
        return wire.LoadWeights(path=asked.path, optimizer=asked.optimizer)

    return await _submit(call, "load_weights", asked, make)


TRAINING_METHODS: Methods = {
    "Forward": Unary(pb.ForwardRequest, TRAIN, _forward),
    "ForwardBackward": Unary(pb.ForwardBackwardRequest, TRAIN, _forward_backward),
    "OptimStep": Unary(pb.OptimStepRequest, TRAIN, _optim_step),
    "SaveWeights": Unary(pb.SaveWeightsRequest, TRAIN, _save_weights),
    "LoadWeights": Unary(pb.LoadWeightsRequest, TRAIN, _load_weights),
}
