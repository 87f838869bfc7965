"""The routes of sampling: sampling sessions, and samples of them, which are drawn while the client does something else.

Log-probabilities of samples are those of the distribution they were drawn from, so with the temperature and the cuts of
top-k and top-p applied; those of a prompt's tokens are the model's own.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from litestar import Response, get, post

from river_gateway.checkpoints import catalog
from river_gateway.context import context_of
from river_gateway.decoding import beside_the_loop
from river_gateway.dialects.tinker import bodies, samplers, samples
from river_gateway.dialects.tinker.http import AnyRequest, identity_of, read, told
from river_gateway.dialects.tinker.runs import river_path
from river_gateway.errors import InvalidFieldError, UnavailableError, UnknownModelError
from river_gateway.inference import sampling
from river_gateway.inference.models import resolve_model
from river_gateway.limits import SEQ_MAX
from river_gateway.services import services_of
from river_gateway.tenancy.auth import principal_of, requires
from river_gateway.training import validation

if TYPE_CHECKING:
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

_SCOPES = requires("infer")

# ---- Sampling sessions -----------------------------------------------------------------------------------------------


@post("/create_sampling_session", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def create_sampling_session(request: AnyRequest) -> Response[bytes]:
    """Settles what a sampling client samples from: a base model or a checkpoint."""
    asked = await read(request, bodies.CreateSamplingSession)
    validation.in_range(asked.sampling_session_seq_id, "sampling_session_seq_id", 0, SEQ_MAX)
    services, principal = services_of(request), principal_of(request)
    model = await _model_of(services, asked.base_model, asked.model_path, principal.tenant_id)
    sampler = await samplers.open_sampler(
        services,
        principal,
        session_id=asked.session_id,
        number=asked.sampling_session_seq_id,
        base_model=await _base_of(services, principal, model, asked.model_path),
        model=model,
        model_path=asked.model_path,
    )
    return told(bodies.SamplingSessionCreated(sampling_session_id=sampler))


@post("/join_sampling_session", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def join_sampling_session(request: AnyRequest) -> Response[bytes]:
    """A number for a copy of a sampling client, so that no two number their requests alike."""
    asked = await read(request, bodies.JoinSamplingSession)
    tenant_id = principal_of(request).tenant_id
    number = await services_of(request).samplers.join(asked.sampling_session_id, tenant_id)
    return told(bodies.SamplingSessionJoined(client_counter=number))


@get("/samplers/{sampler:str}", guards=[_SCOPES])
async def get_sampler(request: AnyRequest, sampler: str) -> Response[bytes]:
    """What a sampling session samples from."""
    found = await services_of(request).samplers.find(sampler, principal_of(request).tenant_id)
    return told(
        bodies.Sampler(
            sampler_id=found.sampler_id,
            base_model=found.base_model,
            model_path=found.model_path,
        )
    )


async def _model_of(
    services: Services, base_model: str | None, model_path: str | None, tenant_id: str
) -> str:
    """What River calls what is to be sampled from; a path goes before a base model.

    Raises:
        InvalidFieldError: neither is given, or the path is none of a checkpoint.
    """
    if model_path is not None:
        return await river_path(services, model_path, tenant_id, field="model_path")
    if base_model is None:
        raise InvalidFieldError("base_model: missing, or model_path", param="base_model")
    return base_model


async def _base_of(
    services: Services, principal: Principal, model: str, model_path: str | None
) -> str:
    """The base model of what River calls `model`.

    Raises:
        UnknownModelError: there is no such model, told in the client's words.
        InvalidFieldError: it is a checkpoint that is not there to be sampled from.
    """
    if model.startswith(catalog.SCHEME) or model in services.engines.bases():
        try:
            return (await resolve_model(services, model, principal.tenant_id)).base_model
        except UnknownModelError:
            pass
    elif not services.registered:
        raise UnavailableError("the registry of base models is being read; try again")
    name = model_path or model
    raise UnknownModelError(f"there is no model {name!r} to sample from", param="model_path")


# ---- Samples ---------------------------------------------------------------------------------------------------------


@post("/asample", guards=[_SCOPES], status_code=HTTPStatus.OK)
async def asample(request: AnyRequest) -> Response[bytes]:
    """Begins to draw samples. Asked again by the same number of its session, they are the same samples."""
    services, principal = services_of(request), principal_of(request)
    asked = await read(request, bodies.Sample)
    if asked.sampling_session_id is not None:
        found = await services.samplers.find(asked.sampling_session_id, principal.tenant_id)
        model, base_model = found.model, found.base_model
        identity = None if asked.seq_id is None else f"{found.sampler_id}:{asked.seq_id}"
    else:
        model = await _model_of(services, asked.base_model, asked.model_path, principal.tenant_id)
        base_model = await _base_of(services, principal, model, asked.model_path)
        identity = identity_of(request)
    wanted = await beside_the_loop(_size_of(asked), samples.request_of, asked, model)
    await sampling.check_affordable(services, principal, wanted.request, base_model)
    usage_id = context_of(request.scope).request_id

    async def draw() -> bytes:
        sampled = await sampling.sample(services, principal, wanted.request, request_id=usage_id)
        response = sampled.response
        size_bytes = samples.size_of(response)
        return await beside_the_loop(size_bytes, samples.message_of, response, wanted)

    request_id = services.futures.submit(
        principal.tenant_id,
        draw,
        asked_bytes=sampling.kept_bytes(wanted.request),
        identity=identity,
    )
    sequence_ids = [f"{request_id}:{index}" for index in range(asked.num_samples)]
    return told(bodies.Accepted(request_id=request_id, sample_sequence_ids=sequence_ids))


def _size_of(asked: bodies.Sample) -> int:
    """About how many bytes of numbers a request has."""
    tokens = sum(len(chunk.tokens or ()) for chunk in asked.prompt.chunks)
    targets = asked.target_prompt_logprobs
    return 8 * (tokens + (len(targets.data) if targets is not None else 0))


SAMPLING_HANDLERS: list[Any] = [
    create_sampling_session,
    join_sampling_session,
    get_sampler,
    asample,
]
