"""What a request to vLLM's routes is thought to cost, by its body."""

from __future__ import annotations

import msgspec
import pytest

from river_engine.costs import generates, turn_of_body


@pytest.mark.parametrize(
    ("body", "prompt_tokens", "completion_tokens", "sequences"),
    [
        (
            {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 5, "n": 3},
            116,
            5,
            3,
        ),
        ({"messages": [], "max_completion_tokens": 7, "max_tokens": 9}, 13, 9, 1),
        ({"prompt": "x" * 400}, 103, 1000, 1),
        ({"prompt": [1, 2, 3], "max_tokens": 10**9}, 3, 1000, 1),
        ({"prompt": [[1, 2, 3], [4]], "n": 2, "max_tokens": 1}, 4, 1, 4),
        ({"prompt": ["ab", "cd"], "n": "two", "max_tokens": None}, 13, 1000, 2),
        ({"input": "hello", "max_output_tokens": 12, "n": 10**9}, 15, 12, 256),
        ({}, 0, 1000, 1),
    ],
)
def test_a_body_s_cost_is_estimated(
    body: dict[str, object], prompt_tokens: int, completion_tokens: int, sequences: int
) -> None:
    """By what it says and how long it is, whatever nonsense is in it."""
    encoded = msgspec.json.encode(body)
    fields = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
    found = turn_of_body(fields, len(encoded), tenant="ann", version=None, context_length=1000)
    assert found.completion_tokens_max == completion_tokens
    assert found.sequences == sequences
    assert abs(found.prompt_tokens - prompt_tokens) <= 3


def test_what_computes_nothing_need_not_wait() -> None:
    """Tokenising and rendering; a route nobody knows is taken to compute."""
    assert not generates("/tokenize")
    assert not generates("/v1/chat/completions/render")
    assert generates("/v1/chat/completions")
    assert generates("/v1/new")
