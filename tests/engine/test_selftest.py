"""That an engine that ignores adapters, or mixes them up, is found out."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.outputs import RequestOutput

from river_engine.selftest import SelfTestError, self_test

from .test_adapter_store import TARGETS, Vllm


def outputs(values: Any) -> Any:
    """A `generate` that gives the next of `values` as the log-probability of every prompt token."""
    numbers = iter(values)

    async def generate(
        prompt: Any, _params: Any, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput]:
        tokens = prompt["prompt_token_ids"]
        value = next(numbers)
        logprobs = FlatLogprobs()
        logprobs.append(None)
        for token in tokens[1:]:
            logprobs.append({token: Logprob(value)})
        yield RequestOutput(request_id, None, tokens, logprobs, [], finished=True)

    return generate


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (itertools.repeat(-1.0), "an adapter moves log-probabilities by 0.00000 only"),
        ([-1.0, -2.0, -3.0, -1.5, -2.0, -3.0], "base: batch mates change"),
        ([-1.0, -2.0, -3.0, -1.0, -2.0, -1.0], "lm_head: batch mates change"),
    ],
    ids=["ignored", "base-disturbed", "adapter-disturbed"],
)
async def test_a_wrong_engine_is_found_out(values: Any, message: str) -> None:
    """By the kind of module, or the row of the batch, that is wrong."""
    with pytest.raises(SelfTestError, match=message):
        await self_test(Vllm(), outputs(values), TARGETS, vocab_size=16, exact=True, rank_max=8)


async def test_a_right_engine_passes() -> None:
    """Every adapter moves something, and nothing depends on batch mates."""
    values = [-1.0, -2.0, -3.0] * 2
    await self_test(Vllm(), outputs(values), TARGETS, vocab_size=16, exact=True, rank_max=8)
