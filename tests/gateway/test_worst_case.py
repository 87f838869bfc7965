"""The most that a completion may use, as it is held of credit."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from river_billing.events import UsageKind
from river_gateway.inference.worst_case import worst_case

CONTEXT = 1024


def worst(path: str, body: dict[str, Any]) -> tuple[int, int, int]:
    """Prompt and answer tokens at most, and the bytes of the body."""
    encoded = msgspec.json.encode(body)
    fields = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
    tokens = worst_case(path, fields, body_bytes=len(encoded), context_length=CONTEXT)
    return tokens[UsageKind.PROMPT], tokens[UsageKind.COMPLETION], len(encoded)


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/v1/chat/completions", {"max_tokens": 7}, 7),
        ("/v1/chat/completions", {"max_tokens": 7, "max_completion_tokens": 9}, 9),
        ("/v1/chat/completions", {"max_tokens": 7, "n": 3}, 21),
        ("/v1/chat/completions", {"max_tokens": None}, CONTEXT),
        ("/v1/chat/completions", {"max_tokens": 10**9}, CONTEXT),
        ("/v1/chat/completions", {"max_tokens": "many"}, CONTEXT),
        ("/v1/chat/completions", {"max_tokens": -1}, 0),
        ("/v1/completions", {"prompt": "a"}, 16),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 5, "n": 2}, 20),
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 5}, 10),
        ("/v1/completions", {"prompt": [], "max_tokens": 5}, 5),
        ("/v1/responses", {"max_output_tokens": 11}, 11),
        ("/v1/messages", {"max_tokens": 12}, 12),
    ],
    ids=str,
)
def test_answers_are_counted_at_their_longest(path: str, body: dict[str, Any], answer: int) -> None:
    """As many as there are choices, each as long as asked for, else as the engine would let it be."""
    prompt, completion, body_bytes = worst(path, body)
    assert completion == answer
    assert prompt == body_bytes


def test_a_prompt_has_no_more_tokens_than_bytes_nor_than_fit() -> None:
    """A long body counts as full contexts, one for each prompt."""
    assert worst("/v1/chat/completions", {"messages": "x" * 5000})[0] == CONTEXT
    assert worst("/v1/completions", {"prompt": ["x" * 5000, "y"]})[0] == 2 * CONTEXT
