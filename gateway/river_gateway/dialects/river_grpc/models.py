"""Models: the client's word for a run, the adapter that it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_client import wire
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.call import EITHER, TRAIN, Methods, Unary
from river_gateway.dialects.river_grpc.refused import NO_ATTESTATION
from river_gateway.dialects.river_grpc.request_ids import Kind, OperationRequest
from river_gateway.dialects.river_grpc.versions import version_of
from river_gateway.errors import InvalidFieldError, NotSupportedError, UnavailableError
from river_gateway.training.opening import open_run
from river_trainer import journal, protocol

if TYPE_CHECKING:
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.dialects.river_grpc.call import Call


def accepted(kind: Kind, operation_id: str) -> pb.AsyncResponse:
    """The answer to whoever has submitted an operation."""
    return pb.AsyncResponse(request_id=OperationRequest(kind, operation_id).request_id, type=kind)


async def model_of(call: Call, model_id: str) -> RunRow:
    """The run of a model id.

    Raises:
        NotFoundError: there is none of this tenant's.
    """
    return await call.services.runs.find(model_id, call.principal.tenant_id)


async def _create_model(call: Call, asked: pb.CreateModelRequest) -> pb.AsyncResponse:
    """Opens a run; the same session and `model_seq_id` again are the same run."""
    _refuse_what_is_not_built(asked)
    if not asked.HasField("lora_config"):
        raise InvalidFieldError("lora_config: missing", param="lora_config")
    config = asked.lora_config
    lora = wire.LoraConfig(
        rank=config.rank,
        alpha=config.alpha if config.HasField("alpha") else None,
        seed=config.seed if config.HasField("seed") else None,
        train_attn=config.train_attn,
        train_mlp=config.train_mlp,
        train_unembed=config.train_unembed,
    )
    run = await open_run(
        call.services,
        call.principal,
        wire.CreateRun(session_id=asked.session_id, base_model=asked.base_model, lora=lora),
        identity=f"{asked.session_id}:model:{asked.model_seq_id}",
    )
    call.known_runs.forget(asked.session_id, call.principal.tenant_id)
    return accepted("create_model", protocol.operation_id(run.run_id, 0))


def _refuse_what_is_not_built(asked: pb.CreateModelRequest) -> None:
    if asked.full_weight or asked.train_router:
        raise NotSupportedError(
            "full_weight: only LoRA adapters are trained here, on frozen base models",
            param="full_weight",
        )
    if asked.training_data_attestation_id:
        raise NotSupportedError(NO_ATTESTATION, param="training_data_attestation_id")
    if asked.user_metadata.fields:
        raise NotSupportedError(
            "user_metadata: not kept with a model; give the session tags instead",
            param="user_metadata",
        )


async def _get_info(call: Call, asked: pb.GetInfoRequest) -> pb.GetInfoResponse:
    """What a model is, and its newest committed version."""
    run = await model_of(call, asked.model_id)
    live = await call.services.live.of(run.run_id)
    return pb.GetInfoResponse(
        type="get_info",
        model_data=pb.ModelData(model_name=run.base_model, tokenizer_id=run.base_model),
        model_id=run.run_id,
        is_lora=True,
        lora_rank=run.lora.rank,
        model_name=run.base_model,
        policy_version=version_of(protocol.policy_version(run.run_id, live.step)),
    )


async def _unload_model(call: Call, asked: pb.UnloadModelRequest) -> pb.AsyncResponse:
    """Says when everything that was submitted is done.

    Nothing has to be freed: a run that is left alone gives way to others by itself, and comes back when it is needed.
    """
    run = await model_of(call, asked.model_id)
    newest = await newest_operation(call, run)
    if newest is None:  # All is done, so the last that was done says so.
        run = await call.services.runs.current(run.run_id, call.principal.tenant_id)
        newest = protocol.operation_id(run.run_id, run.last_seq)
    return accepted("unload_model", newest)


async def is_done(call: Call, run: RunRow, operation_id: str) -> bool:
    """Whether Postgres knows that an operation is done, when its result is not kept any more."""
    run = await call.services.runs.current(run.run_id, call.principal.tenant_id)
    return run.last_seq >= int(operation_id.rpartition("-")[2])


async def newest_operation(call: Call, run: RunRow) -> str | None:
    """The operation of a run that was accepted last, None when all are known to be done.

    Raises:
        UnavailableError: NATS is not reachable.
    """
    services = call.services
    services.bus.require()
    newest = await journal.newest_seq(services.bus.jetstream, run.base_model, run.run_id)
    if newest is not None:
        return protocol.operation_id(run.run_id, newest)
    # The journal forgets what has been done.
    run = await services.runs.current(run.run_id, call.principal.tenant_id)
    if run.last_seq < 0:
        raise UnavailableError(f"{run.run_id} is not made yet; try again")
    return None


MODEL_METHODS: Methods = {
    "CreateModel": Unary(pb.CreateModelRequest, TRAIN, _create_model),
    "GetInfo": Unary(pb.GetInfoRequest, EITHER, _get_info),
    "UnloadModel": Unary(pb.UnloadModelRequest, TRAIN, _unload_model),
}
