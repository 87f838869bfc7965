"""The routes of training: models, and the operations on them. Each answers at once; results are asked for later.

A client sends its operations without waiting, some before others that they come after, so that one whose body is wrong
must not leave its place empty: those behind it would wait for it. It is accepted, and fails in its turn.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, post

from river_client import wire
from river_gateway.checkpoints import catalog
from river_gateway.dialects.tinker import bodies, datums, samplers
from river_gateway.dialects.tinker.http import AnyRequest, read, read_with, told
from river_gateway.dialects.tinker.ids import OperationRequest, ephemeral_name, model_id
from river_gateway.dialects.tinker.results import PROTOBUF
from river_gateway.dialects.tinker.runs import find_run, river_path
from river_gateway.errors import (
    AheadError,
    ConflictError,
    GatewayError,
    InvalidFieldError,
    NotFoundError,
    NotSupportedError,
    UnsupportedFieldError,
)
from river_gateway.limits import SEQ_MAX, SNAPSHOT_TTL_S
from river_gateway.services import services_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import opening, operations, session_list, submitting, validation

_SCOPES = requires("train")
_ADAM = "adamw"

# ---- Models ----------------------------------------------------------------------------------------------------------


@post("/create_model", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def create_model(request: AnyRequest) -> Response[bytes]:
    """Opens a run. Asked again by the same number of the same session, it is the same run."""
    asked = await read(request, bodies.CreateModel)
    _check_optimizer(asked.optimizer_config)
    if asked.lora_config is None:
        raise UnsupportedFieldError(
            "lora_config: missing, and training all weights of a model is not offered",
            param="lora_config",
        )
    lora = wire.LoraConfig(
        rank=asked.lora_config.rank,
        seed=asked.lora_config.seed,
        train_attn=asked.lora_config.train_attn,
        train_mlp=asked.lora_config.train_mlp,
        train_unembed=asked.lora_config.train_unembed,
        expert_layout=bodies.EXPERT_LAYOUT,
    )
    run = wire.CreateRun(
        session_id=asked.session_id,
        base_model=asked.base_model,
        lora=lora,
        user_metadata=asked.user_metadata or {},
    )
    model = await _open(request, run, asked.model_seq_id)
    return _accepted(OperationRequest(model, 0, "create_model"))


async def _open(request: AnyRequest, asked: wire.CreateRun, number: int | None) -> str:
    """The name of a new run, the `number`-th of its session, or of the one that was opened as such before."""
    services, principal = services_of(request), principal_of(request)
    number = _number(number, "model_seq_id")
    model = model_id(asked.session_id, number)
    try:
        run = await opening.open_run(services, principal, asked, identity=model)
    except ConflictError:
        raise ConflictError(
            f"model_seq_id: {number} is of another model of this session already",
            param="model_seq_id",
        ) from None
    await session_list.describe_run(
        services.pool, run_id=run.run_id, tenant_id=principal.tenant_id, model_seq_id=number
    )
    return model


@post("/get_info", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def get_info(request: AnyRequest) -> Response[bytes]:
    """What a model is made of."""
    asked = await read(request, bodies.OfModel)
    run = await find_run(services_of(request), asked.model_id, principal_of(request).tenant_id)
    return told(
        bodies.ModelInfo(
            model_id=asked.model_id,
            model_data=bodies.ModelData(model_name=run.base_model, tokenizer_id=run.base_model),
            model_name=run.base_model,
            lora_rank=run.lora.rank,
        )
    )


# ---- Operations ------------------------------------------------------------------------------------------------------


@post("/forward_backward", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def forward_backward(request: AnyRequest) -> Response[bytes]:
    """Gradients of a loss, or with `forward_only` its values alone."""
    is_protobuf = PROTOBUF in request.headers.get("content-type", "")
    asked = await read_with(request, datums.of_protobuf if is_protobuf else datums.of_json)
    request_id = OperationRequest(asked.model, asked.seq, "forward_backward")
    return await _submit(request, request_id, asked.operation)


@post("/forward", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def forward(request: AnyRequest) -> Response[bytes]:
    """The forward half alone, as older clients ask for it."""
    asked = await read_with(request, datums.of_json)
    request_id = OperationRequest(asked.model, asked.seq, "forward_backward")
    return await _submit(request, request_id, asked.operation)


@post("/optim_step", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def optim_step(request: AnyRequest) -> Response[bytes]:
    """A step of the optimizer on the gradients since the last one."""
    asked = await read(request, bodies.OptimStep)
    adam = asked.adam_params or bodies.AdamParams()
    operation = wire.OptimStep(
        adam=wire.AdamParams(
            lr=adam.learning_rate,
            beta1=adam.beta1,
            beta2=adam.beta2,
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            grad_clip_norm=adam.grad_clip_norm or None,
        )
    )
    wrong = _wrong_optimizer(asked.optimizer_params)
    request_id = OperationRequest(asked.model_id, asked.seq_id, "optim_step")
    return await _submit(request, request_id, wrong or operation)


@post("/save_weights", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def save_weights(request: AnyRequest) -> Response[bytes]:
    """Keeps weights and optimizer, to go on from."""
    asked = await read(request, bodies.SaveWeights)
    operation = wire.SaveWeights(
        name=f"{asked.seq_id:06d}" if asked.path is None else asked.path,
        mode="training",
        ttl_s=asked.ttl_seconds,
        overwrite=asked.overwrite,
        user_metadata=asked.user_metadata or {},
    )
    request_id = OperationRequest(asked.model_id, asked.seq_id, "save_weights")
    return await _submit(request, request_id, operation)


@post("/save_weights_external", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def save_weights_external(request: AnyRequest) -> Response[bytes]:
    """Keeps weights as files to download, encrypted for whom the client says."""
    asked = await read(request, bodies.SaveWeightsExternal)
    operation = wire.SaveWeights(
        name=asked.path,
        mode="external",
        ttl_s=asked.ttl_seconds,
        age_recipients=asked.age_encryption_recipients or [],
    )
    request_id = OperationRequest(asked.model_id, asked.seq_id, "save_weights_external")
    return await _submit(request, request_id, operation)


@post("/save_weights_for_sampler", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def save_weights_for_sampler(request: AnyRequest) -> Response[bytes]:
    """Keeps weights to sample from: under a name, or for a sampling session and a day.

    A session of the kind `inflight` samples from the run's newest weights, which are never older than those saved.
    """
    asked = await read(request, bodies.SaveWeightsForSampler)
    services, principal = services_of(request), principal_of(request)
    run = await find_run(services, asked.model_id, principal.tenant_id)
    name, ttl_s, sampler = asked.path, asked.ttl_seconds, None
    wrong: GatewayError | None = None
    if name is None:
        number = _number(asked.sampling_session_seq_id, "sampling_session_seq_id")
        name, ttl_s = ephemeral_name(number), SNAPSHOT_TTL_S
        live = f"{catalog.SCHEME}{run.run_id}"
        saved = catalog.checkpoint_path(run.run_id, "inference", name)
        try:
            sampler = await samplers.open_sampler(
                services,
                principal,
                session_id=run.session_id,
                number=number,
                base_model=run.base_model,
                model=live if asked.kind == "inflight" else saved,
                model_path=None,
            )
        except (NotFoundError, ConflictError) as error:
            wrong = error
    request_id = OperationRequest(asked.model_id, asked.seq_id, "save_weights_for_sampler", sampler)
    operation = wire.SaveWeights(
        name=name, mode="inference", ttl_s=ttl_s, user_metadata=asked.user_metadata or {}
    )
    return await _submit(request, request_id, wrong or operation)


@post("/load_weights", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def load_weights(request: AnyRequest) -> Response[bytes]:
    """Puts a checkpoint's weights, with its optimizer or without, into a model or into a new one."""
    asked = await read(request, bodies.LoadWeights)
    if asked.session_id is not None:
        return await _create_loaded(request, asked, asked.session_id)
    if asked.model_id is None or asked.seq_id is None:
        raise InvalidFieldError(
            "model_id: missing with its seq_id, or session_id", param="model_id"
        )
    operation: wire.LoadWeights | GatewayError
    try:
        path = await _source(request, asked)
        operation = wire.LoadWeights(path=path, optimizer=asked.optimizer)
    except GatewayError as error:
        operation = error
    request_id = OperationRequest(asked.model_id, asked.seq_id, "load_weights", asked.path)
    return await _submit(request, request_id, operation)


async def _create_loaded(
    request: AnyRequest, asked: bodies.LoadWeights, session_id: str
) -> Response[bytes]:
    """A new run that begins where a checkpoint ends: its base model and shape, unless another base is asked for."""
    _check_optimizer(asked.optimizer_config)
    services, principal = services_of(request), principal_of(request)
    path = await _source(request, asked)
    source = await operations.find_source(services, path, principal.tenant_id)
    run = wire.CreateRun(
        session_id=session_id,
        base_model=asked.base_model or source.base_model,
        checkpoint=path,
        optimizer=asked.optimizer,
        user_metadata=asked.user_metadata or {},
    )
    model = await _open(request, run, asked.model_seq_id)
    return _accepted(OperationRequest(model, 0, "load_weights", asked.path))


async def _source(request: AnyRequest, asked: bodies.LoadWeights) -> str:
    if asked.weights_access_token is not None:
        raise UnsupportedFieldError(
            "weights_access_token: loading with another account's token is not offered; a published checkpoint can be "
            "copied",
            param="weights_access_token",
        )
    return await river_path(services_of(request), asked.path, principal_of(request).tenant_id)


# ---- Submitting ------------------------------------------------------------------------------------------------------


async def _submit(
    request: AnyRequest, request_id: OperationRequest, operation: wire.AnyOperation | GatewayError
) -> Response[bytes]:
    """Accepts an operation; where there is none but an error, or it turns out to be wrong, it is one that fails."""
    services, principal = services_of(request), principal_of(request)
    run = await find_run(services, request_id.model, principal.tenant_id)
    wrong = operation if isinstance(operation, GatewayError) else None
    if not isinstance(operation, GatewayError):
        asked = wire.SubmitOperation(seq=request_id.seq, operation=operation)
        try:
            await submitting.submit(services, principal, run, asked)
        except AheadError:
            raise  # It only came too early, and is sent again.
        except (InvalidFieldError, NotFoundError, ConflictError, NotSupportedError) as error:
            wrong = (
                error  # Where the run itself takes no operation now, it does not take this either.
            )
    if wrong is not None:
        await submitting.refuse(services, principal, run, request_id.seq, wrong)
    return _accepted(request_id)


def _accepted(request_id: OperationRequest) -> Response[bytes]:
    return told(bodies.Accepted(request_id=str(request_id), model_id=request_id.model))


def _wrong_optimizer(chosen: bodies.OptimizerConfig | None) -> UnsupportedFieldError | None:
    """What is wrong with an optimizer that is not AdamW."""
    if chosen is None or chosen.type == _ADAM:
        return None
    return UnsupportedFieldError(
        f"optimizer: {chosen.type!r} is not offered, only {_ADAM!r} is", param="optimizer"
    )


def _check_optimizer(chosen: bodies.OptimizerConfig | None) -> None:
    if (wrong := _wrong_optimizer(chosen)) is not None:
        raise wrong


def _number(value: int | None, field: str) -> int:
    """A number that a client counts with.

    Raises:
        InvalidFieldError: it is missing or out of range.
    """
    if value is None:
        raise InvalidFieldError(f"{field}: missing", param=field)
    validation.in_range(value, field, 0, SEQ_MAX)
    return value


TRAINING_HANDLERS: list[Any] = [
    create_model,
    get_info,
    forward_backward,
    forward,
    optim_step,
    save_weights,
    save_weights_for_sampler,
    save_weights_external,
    load_weights,
]
