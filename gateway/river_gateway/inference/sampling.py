"""Samples of one policy version, token in and token out: admitted, drawn by an engine, metered."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import msgspec

from river_billing.events import UsageKind
from river_client import wire
from river_engine.protocol import (
    EngineSample,
    EngineSampleGroup,
    EngineSampleResult,
    EngineSequence,
    ExpertRouting,
)
from river_gateway.codec import MSGPACK
from river_gateway.decoding import beside_the_loop
from river_gateway.errors import NotSupportedError, UnavailableError
from river_gateway.inference.metering import usage_event
from river_gateway.inference.models import Target, Wish, ask_current, resolve_model
from river_gateway.inference.sample_checks import check_sample, target_tables
from river_gateway.tenancy.quotas import tokens_guessed
from river_gateway.training.validation import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_engine.protocol import TokenTable
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

_ALWAYS_WANTED: AbstractAsyncContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class Sampled:
    """`headers` say what is left of the key's and the tenant's limits."""

    response: wire.SampleResponse
    headers: Sequence[tuple[bytes, bytes]]


async def sample(
    services: Services,
    principal: Principal,
    asked: wire.SampleRequest,
    *,
    request_id: str,
    pin: str | None = None,
    while_wanted: AbstractAsyncContextManager[None] = _ALWAYS_WANTED,
) -> Sampled:
    """Draws samples; `request_id`, a UUIDv7, is the identity of the usage event.

    `pin` is the policy version that the client insists on. The engine is asked inside the block `while_wanted`, which
    may end the work; what it then had produced is not billed, since engines do not say how much that is.

    Raises:
        InvalidFieldError: a field is wrong.
        NotFoundError: the model is unknown, or the version of it that was asked for is no longer kept.
        NotSupportedError: the engines of that base do not record which experts they use.
        OutOfCreditError, RateLimitedError: see `credit` and `quotas`.
        UnavailableError: no engine can answer now.
    """
    services.meter.admit()
    target = await resolve_model(services, asked.model, principal.tenant_id, Wish(pin=pin))
    known = services.engines.last_of(target.base_model)
    if known is None:
        raise UnavailableError(f"no engine of {target.base_model!r} has registered yet; try again")
    if asked.return_expert_routing and not known.expert_routing:
        raise NotSupportedError(
            f"return_expert_routing: the engines of {target.base_model!r} do not record it",
            param="return_expert_routing",
        )
    limits = Limits(context_length=known.context_length, vocab_size=known.vocab_size)
    # Checking many numbers must not hold up everybody else's requests.
    ids_bytes = 4 * sum(len(ids) for ids in asked.prompt_token_ids or ())
    await beside_the_loop(ids_bytes, check_sample, asked, limits)
    targets = await beside_the_loop(_size_bytes(asked.prompt_targets), target_tables, asked, limits)
    worst = _worst_case(asked, known.context_length)
    with (
        services.quotas.admit(principal, _tokens_at_most(asked, known.context_length)) as ticket,
        await services.credit.hold(
            principal, target.base_model, known.context_length, worst
        ) as hold,
    ):
        async with while_wanted:
            target, (result, context_length) = await ask_current(
                services,
                principal.tenant_id,
                target,
                lambda current: _ask_engine(
                    services,
                    current,
                    _engine_sample(asked, current, targets, principal.tenant_id, request_id),
                    tokens=worst[UsageKind.COMPLETION],
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
    # It is taken in before anything is waited for, so what was produced is billed even to a client that leaves now.
    await services.meter.record(event)
    response = wire.SampleResponse(
        groups=[_group(group) for group in result.groups],
        policy_version=target.policy_version,
        usage=usage,
    )
    return Sampled(response, ticket.headers)


async def check_affordable(
    services: Services, principal: Principal, asked: wire.SampleRequest, base_model: str
) -> None:
    """Makes sure, before it is kept, that a request which will be worked on later is right and can be paid for.

    Raises:
        InvalidFieldError: a field is wrong.
        OutOfCreditError: it cannot be paid for, as far as is known now.
        UnavailableError: that cannot be known at the moment.
    """
    known = services.engines.last_of(base_model)
    if known is None:
        raise UnavailableError(f"no engine of {base_model!r} has registered yet; try again")
    limits = Limits(context_length=known.context_length, vocab_size=known.vocab_size)
    ids_bytes = 4 * sum(len(ids) for ids in asked.prompt_token_ids or ())
    await beside_the_loop(ids_bytes, check_sample, asked, limits)
    worst = _worst_case(asked, known.context_length)
    with await services.credit.hold(principal, base_model, known.context_length, worst):
        pass


def kept_bytes(asked: wire.SampleRequest) -> int:
    """About what a request takes in memory while it waits; an integer in a list takes 36 bytes."""
    ids = sum(len(prompt) for prompt in asked.prompt_token_ids or ())
    texts = sum(len(text) for text in asked.prompts or ())
    return 36 * ids + texts + _size_bytes(asked.prompt_targets)


def _size_bytes(arrays: Sequence[wire.Numbers] | None) -> int:
    """About what the numbers of `arrays` take; of rows, by the first."""
    total = 0
    for array in arrays or ():
        if isinstance(array, wire.Tensor):
            total += len(array.data)
        elif array:
            total += 4 * len(array) * (len(array[0]) if isinstance(array[0], list) else 1)
    return total


def _tokens_at_most(asked: wire.SampleRequest, context_length: int) -> int:
    """What a request may use, with a guess for prompts that are text."""
    if asked.prompt_token_ids is not None:
        prompts = [len(prompt) for prompt in asked.prompt_token_ids]
    else:
        prompts = [tokens_guessed(len(prompt)) for prompt in asked.prompts or ()]
    return sum(prompts) + sum(_draws_at_most(asked, size, context_length) for size in prompts)


def _worst_case(asked: wire.SampleRequest, context_length: int) -> dict[UsageKind, int]:
    """The most tokens that it may be billed: a text has at least one of them, and no more than bytes."""
    sizes = [(len(ids), len(ids)) for ids in asked.prompt_token_ids or ()]
    sizes += [(1, min(len(text.encode()), context_length)) for text in asked.prompts or ()]
    return {
        UsageKind.PROMPT: sum(most for _, most in sizes),
        UsageKind.COMPLETION: sum(
            _draws_at_most(asked, least, context_length) for least, _ in sizes
        ),
    }


def _draws_at_most(asked: wire.SampleRequest, prompt_tokens: int, context_length: int) -> int:
    """How many tokens may be drawn for a prompt, in all its samples."""
    each = asked.max_tokens
    if each is None:
        each = max(0, context_length - prompt_tokens)
    return asked.num_samples * each


def _engine_sample(
    asked: wire.SampleRequest,
    target: Target,
    targets: list[TokenTable] | None,
    tenant_id: str,
    request_id: str,
) -> EngineSample:
    return EngineSample(
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
        stop_token_ids=asked.stop_token_ids,
        ignore_eos=asked.ignore_eos,
        seed=asked.seed,
        logprobs=asked.logprobs,
        return_prompt_logprobs=asked.return_prompt_logprobs,
        prompt_top_logprobs=asked.prompt_top_logprobs,
        prompt_logprobs_last=asked.prompt_logprobs_last,
        prompt_targets=targets,
        return_expert_routing=asked.return_expert_routing,
    )


async def _ask_engine(
    services: Services, target: Target, body: EngineSample, *, tokens: int
) -> tuple[EngineSampleResult, int]:
    """The engine's samples and its context length; at most so many `tokens` are to be drawn."""
    assert body.tenant_id is not None
    opened = await services.upstream.open(
        "/river/sample",
        msgspec.msgpack.encode(body),
        target=target,
        tenant_id=body.tenant_id,
        request_id=body.request_id,
        content_type=MSGPACK,
        tokens=tokens,
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
    tokens, top, scores = len(group.prompt_token_ids), None, None
    if group.prompt_top_logprobs is not None:
        found = group.prompt_top_logprobs
        shape = (tokens, found.width)
        top = wire.TopLogprobs(
            token_ids=wire.Tensor(dtype="int32", shape=shape, data=found.token_ids),
            logprobs=wire.Tensor(dtype="float32", shape=shape, data=found.logprobs),
        )
    if group.prompt_target_logprobs is not None:
        data = group.prompt_target_logprobs
        width = len(data) // 4 // max(1, tokens - 1)
        scores = wire.Tensor(dtype="float32", shape=(tokens - 1, width), data=data)
    return wire.SampleGroup(
        prompt_token_ids=group.prompt_token_ids,
        samples=[_sequence(sequence) for sequence in group.samples],
        prompt_logprobs=group.prompt_logprobs,
        prompt_top_logprobs=top,
        prompt_target_logprobs=scores,
        cached_prompt_tokens=group.cached_prompt_tokens,
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
