"""Everything a sampling request must satisfy before an engine is asked, by field, index and limit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from river_engine.protocol import TokenTable
from river_gateway.errors import InvalidFieldError
from river_gateway.limits import (
    PROMPT_CHARS_PER_TOKEN_MAX,
    SAMPLE_LOGPROBS_MAX,
    SAMPLE_PROMPTS_MAX,
    SAMPLE_STOP_TOKENS_MAX,
    SAMPLE_STOPS_MAX,
    SAMPLES_MAX,
    SEED_MAX,
    TEMPERATURE_MAX,
)
from river_gateway.training.arrays import integers, token_ids
from river_gateway.training.validation import Limits, in_range

if TYPE_CHECKING:
    from river_client import wire


def check_sample(request: wire.SampleRequest, limits: Limits) -> None:
    """Checks a sampling request, all but its `prompt_targets`, against the base model's limits.

    Raises:
        InvalidFieldError: see the module.
    """
    if (request.prompts is None) == (request.prompt_token_ids is None):
        raise InvalidFieldError(
            "exactly one of prompts and prompt_token_ids must be given", param="prompts"
        )
    _check_prompts(request, limits)
    in_range(request.num_samples, "num_samples", 1, SAMPLES_MAX)
    if request.max_tokens is not None:
        in_range(request.max_tokens, "max_tokens", 0, limits.context_length)
    in_range(request.temperature, "temperature", 0.0, TEMPERATURE_MAX)
    in_range(request.top_p, "top_p", math.ulp(0.0), 1.0)
    if request.top_k != -1:
        in_range(request.top_k, "top_k", 1, limits.vocab_size)
    if request.seed is not None:
        in_range(request.seed, "seed", 0, SEED_MAX)
    for name in ("logprobs", "prompt_top_logprobs"):
        most = getattr(request, name)
        if most is not None:
            in_range(most, name, 0, SAMPLE_LOGPROBS_MAX)
    if request.prompt_logprobs_last is not None:
        in_range(request.prompt_logprobs_last, "prompt_logprobs_last", 1, limits.context_length)
    _check_stops(request, limits)


def target_tables(request: wire.SampleRequest, limits: Limits) -> list[TokenTable] | None:
    """The `prompt_targets` of a checked request as engines take them.

    Raises:
        InvalidFieldError: they do not fit the prompts, or an id is neither -1 nor in the vocabulary.
    """
    if request.prompt_targets is None:
        return None
    prompts = request.prompt_token_ids
    if prompts is None:
        raise InvalidFieldError(
            "prompt_targets: the prompts have to be given as token ids", param="prompt_targets"
        )
    if len(request.prompt_targets) != len(prompts):
        raise InvalidFieldError(
            f"prompt_targets: {len(request.prompt_targets)} arrays for {len(prompts)} prompts",
            param="prompt_targets",
        )
    return [
        _target_table(targets, f"prompt_targets[{index}]", len(prompt), limits)
        for index, (targets, prompt) in enumerate(zip(request.prompt_targets, prompts, strict=True))
    ]


def _target_table(
    targets: wire.Numbers, where: str, prompt_tokens: int, limits: Limits
) -> TokenTable:
    ids = integers(targets, where)
    if ids.ndim == 1:
        ids = ids[:, None]
    rows = prompt_tokens - 1
    if len(ids) not in (rows, prompt_tokens) or not 1 <= ids.shape[1] <= SAMPLE_LOGPROBS_MAX:
        raise InvalidFieldError(
            f"{where}: shape {list(ids.shape)}, must be [{rows}, 1 to {SAMPLE_LOGPROBS_MAX}] for a prompt of "
            f"{prompt_tokens} tokens",
            param=where,
        )
    ids = ids[:rows]
    outside = (ids < -1) | (ids >= limits.vocab_size)
    if outside.any():
        row, column = np.unravel_index(int(np.argmax(outside)), ids.shape)
        place = f"{where}[{row}][{column}]"
        raise InvalidFieldError(
            f"{place}: {ids[row, column]} is neither -1 nor in the vocabulary of {limits.vocab_size}",
            param=place,
        )
    return TokenTable(width=ids.shape[1], token_ids=ids.astype("<i4").tobytes())


def _check_stops(request: wire.SampleRequest, limits: Limits) -> None:
    if len(request.stop) > SAMPLE_STOPS_MAX:
        raise InvalidFieldError(
            f"stop: {len(request.stop)}, at most {SAMPLE_STOPS_MAX}", param="stop"
        )
    for index, stop in enumerate(request.stop):
        if not stop:
            raise InvalidFieldError(f"stop[{index}]: empty", param=f"stop[{index}]")
    if len(request.stop_token_ids) > SAMPLE_STOP_TOKENS_MAX:
        raise InvalidFieldError(
            f"stop_token_ids: {len(request.stop_token_ids)}, at most {SAMPLE_STOP_TOKENS_MAX}",
            param="stop_token_ids",
        )
    for index, token in enumerate(request.stop_token_ids):
        in_range(token, f"stop_token_ids[{index}]", 0, limits.vocab_size - 1)


def _check_prompts(request: wire.SampleRequest, limits: Limits) -> None:
    field = "prompts" if request.prompts is not None else "prompt_token_ids"
    prompts = request.prompts if request.prompts is not None else request.prompt_token_ids
    assert prompts is not None
    if not 1 <= len(prompts) <= SAMPLE_PROMPTS_MAX:
        raise InvalidFieldError(
            f"{field}: {len(prompts)} prompts, must be 1 to {SAMPLE_PROMPTS_MAX}", param=field
        )
    for index, prompt in enumerate(prompts):
        where = f"{field}[{index}]"
        if not prompt:
            raise InvalidFieldError(f"{where}: empty", param=where)
    chars_max = PROMPT_CHARS_PER_TOKEN_MAX * limits.context_length
    for index, text in enumerate(request.prompts or ()):
        if len(text) > chars_max:
            where = f"prompts[{index}]"
            raise InvalidFieldError(
                f"{where}: {len(text)} characters, at most {chars_max} for the context length of "
                f"{limits.context_length}",
                param=where,
            )
    for index, ids in enumerate(request.prompt_token_ids or ()):
        where = f"prompt_token_ids[{index}]"
        # This comes first: a body may hold millions of ids. An engine draws a token even where none is asked for.
        drawn = request.max_tokens or 1
        if len(ids) + drawn > limits.context_length:
            raise InvalidFieldError(
                f"{where}: {len(ids)} tokens and {drawn} to be drawn are more than the context length of "
                f"{limits.context_length}",
                param=where,
            )
        token_ids(ids, where, limits.vocab_size)
