"""Samples: of a base model, a checkpoint or a model in training, asked for now and collected later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from river_gateway.checkpoints.catalog import SCHEME, parse_path
from river_gateway.decoding import beside_the_loop
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.call import INFER, Methods, Streaming, Unary
from river_gateway.dialects.river_grpc.limits import (
    ORDER_LOOK_AGAIN_S,
    ORDER_WAIT_S,
    PIECES_CONCURRENT_MAX,
    POLL_MARGIN_S,
    SAMPLES_HELD_S,
    SAMPLING_BATCH_MAX,
)
from river_gateway.dialects.river_grpc.models import model_of, newest_operation
from river_gateway.dialects.river_grpc.prompts import Piece, pieces_of, with_place
from river_gateway.dialects.river_grpc.refused import NO_RETAINED_KV
from river_gateway.dialects.river_grpc.samples import samples_body
from river_gateway.dialects.river_grpc.statuses import code_of
from river_gateway.errors import (
    EngineRefusedError,
    GatewayError,
    GoneError,
    InvalidFieldError,
    NotFoundError,
    NotSupportedError,
    RateLimitedError,
    UnavailableError,
)
from river_gateway.ids import uuid7
from river_gateway.inference import sampling
from river_gateway.inference.futures import AnyOutcome, Done, Failed
from river_gateway.inference.models import Wish, resolve_model
from river_gateway.inference.sample_checks import check_sample
from river_gateway.training import operations
from river_gateway.training.validation import Limits

if TYPE_CHECKING:
    from river_client import wire
    from river_gateway.dialects.river_grpc.call import Call
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

# ---- What is drawn from ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """A model by the name that completions take; samples wait until the operation `after` is done."""

    model: str
    base_model: str
    after: str | None = None
    pin: str | None = None


async def of_base(call: Call, base_model: str) -> Source:
    if base_model not in call.services.engines.bases():
        if not call.services.registered:
            raise UnavailableError("the registry of base models is being read; try again")
        raise NotFoundError(f"there is no base model {base_model!r}", param="base_model")
    return Source(base_model, base_model)


async def of_checkpoint(call: Call, path: str, base_model: str) -> Source:
    """A checkpoint, of `base_model` if one is named."""
    parsed = parse_path(path)
    if parsed is None or parsed.name is None:
        raise NotFoundError(f"there is no checkpoint {path!r}", param="checkpoint_path")
    target = await resolve_model(call.services, path, call.principal.tenant_id)
    if base_model and base_model != target.base_model:
        raise InvalidFieldError(
            f"base_model: {base_model!r}, but {path} is of {target.base_model!r}",
            param="base_model",
        )
    return Source(path, target.base_model)


async def _of_training(call: Call, model_id: str, *, pin: str = "", ordered: bool = True) -> Source:
    """A model in training: its version after all that was submitted before, its newest, or one that is named."""
    run = await model_of(call, model_id)
    source = Source(f"{SCHEME}{run.run_id}", run.base_model, pin=pin or None)
    if pin:
        await resolve_model(call.services, source.model, call.principal.tenant_id, Wish(pin=pin))
        return source
    if not ordered:
        return source
    return Source(source.model, run.base_model, after=await newest_operation(call, run))


# ---- Drawing ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Draw:
    """The work behind one request id; what was drawn stays, when a limit lets it go on only later."""

    services: Services
    principal: Principal
    source: Source
    pieces: list[Piece]
    _drawn: dict[int, wire.SampleResponse] = field(default_factory=dict[int, "wire.SampleResponse"])
    _wait_s: float = ORDER_WAIT_S

    async def __call__(self) -> bytes:
        await self._wait_for_training()
        for piece in self.pieces:
            self._check(piece)  # All of them, before any is drawn and billed.
        width = asyncio.Semaphore(PIECES_CONCURRENT_MAX)

        async def draw(number: int) -> None:
            async with width:
                self._drawn[number] = await self._draw(self.pieces[number])

        left = [number for number in range(len(self.pieces)) if number not in self._drawn]
        ended = await asyncio.gather(*map(draw, left), return_exceptions=True)
        for error in ended:
            if error is not None:
                raise error
        drawn = [(piece, self._drawn[number]) for number, piece in enumerate(self.pieces)]
        return await beside_the_loop(_size_of(drawn), samples_body, drawn)

    async def _wait_for_training(self) -> None:
        """Until what was submitted before is done; for long only outside of the tenant's places for running work.

        Raises:
            UnavailableError: it is not done; to be tried again soon.
        """
        if self.source.after is None:
            return
        wait_s, self._wait_s = self._wait_s, 0.0
        found = await self.services.results.result(self.source.after, wait_s)
        if found is None and not await self._is_done(self.source.after):
            raise UnavailableError(
                f"{self.source.after}, which was submitted before, is not done",
                retry_after_s=ORDER_LOOK_AGAIN_S,
            )

    async def _is_done(self, operation_id: str) -> bool:
        """Whether it is, by what Postgres said up to a minute ago, when its result is not kept any more."""
        run_id = operations.run_of_operation(operation_id)
        run = await self.services.runs.find(run_id, self.principal.tenant_id)
        return run.last_seq >= int(operation_id.rpartition("-")[2])

    def _check(self, piece: Piece) -> None:
        engine = self.services.engines.last_of(self.source.base_model)
        if engine is None:
            return  # Asking it says so.
        limits = Limits(context_length=engine.context_length, vocab_size=engine.vocab_size)
        try:
            check_sample(piece.to_wire(), limits)
        except InvalidFieldError as error:
            raise with_place(error, piece.places[0]) from None

    async def _draw(self, piece: Piece) -> wire.SampleResponse:
        try:
            sampled = await sampling.sample(
                self.services,
                self.principal,
                piece.to_wire(),
                request_id=uuid7(),
                pin=self.source.pin,
            )
        except (InvalidFieldError, EngineRefusedError) as error:
            raise with_place(error, piece.places[0]) from None
        (group,) = sampled.response.groups
        if any(sequence.stop_reason == "abort" for sequence in group.samples):
            raise UnavailableError("the engine broke off a sample; try again")
        return sampled.response


def _size_of(drawn: list[tuple[Piece, wire.SampleResponse]]) -> int:
    """About how many bytes there are to encode."""
    size_bytes = 0
    for piece, response in drawn:
        for group in response.groups:
            size_bytes += 4 * len(group.prompt_token_ids) * (len(piece.places) + piece.wanted.top)
            for sequence in group.samples:
                size_bytes += (12 + 8 * piece.wanted.top) * len(sequence.tokens)
                routing = sequence.expert_routing
                size_bytes += 0 if routing is None else len(routing.data)
    return size_bytes


def _submit(call: Call, source: Source, pieces: list[Piece], *, identity: str | None = None) -> str:
    draw = _Draw(call.services, call.principal, source, pieces)
    asked_bytes = sum(sampling.kept_bytes(piece.asked) for piece in pieces)
    return call.services.futures.submit(
        call.principal.tenant_id, draw, asked_bytes=asked_bytes, identity=identity
    )


def _begin(call: Call, source: Source, pieces: list[Piece], *, identity: str | None = None) -> str:
    """The request id of work that has begun.

    Raises:
        UnavailableError: there is too much unfinished already; the client asks again, since nothing was taken.
    """
    try:
        return _submit(call, source, pieces, identity=identity)
    except RateLimitedError as error:
        raise UnavailableError(error.message) from None


# ---- Whole requests --------------------------------------------------------------------------------------------------


async def _from_training(call: Call, asked: pb.SampleFromTrainingRequest) -> pb.AsyncResponse:
    """Samples of a model as it is once all that was submitted before is done."""
    source = await _of_training(call, asked.model_id)
    return _accepted(_begin(call, source, pieces_of(source.model, asked.prompts)))


async def _generate(call: Call, asked: pb.InferenceGenerateRequest) -> pb.AsyncResponse:
    """Samples of a base model."""
    source = await of_base(call, asked.base_model)
    return _accepted(_begin(call, source, pieces_of(source.model, asked.prompts)))


async def _from_checkpoint(call: Call, asked: pb.SampleFromCheckpointRequest) -> pb.AsyncResponse:
    """Samples of a checkpoint."""
    source = await of_checkpoint(call, asked.checkpoint_path, asked.base_model)
    return _accepted(_begin(call, source, pieces_of(source.model, asked.prompts)))


def _accepted(request_id: str) -> pb.AsyncResponse:
    return pb.AsyncResponse(request_id=request_id, type="inference")


# ---- Independent samples ---------------------------------------------------------------------------------------------


async def _submit_batch(
    call: Call, asked: pb.SubmitSamplingBatchRequest
) -> pb.SubmitSamplingBatchResponse:
    """Samples that are collected one by one; the same `idempotency_key` again gives the same request ids."""
    if asked.retained_kv_groups or asked.HasField("kv_cache_policy"):
        raise NotSupportedError(NO_RETAINED_KV, param="retained_kv_groups")
    if not asked.idempotency_key:
        raise InvalidFieldError("idempotency_key: missing", param="idempotency_key")
    source, prompts = await _source_of(call, asked)
    if not 1 <= len(prompts) <= SAMPLING_BATCH_MAX:
        raise InvalidFieldError(
            f"prompts: {len(prompts)}, must be 1 to {SAMPLING_BATCH_MAX}", param="prompts"
        )
    pieces = [
        Piece(piece.asked, piece.wanted, [place])
        for piece in pieces_of(source.model, prompts)
        for place in piece.places
    ]
    return pb.SubmitSamplingBatchResponse(
        request_ids=[
            _begin(call, source, [piece], identity=f"{asked.idempotency_key}:{piece.places[0]}")
            for piece in pieces
        ]
    )


async def _source_of(
    call: Call, asked: pb.SubmitSamplingBatchRequest
) -> tuple[Source, list[pb.InferencePrompt]]:
    latest = asked.policy_selection == pb.SAMPLING_POLICY_SELECTION_LATEST_SNAPSHOT
    pin, kind = asked.pinned_policy_id, asked.WhichOneof("source")
    if kind != "training" and (pin or latest):
        raise InvalidFieldError(
            "source: only a model in training has policies to choose from", param="source"
        )
    if pin and latest:
        raise InvalidFieldError(
            "pinned_policy_id: give that or the newest snapshot", param="pinned_policy_id"
        )
    match kind:
        case "training":
            training = asked.training
            source = await _of_training(call, training.model_id, pin=pin, ordered=not latest)
            return source, list(training.prompts)
        case "base":
            return await of_base(call, asked.base.base_model), list(asked.base.prompts)
        case "checkpoint":
            checkpoint = asked.checkpoint
            path, base_model = checkpoint.checkpoint_path, checkpoint.base_model
            return await of_checkpoint(call, path, base_model), list(checkpoint.prompts)
        case _:
            raise InvalidFieldError("source: missing", param="source")


async def _retrieve(
    call: Call, asked: pb.RetrieveSamplingResultsRequest
) -> AsyncIterator[pb.SamplingResult | bytes]:
    """How each of the requests stands, as soon as one is done or a moment has passed."""
    request_ids = list(asked.request_ids)
    if not 1 <= len(request_ids) <= SAMPLING_BATCH_MAX:
        raise InvalidFieldError(
            f"request_ids: {len(request_ids)}, must be 1 to {SAMPLING_BATCH_MAX}",
            param="request_ids",
        )
    if len(set(request_ids)) != len(request_ids):
        raise InvalidFieldError("request_ids: one comes twice", param="request_ids")
    hold_s = call.time_left_s(at_most_s=SAMPLES_HELD_S, margin_s=POLL_MARGIN_S)
    await _until_one_is_done(
        [lambda one=one: _outcome(call, one, hold_s) for one in request_ids], hold_s
    )
    for request_id in request_ids:
        yield await _standing(call, request_id)


async def _until_one_is_done(
    waits: list[Callable[[], Awaitable[AnyOutcome]]], hold_s: float
) -> None:
    tasks = [asyncio.ensure_future(wait()) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=hold_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _outcome(call: Call, request_id: str, timeout_s: float) -> AnyOutcome:
    return await call.services.futures.result(call.principal.tenant_id, request_id, timeout_s)


async def _standing(call: Call, request_id: str) -> pb.SamplingResult | bytes:
    try:
        outcome = await _outcome(call, request_id, 0.0)
    except (NotFoundError, GoneError, UnavailableError) as error:
        return _retrieval_error(request_id, error)
    match outcome:
        case Done():
            return await beside_the_loop(len(outcome.body), _wrapped, request_id, outcome.body)
        case Failed():
            failed = pb.RequestFailedResponse(error_category=outcome.type, message=outcome.message)
            return pb.SamplingResult(request_id=request_id, failed=failed)
        case _:
            return pb.SamplingResult(request_id=request_id, pending=True)


def _wrapped(request_id: str, body: bytes) -> bytes:
    answer = pb.RetrieveFutureResponse.FromString(body)
    if not answer.HasField("inference"):
        error = InvalidFieldError(f"request_ids: {request_id} is no sample", param="request_ids")
        return _retrieval_error(request_id, error).SerializeToString()
    result = pb.SamplingResult(request_id=request_id, inference=answer.inference)
    return result.SerializeToString()


def _retrieval_error(request_id: str, error: GatewayError) -> pb.SamplingResult:
    code: grpc.StatusCode = code_of(error.status)
    number = int(code.value[0])
    return pb.SamplingResult(
        request_id=request_id,
        error=pb.SamplingRetrievalError(code=number, message=error.message),
    )


SAMPLING_METHODS: Methods = {
    "SampleFromTraining": Unary(pb.SampleFromTrainingRequest, INFER, _from_training),
    "InferenceGenerate": Unary(pb.InferenceGenerateRequest, INFER, _generate),
    "SampleFromCheckpoint": Unary(pb.SampleFromCheckpointRequest, INFER, _from_checkpoint),
    "SubmitSamplingBatch": Unary(pb.SubmitSamplingBatchRequest, INFER, _submit_batch),
    "RetrieveSamplingResults": Streaming(pb.RetrieveSamplingResultsRequest, INFER, _retrieve),
}
