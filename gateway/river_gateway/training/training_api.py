"""The training API under `/river/v1`: sessions, runs, operations, sampling."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any, cast

import msgspec
from litestar import Response, delete, get, post
from litestar.response import Stream

from river_billing.events import UsageKind
from river_client import wire
from river_engine.protocol import (
    EngineSample,
    EngineSampleGroup,
    EngineSampleResult,
    EngineSequence,
    ExpertRouting,
)
from river_gateway.bus import BusError
from river_gateway.checkpoints import catalog
from river_gateway.checkpoints.catalog import RunRow
from river_gateway.codec import (
    IDEMPOTENCY_HEADER,
    MSGPACK,
    WireRequest,
    encoder_for,
    idempotency_key,
    preferred_wait_s,
    reply,
)
from river_gateway.context import context_of
from river_gateway.disconnect import unless_client_leaves
from river_gateway.errors import (
    ConflictError,
    GatewayError,
    InvalidFieldError,
    NotFoundError,
    NotSupportedError,
    UnavailableError,
)
from river_gateway.ids import idempotent_id, seed_of
from river_gateway.inference.metering import usage_event
from river_gateway.inference.models import (
    POLICY_VERSION_HEADER,
    Target,
    Wish,
    ask_current,
    resolve_model,
)
from river_gateway.limits import LONG_POLL_DEFAULT_S, LONG_POLL_MAX_S, SESSION_HEARTBEAT_INTERVAL_S
from river_gateway.services import Services, services_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.tenancy.quotas import tokens_guessed
from river_gateway.training import operations, validation
from river_trainer import protocol

# ---- Sessions --------------------------------------------------------------------------------------------------------


@post("/sessions", guards=[requires("train")], status_code=HTTPStatus.CREATED)
async def create_session(request: WireRequest, data: wire.CreateSession) -> Response[wire.Session]:
    """Opens a session; its client is expected to send heartbeats."""
    principal = principal_of(request)
    session = wire.Session(
        session_id=idempotent_id("ses", principal.tenant_id, idempotency_key(request)),
        heartbeat_interval_s=SESSION_HEARTBEAT_INTERVAL_S,
    )
    await catalog.insert_session(
        services_of(request).pool,
        session_id=session.session_id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        tags=validation.tags(data.tags),
    )
    return reply(request, session, status=HTTPStatus.CREATED)


@post(
    "/sessions/{session_id:str}/heartbeat",
    guards=[requires("train")],
    status_code=HTTPStatus.NO_CONTENT,
)
async def beat_session(request: WireRequest, session_id: str) -> None:
    """Says that the client of a session is alive."""
    await catalog.beat_session(
        services_of(request).pool,
        session_id=session_id,
        tenant_id=principal_of(request).tenant_id,
    )


@delete("/sessions/{session_id:str}", guards=[requires("train")], status_code=HTTPStatus.NO_CONTENT)
async def end_session(request: WireRequest, session_id: str) -> None:
    """Ends a session; its runs and checkpoints stay."""
    await catalog.end_session(
        services_of(request).pool,
        session_id=session_id,
        tenant_id=principal_of(request).tenant_id,
    )


# ---- Runs ------------------------------------------------------------------------------------------------------------


@post("/runs", guards=[requires("train")], status_code=HTTPStatus.CREATED)
async def create_run(request: WireRequest, data: wire.CreateRun) -> Response[wire.Run]:
    """Opens a run. The trainer makes its adapter as operation 0, which can be awaited."""
    services, principal = services_of(request), principal_of(request)
    await catalog.check_open_session(
        services.pool, session_id=data.session_id, tenant_id=principal.tenant_id
    )
    trainer = services.trainers.last_of(data.base_model)
    if trainer is None:
        raise _no_trainer(services, data.base_model)
    run_id = idempotent_id("run", principal.tenant_id, idempotency_key(request))
    source = None
    if data.checkpoint is not None:
        source = await operations.find_source(services, data.checkpoint, principal.tenant_id)
    asked = data.lora or (source.lora if source else wire.LoraConfig())
    shape = validation.adapter_shape(
        asked, rank_max(services, data.base_model), default_seed=seed_of(run_id)
    )
    lora = msgspec.structs.replace(asked, alpha=shape.alpha, seed=shape.seed)
    if source is not None:
        operations.check_source(
            source,
            field="checkpoint",
            base_model=data.base_model,
            lora=lora,
            with_optimizer=data.optimizer,
        )
    is_new = await catalog.insert_run(
        services.pool,
        run_id=run_id,
        tenant_id=principal.tenant_id,
        session_id=data.session_id,
        base_model=data.base_model,
        lora=lora,
        context_length=trainer.context_length,
    )
    run = await catalog.find_run(services.pool, run_id=run_id, tenant_id=principal.tenant_id)
    if (run.session_id, run.base_model, run.lora) != (data.session_id, data.base_model, lora):
        raise ConflictError(
            f"{IDEMPOTENCY_HEADER}: another run was made under this key", param=IDEMPOTENCY_HEADER
        )
    try:
        task = protocol.CreateRun(
            shape=shape,
            checkpoint=source.location if source else None,
            optimizer=data.optimizer,
        )
        await operations.publish_task(services, run, principal, 0, task)
    except (BusError, UnavailableError):
        if is_new:
            await catalog.delete_unstarted_run(services.pool, run_id)
        raise
    return reply(request, run.to_wire(), status=HTTPStatus.CREATED)


def _no_trainer(services: Services, base_model: str) -> GatewayError:
    if not services.registered:
        return UnavailableError("the registry of base models is being read; try again")
    if base_model in services.engines.bases():
        return InvalidFieldError(
            f"base_model: {base_model!r} cannot be trained here", param="base_model"
        )
    return NotFoundError(f"there is no base model {base_model!r}", param="base_model")


def rank_max(services: Services, base_model: str) -> int:
    """What the trainers and the engines of a base can all hold."""
    known = services.trainers.last_of(base_model), services.engines.last_of(base_model)
    return min(record.max_lora_rank for record in known if record is not None)


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
    services, principal = services_of(request), principal_of(request)
    run = await _own_run(request, run_id)
    await operations.check_not_learning(services, run, principal.tenant_id, data.seq)
    task = await operations.make_task(services, run, principal.tenant_id, data)
    tokens = protocol.task_tokens(task)
    services.bus.require()
    with services.quotas.admit(principal, tokens) as ticket:
        await services.credit.hold_operation(principal, run, data.seq, tokens)
        operation = await operations.publish_task(services, run, principal, data.seq, task)
        ticket.settle(tokens)
    wait_s = preferred_wait_s(request, at_most_s=LONG_POLL_MAX_S)
    if not wait_s:
        return reply(
            request,
            wire.OperationAccepted(operation_id=operation),
            status=HTTPStatus.ACCEPTED,
            headers=ticket.headers,
        )
    encode, media_type = encoder_for(request)

    async def accepted() -> AsyncGenerator[bytes]:
        result = await operations.result_if_any(services, run, operation, wait_s)
        yield encode(wire.OperationAccepted(operation_id=operation, result=result))

    headers = {"location": f"{wire.API_PREFIX}/operations/{operation}"}
    headers |= {name.decode(): value.decode() for name, value in ticket.headers}
    return Stream(  # type: ignore[return-value]
        accepted(), status_code=HTTPStatus.ACCEPTED, media_type=media_type, headers=headers
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
    services, principal = services_of(request), principal_of(request)
    services.meter.admit()
    wish = Wish(pin=request.headers.get(POLICY_VERSION_HEADER))
    target = await resolve_model(services, data.model, principal.tenant_id, wish)
    known = services.engines.last_of(target.base_model)
    if known is None:
        raise UnavailableError(f"no engine of {target.base_model!r} has registered yet; try again")
    if data.return_expert_routing and not known.expert_routing:
        raise NotSupportedError(
            f"return_expert_routing: the engines of {target.base_model!r} do not record it",
            param="return_expert_routing",
        )
    validation.sample_request(
        data, validation.Limits(context_length=known.context_length, vocab_size=known.vocab_size)
    )
    request_id = context_of(request.scope).request_id
    worst = _worst_case(data, known.context_length)
    with (
        services.quotas.admit(principal, _tokens_at_most(data)) as ticket,
        await services.credit.hold(
            principal, target.base_model, known.context_length, worst
        ) as hold,
    ):
        target, (result, context_length) = await unless_client_leaves(
            request.receive,
            ask_current(
                services,
                principal.tenant_id,
                target,
                lambda current: _ask_engine(
                    services, current, data, principal.tenant_id, request_id
                ),
            ),
        )
        usage = _usage(result)
        ticket.settle(usage.prompt_tokens + usage.completion_tokens)
        event = usage_event(
            request_id=request_id,
            principal=principal,
            target=target,
            context_length=context_length,
            quantities={
                UsageKind.PROMPT: usage.prompt_tokens - usage.cached_prompt_tokens,
                UsageKind.CACHED_PROMPT: usage.cached_prompt_tokens,
                UsageKind.COMPLETION: usage.completion_tokens,
            },
            hold=hold,
        )
    await services.meter.record(event)
    return reply(
        request,
        wire.SampleResponse(
            groups=[_group(group) for group in result.groups],
            policy_version=target.policy_version,
            usage=usage,
        ),
        headers=ticket.headers,
    )


def _tokens_at_most(asked: wire.SampleRequest) -> int:
    """What a request may use, with a guess for prompts that are text."""
    if asked.prompt_token_ids is not None:
        prompts = [len(prompt) for prompt in asked.prompt_token_ids]
    else:
        prompts = [tokens_guessed(len(prompt)) for prompt in asked.prompts or ()]
    return sum(prompts) + len(prompts) * asked.num_samples * asked.max_tokens


def _worst_case(asked: wire.SampleRequest, context_length: int) -> dict[UsageKind, int]:
    """The most tokens that it may be billed: a text has no more of them than bytes."""
    sizes = [len(ids) for ids in asked.prompt_token_ids or ()]
    sizes += [min(len(text.encode()), context_length) for text in asked.prompts or ()]
    return {
        UsageKind.PROMPT: sum(sizes),
        UsageKind.COMPLETION: len(sizes) * asked.num_samples * asked.max_tokens,
    }


async def _ask_engine(
    services: Services, target: Target, asked: wire.SampleRequest, tenant_id: str, request_id: str
) -> tuple[EngineSampleResult, int]:
    """The engine's samples and its context length."""
    body = EngineSample(
        request_id=request_id,
        tenant_id=tenant_id,
        adapter=target.adapter,
        prompts=asked.prompts,
        prompt_token_ids=asked.prompt_token_ids,
        num_samples=asked.num_samples,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        stop=asked.stop,
        seed=asked.seed,
        logprobs=asked.logprobs,
        return_prompt_logprobs=asked.return_prompt_logprobs,
        return_expert_routing=asked.return_expert_routing,
    )
    prompts = len(asked.prompts or asked.prompt_token_ids or ())
    opened = await services.upstream.open(
        "/river/sample",
        msgspec.msgpack.encode(body),
        target=target,
        tenant_id=tenant_id,
        request_id=request_id,
        content_type=MSGPACK,
        tokens=prompts * asked.num_samples * asked.max_tokens,
    )
    result = msgspec.msgpack.decode(await opened.read(), type=EngineSampleResult)
    return result, opened.engine.context_length


def _usage(result: EngineSampleResult) -> wire.TokenUsage:
    """`prompt_tokens` are all prompt tokens, the cached ones included; a prompt counts once for all its samples."""
    return wire.TokenUsage(
        prompt_tokens=sum(len(group.prompt_token_ids) for group in result.groups),
        cached_prompt_tokens=sum(group.cached_prompt_tokens for group in result.groups),
        completion_tokens=sum(
            len(sequence.tokens) for group in result.groups for sequence in group.samples
        ),
    )


def _group(group: EngineSampleGroup) -> wire.SampleGroup:
    return wire.SampleGroup(
        prompt_token_ids=group.prompt_token_ids,
        samples=[_sequence(sequence) for sequence in group.samples],
        prompt_logprobs=group.prompt_logprobs,
    )


def _sequence(sequence: EngineSequence) -> wire.SampleSequence:
    top: list[list[wire.TopLogprob]] | None = None
    if sequence.top_logprobs is not None:
        top = [
            [wire.TopLogprob(token=token, logprob=logprob) for token, logprob in position]
            for position in sequence.top_logprobs
        ]
    return wire.SampleSequence(
        text=sequence.text,
        tokens=sequence.tokens,
        logprobs=sequence.logprobs,
        stop_reason=cast("wire.StopReason", sequence.stop_reason),
        top_logprobs=top,
        expert_routing=_tensor(sequence.expert_routing),
    )


def _tensor(routing: ExpertRouting | None) -> wire.Tensor | None:
    if routing is None:
        return None
    return wire.Tensor(dtype=routing.dtype, shape=routing.shape, data=routing.data)


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
