"""Token-in/token-out sampling: many prompts, many samples each, with the log-probabilities training needs.

Every prompt is one `AsyncLLM.generate` of `num_samples` samples, when its turn has come; vLLM batches them. The
log-probabilities are those of the distribution the tokens were drawn from (after temperature and top-k/top-p): the
engine runs with `logprobs_mode=processed_logprobs`. Those of prompts are the model's own (`prompt_scores.py`).

vLLM always draws a token. Where none is wanted, it is not told and not counted.
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
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from river_engine import limits
from river_engine.adapters import AdapterStore, Version
from river_engine.admission import Turn
from river_engine.counting import Generate, final, prompts_only
from river_engine.errors import EngineBusy, InvalidField
from river_engine.prompt_scores import PromptWish, prompt_wishes
from river_engine.protocol import (
    EngineSample,
    EngineSampleGroup,
    EngineSampleResult,
    EngineSequence,
    ExpertRouting,
)
from river_engine.routing import ROUTING_SALT, RoutingShape
from river_engine.sample_fields import check_fields
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
        check_fields(request, self._vocab_size)
        if request.return_expert_routing and self._routing is None:
            raise InvalidField(
                "this engine does not record it: its model has no routed experts, or it was started without "
                "RIVER_EXPERT_ROUTING",
                param="return_expert_routing",
            )
        prompts = await self._prompt_tokens(request)
        wishes = prompt_wishes(request, prompts, self._vocab_size)
        async with AsyncExitStack() as stack:
            if request.max_tokens == 0:
                stack.enter_context(prompts_only())
            turns = [
                _turn(request, tokens, self._draws_at_most(request, tokens)) for tokens in prompts
            ]
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
                            self._sample_in_turn(request, index, tokens, wish, turn, version)
                        )
                        for index, (tokens, wish, turn) in enumerate(
                            zip(prompts, wishes, turns, strict=True)
                        )
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
            drawn = request.max_tokens or 1
            if len(tokens) + drawn > self._context_length:
                raise InvalidField(
                    f"{len(tokens)} prompt tokens and {drawn} to be drawn exceed the context length of "
                    f"{self._context_length}",
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

    def _draws_at_most(self, request: EngineSample, prompt: list[int]) -> int:
        """How many tokens vLLM may draw for each sample of a prompt."""
        if request.max_tokens is None:
            return self._context_length - len(prompt)
        return max(1, request.max_tokens)

    def _sampling_params(
        self, request: EngineSample, prompt_index: int, tokens: list[int], wish: PromptWish
    ) -> SamplingParams:
        stop_ids = [self._special_ids[stop] for stop in request.stop if stop in self._special_ids]
        stop_strings = [stop for stop in request.stop if stop not in self._special_ids]
        # vLLM adds the sample's index to the seed; prompts are kept as far apart as that reaches.
        seed = request.seed
        if seed is not None:
            seed = (seed + prompt_index * request.num_samples) % limits.SEED_MAX
        return SamplingParams(
            n=request.num_samples if request.max_tokens != 0 else 1,
            max_tokens=self._draws_at_most(request, tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop=stop_strings or None,
            stop_token_ids=[*stop_ids, *request.stop_token_ids] or None,
            ignore_eos=request.ignore_eos,
            seed=seed,
            logprobs=request.logprobs or 0,
            flat_logprobs=True,
            # Stop strings have to be looked for in text as it comes; otherwise decoding once at the end is cheaper.
            detokenize=bool(stop_strings),
            output_kind=RequestOutputKind.FINAL_ONLY,
            # vLLM leaves the prefix cache alone for prompts to be scored.
            **wish.options(),
        )

    async def _sample_in_turn(
        self,
        request: EngineSample,
        index: int,
        tokens: list[int],
        wish: PromptWish,
        turn: Turn,
        version: Version | None,
    ) -> EngineSampleGroup:
        async with self._turnstile.inside(turn, version) as lora:
            return await self._sample_prompt(request, index, tokens, wish, lora)

    async def _sample_prompt(
        self,
        request: EngineSample,
        index: int,
        tokens: list[int],
        wish: PromptWish,
        lora: LoRARequest | None,
    ) -> EngineSampleGroup:
        params = self._sampling_params(request, index, tokens, wish)
        request_id = f"{request.request_id}-{index}"
        # A tenant finds in the cache what it has asked itself, and nothing of others.
        salt = (ROUTING_SALT if request.return_expert_routing else "") + (request.tenant_id or "")
        output = await final(
            self._generate(
                tokens_input(tokens, cache_salt=salt or None), params, request_id, lora_request=lora
            )
        )
        if request.max_tokens == 0:
            samples = [
                self._nothing_drawn(output.outputs[0], request, tokens)
            ] * request.num_samples
        else:
            samples = [self._sequence(part, request, tokens, params) for part in output.outputs]
        return EngineSampleGroup(
            prompt_token_ids=tokens,
            samples=samples,
            cached_prompt_tokens=output.num_cached_tokens or 0,
            prompt_logprobs=wish.logprobs_of(output),
            prompt_top_logprobs=wish.top_of(output),
            prompt_target_logprobs=wish.targets_of(output),
        )

    def _nothing_drawn(
        self, part: CompletionOutput, request: EngineSample, prompt: list[int]
    ) -> EngineSequence:
        """The sample of a request for no tokens, without the one that vLLM has drawn."""
        return EngineSequence(
            text="",
            tokens=[],
            logprobs=[],
            stop_reason="length",
            top_logprobs=[] if request.logprobs else None,
            expert_routing=self._experts_of(part, request, len(prompt)),
        )

    def _experts_of(
        self, part: CompletionOutput, request: EngineSample, tokens: int
    ) -> ExpertRouting | None:
        """Of a sequence of `tokens` tokens, as far as it is told."""
        if not request.return_expert_routing:
            return None
        assert self._routing is not None
        rows = part.routed_experts
        return self._routing.of_sample(None if rows is None else rows[: tokens - 1], tokens)

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
        return EngineSequence(
            text=text,
            tokens=tokens,
            # Of each position, the first entry is the token drawn.
            logprobs=[flat.logprobs[start] for start in flat.start_indices],
            stop_reason=part.finish_reason,
            top_logprobs=_top_logprobs(flat, request.logprobs) if request.logprobs else None,
            expert_routing=self._experts_of(part, request, len(prompt) + len(tokens)),
        )


def _turn(request: EngineSample, prompt: list[int], draws_max: int) -> Turn:
    return Turn(
        tenant=request.tenant_id or "",
        version=None if request.adapter is None else request.adapter.name,
        prompt_tokens=len(prompt),
        completion_tokens_max=draws_max,
        sequences=request.num_samples,
        size_bytes=len(prompt) * limits.BYTES_PER_TOKEN,
    )


def _top_logprobs(flat: FlatLogprobs, top: int) -> list[list[tuple[int, float]]]:
    """Per position the `top` most likely tokens; vLLM puts the one drawn before them."""
    rows: list[list[tuple[int, float]]] = []
    for start in flat.start_indices:
        first, last = start + 1, start + 1 + top
        rows.append(list(zip(flat.token_ids[first:last], flat.logprobs[first:last], strict=True)))
    return rows


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
