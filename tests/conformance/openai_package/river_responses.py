"""Runs among the `openai` package's own tests, with their fixtures, and checks answers against types as they do.

Their tests of `responses.create` name no model, which no server can answer; these do.
"""

from __future__ import annotations

from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response

# Of the package's own tests, beside which this file is put.
from tests.utils import assert_matches_type  # type: ignore[import-not-found]

SYNC = pytest.mark.parametrize("client", [False, True], indirect=True, ids=["loose", "strict"])
ASYNC = pytest.mark.parametrize(
    "async_client",
    [False, True, {"http_client": "aiohttp"}],
    indirect=True,
    ids=["loose", "strict", "aiohttp"],
)
FUNCTION: Any = {
    "type": "function",
    "name": "name",
    "description": "description",
    "parameters": {"type": "object", "properties": {"foo": {"type": "string"}}},
    "strict": True,
}
ASKED: Any = {"model": "gpt-6-astra", "input": "string"}
# All that the package's test "with all params" sends, but for what a stateless server of text cannot do.
ALL_PARAMETERS: Any = {
    **ASKED,
    "background": False,
    "include": ["message.output_text.logprobs"],
    "instructions": "instructions",
    "max_output_tokens": 16,
    "max_tool_calls": 1,
    "metadata": {"foo": "string"},
    "parallel_tool_calls": True,
    "prompt_cache_key": "prompt-cache-key-1234",
    "prompt_cache_retention": "in_memory",
    "reasoning": {"effort": "none", "summary": "auto"},
    "safety_identifier": "safety-identifier-1234",
    "service_tier": "auto",
    "store": False,
    "temperature": 1,
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "tool_choice": "none",
    "tools": [FUNCTION],
    "top_logprobs": 2,
    "top_p": 1,
    "truncation": "auto",
    "user": "user-1234",
}


@SYNC
@pytest.mark.parametrize("asked", [ASKED, ALL_PARAMETERS], ids=["least", "all"])
def test_create(client: OpenAI, asked: Any) -> None:
    """A whole response is of the type that the package documents."""
    assert_matches_type(Response, client.responses.create(**asked), path=["response"])


@SYNC
@pytest.mark.parametrize("asked", [ASKED, ALL_PARAMETERS], ids=["least", "all"])
def test_stream(client: OpenAI, asked: Any) -> None:
    """Each event of a stream is of its type, and the last has the whole response."""
    events: list[Any] = list(client.responses.create(**asked, stream=True))
    for event in events:
        assert_matches_type(type(event), event, path=["event"])
    assert events[0].type == "response.created"
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert_matches_type(Response, last.response, path=["response"])


@ASYNC
async def test_create_async(async_client: AsyncOpenAI) -> None:
    """The same with the clients that do not block."""
    response = await async_client.responses.create(**ASKED)
    assert_matches_type(Response, response, path=["response"])
