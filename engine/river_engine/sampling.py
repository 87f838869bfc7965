"""Token-in/token-out sampling: many prompts, many samples each, with the log-probabilities training needs.

Every prompt is one `AsyncLLM.generate` of `num_samples` samples, when its turn has come; vLLM batches them. The
log-probabilities are those of the distribution the tokens were drawn from (after temperature and top-k/top-p): the
engine runs with `logprobs_mode=processed_logprobs`.
"""

from __future__ import annotations

import asyncio
import copy
from contextlib import AsyncExitStack
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from river_engine import limits
from river_engine.adapters import AdapterStore, Version
from river_engine.admission import Turn
from river_engine.counting import Generate, final
from river_engine.errors import EngineBusy, InvalidField
from river_engine.protocol import (
    EngineSample,
    EngineSampleGroup,
    EngineSampleResult,
    EngineSequence,
)
from river_engine.routing import ROUTING_SALT, RoutingShape
from river_engine.turns import Turnstile


class Sampler:
    """Answers `EngineSample`s with the engine behind `generate`."""

    def __init__(
        self,
        generate: Generate,
        store: AdapterStore,
        turnstile: Turnstile,
        tokenizer: Any,
        *,
        context_length: int,
        vocab_size: int,
        routing: RoutingShape | None = None,
    ) -> None:
        self._generate = generate
        self._store = store
        self._turnstile = turnstile
        self._tokenizer = tokenizer
        # vLLM changes the truncation of its own while it tokenises; another thread's call would then fail.
        self._encoder = copy.deepcopy(tokenizer)
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._routing = routing
        self._special_ids = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }

    async def sample(self, request: EngineSample) -> EngineSampleResult:
        """Draws the samples; cancelling this aborts them.

        Raises:
            EngineRefusal: a field is wrong, the adapter is unfit, too many wait, or the engine is going down.
        """
        _check_fields(request)
        if request.return_expert_routing and self._routing is None:
            raise InvalidField(
                "this engine does not record it: its model has no routed experts, or it was started without "
                "RIVER_EXPERT_ROUTING",
                param="return_expert_routing",
            )
        prompts = await self._prompt_tokens(request)
        async with AsyncExitStack() as stack:
            turns = [_turn(request, tokens) for tokens in prompts]
            ready = request.adapter is None or self._store.is_here(request.adapter)
            stack.enter_context(self._turnstile.joined(turns, ready=ready))
            version = None
            if request.adapter is not None:
                version = await stack.enter_async_context(self._store.hold(request.adapter))
            if not ready:
                self._turnstile.fetched(turns)
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(
                            self._sample_in_turn(request, index, tokens, turn, version)
                        )
                        for index, (tokens, turn) in enumerate(zip(prompts, turns, strict=True))
                    ]
            except BaseExceptionGroup as errors:
                raise _first(errors) from errors
        return EngineSampleResult(groups=[task.result() for task in tasks])

    async def _prompt_tokens(self, request: EngineSample) -> list[list[int]]:
        """The prompts as token ids, each within the vocabulary and short enough."""
        if request.prompts is not None:
            field = "prompts"
            prompts = await self._encode(request.prompts)
        else:
            field = "prompt_token_ids"
            prompts = request.prompt_token_ids or []
        for index, tokens in enumerate(prompts):
            param = f"{field}[{index}]"
            if not tokens:
                raise InvalidField("a prompt needs at least one token", param=param)
            if max(tokens) >= self._vocab_size or min(tokens) < 0:
                position = next(
                    position
                    for position, token in enumerate(tokens)
                    if not 0 <= token < self._vocab_size
                )
                raise InvalidField(
                    f"token {tokens[position]} is not in the vocabulary of {self._vocab_size}",
                    param=f"{param}[{position}]",
                )
            if len(tokens) + request.max_tokens > self._context_length:
                raise InvalidField(
                    f"{len(tokens)} prompt tokens and max_tokens={request.max_tokens} exceed the context "
                    f"length of {self._context_length}",
                    param=param,
                )
        return prompts

    async def _encode(self, texts: list[str]) -> list[list[int]]:
        characters_max = self._context_length * limits.PROMPT_CHARACTERS_PER_TOKEN_MAX
        for index, text in enumerate(texts):
            if len(text) > characters_max:
                raise InvalidField(
                    f"{len(text)} characters; a prompt has at most {characters_max}",
                    param=f"prompts[{index}]",
                )

        def encode() -> list[list[int]]:
            return [self._encoder.encode(text, add_special_tokens=False) for text in texts]

        if sum(map(len, texts)) > limits.TOKENIZE_INLINE_CHARACTERS_MAX:
            return await asyncio.to_thread(encode)
        return encode()

    def _sampling_params(self, request: EngineSample, prompt_index: int) -> SamplingParams:
        stop_ids = [self._special_ids[stop] for stop in request.stop if stop in self._special_ids]
        stop_strings = [stop for stop in request.stop if stop not in self._special_ids]
        # vLLM adds the sample's index to the seed; prompts are kept as far apart as that reaches.
        seed = request.seed
        if seed is not None:
            seed = (seed + prompt_index * request.num_samples) % limits.SEED_MAX
        return SamplingParams(
            n=request.num_samples,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop=stop_strings or None,
            stop_token_ids=stop_ids or None,
            seed=seed,
            logprobs=request.logprobs or 0,
            prompt_logprobs=0 if request.return_prompt_logprobs else None,
            flat_logprobs=True,
            # Stop strings have to be looked for in text as it comes; otherwise decoding once at the end is cheaper.
            detokenize=bool(stop_strings),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _sample_in_turn(
        self,
        request: EngineSample,
        index: int,
        tokens: list[int],
        turn: Turn,
        version: Version | None,
    ) -> EngineSampleGroup:
        async with self._turnstile.inside(turn, version) as lora:
            return await self._sample_prompt(request, index, tokens, lora)

    async def _sample_prompt(
        self, request: EngineSample, index: int, tokens: list[int], lora: LoRARequest | None
    ) -> EngineSampleGroup:
        params = self._sampling_params(request, index)
        request_id = f"{request.request_id}-{index}"
        # A tenant finds in the cache what it has asked itself, and nothing of others.
        salt = (ROUTING_SALT if request.return_expert_routing else "") + (request.tenant_id or "")
        output = await final(
            self._generate(
                tokens_input(tokens, cache_salt=salt or None), params, request_id, lora_request=lora
            )
        )
        return EngineSampleGroup(
            prompt_token_ids=tokens,
            samples=[self._sequence(part, request, tokens, params) for part in output.outputs],
            cached_prompt_tokens=output.num_cached_tokens or 0,
            prompt_logprobs=_prompt_logprobs(output) if request.return_prompt_logprobs else None,
        )

    def _sequence(
        self,
        part: CompletionOutput,
        request: EngineSample,
        prompt: list[int],
        params: SamplingParams,
    ) -> EngineSequence:
        tokens = list(part.token_ids)
        flat = part.logprobs
        assert isinstance(flat, FlatLogprobs)
        assert len(flat) == len(tokens)
        assert part.finish_reason in ("stop", "length", "abort"), part.finish_reason
        text = part.text
        if not params.detokenize:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        routing = None
        if request.return_expert_routing:
            assert self._routing is not None
            routing = self._routing.of_sample(part.routed_experts, len(prompt) + len(tokens))
        return EngineSequence(
            text=text,
            tokens=tokens,
            # Of each position, the first entry is the token drawn.
            logprobs=[flat.logprobs[start] for start in flat.start_indices],
            stop_reason=part.finish_reason,
            top_logprobs=_top_logprobs(flat, request.logprobs) if request.logprobs else None,
            expert_routing=routing,
        )


def _turn(request: EngineSample, prompt: list[int]) -> Turn:
    return Turn(
        tenant=request.tenant_id or "",
        version=None if request.adapter is None else request.adapter.name,
        prompt_tokens=len(prompt),
        completion_tokens_max=request.max_tokens,
        sequences=request.num_samples,
        size_bytes=len(prompt) * limits.BYTES_PER_TOKEN,
    )


def _check_fields(request: EngineSample) -> None:
    """The ranges of everything but the prompts' tokens."""
    if (request.prompts is None) == (request.prompt_token_ids is None):
        raise InvalidField(
            "exactly one of prompts and prompt_token_ids must be given", param="prompts"
        )
    count = len(request.prompts if request.prompts is not None else request.prompt_token_ids or [])
    checks = (
        (
            "prompts" if request.prompts is not None else "prompt_token_ids",
            count,
            1,
            limits.PROMPTS_MAX,
        ),
        ("num_samples", request.num_samples, 1, limits.SAMPLES_MAX),
        ("max_tokens", request.max_tokens, 1, float("inf")),
        ("temperature", request.temperature, 0.0, 1e6),
        ("logprobs", request.logprobs or 0, 0, limits.TOP_LOGPROBS_MAX),
        ("stop", len(request.stop), 0, limits.STOPS_MAX),
        ("seed", request.seed or 0, 0, limits.SEED_MAX),
        ("top_k", request.top_k, -1, float("inf")),
    )
    for name, value, lowest, highest in checks:
        if not lowest <= value <= highest:
            raise InvalidField(f"must be between {lowest} and {highest}, is {value}", param=name)
    if not 0.0 < request.top_p <= 1.0:
        raise InvalidField(f"must be above 0 and at most 1, is {request.top_p}", param="top_p")
    if "" in request.stop:
        raise InvalidField("must not be empty", param=f"stop[{request.stop.index('')}]")


def _top_logprobs(flat: FlatLogprobs, top: int) -> list[list[tuple[int, float]]]:
    """Per position the `top` most likely tokens; vLLM puts the one drawn before them."""
    rows: list[list[tuple[int, float]]] = []
    for start in flat.start_indices:
        first, last = start + 1, start + 1 + top
        rows.append(list(zip(flat.token_ids[first:last], flat.logprobs[first:last], strict=True)))
    return rows


def _prompt_logprobs(output: RequestOutput) -> list[float | None]:
    """[T], of each prompt token given those before it; None for the first."""
    flat = output.prompt_logprobs
    assert isinstance(flat, FlatLogprobs)
    assert len(flat) == len(output.prompt_token_ids or [])
    values: list[float | None] = [
        flat.logprobs[start] if end > start else None
        for start, end in zip(flat.start_indices, flat.end_indices, strict=True)
    ]
    return values


def _first(errors: BaseExceptionGroup) -> BaseException:
    """What to answer for a group of failed prompts: the first failure, as a refusal where it is one."""
    error = errors.exceptions[0]
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, VLLMClientError | ValueError):
        return InvalidField(str(error))
    if isinstance(error, EngineDeadError | EngineGenerateError):
        return EngineBusy("the engine is going down")
    return error
