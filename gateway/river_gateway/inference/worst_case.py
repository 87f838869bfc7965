"""The most tokens that a completion may use, from its own fields: what is held of credit before any work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from river_billing.events import UsageKind

if TYPE_CHECKING:
    from collections.abc import Mapping

_ANSWER_FIELDS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_COMPLETIONS_PATH = "/v1/completions"
_COMPLETIONS_ANSWER_TOKENS = 16
"""How long an answer of that route is unless the client says so; elsewhere it may fill the context."""

_int_decoder = msgspec.json.Decoder(int | None)
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def worst_case(
    path: str, fields: Mapping[str, msgspec.Raw], *, body_bytes: int, context_length: int
) -> dict[UsageKind, int]:
    """Prompt and answer tokens at most, for each of the answers asked for.

    A text has no more tokens than bytes, and a template adds to a message no more than its JSON does. What is wrong in
    the fields is for the engine to refuse.
    """
    prompts = _prompt_count(fields.get("prompt"))
    choices = prompts * max(_number(fields.get("n")) or 1, _number(fields.get("best_of")) or 1, 1)
    return {
        UsageKind.PROMPT: min(body_bytes, prompts * context_length),
        UsageKind.COMPLETION: choices
        * min(_answer_tokens(path, fields, context_length), context_length),
    }


def _answer_tokens(path: str, fields: Mapping[str, msgspec.Raw], context_length: int) -> int:
    for name in _ANSWER_FIELDS:
        asked = _number(fields.get(name))
        if asked is not None:
            return max(asked, 0)
    return _COMPLETIONS_ANSWER_TOKENS if path == _COMPLETIONS_PATH else context_length


def _prompt_count(prompt: msgspec.Raw | None) -> int:
    """A list of numbers is one prompt; of texts or of lists there are as many as it is long."""
    if prompt is None or not _is_list(prompt):
        return 1
    items = _list_decoder.decode(prompt)
    return len(items) if items and (_is_list(items[0]) or _is_text(items[0])) else 1


def _number(field: msgspec.Raw | None) -> int | None:
    if field is None:
        return None
    try:
        return _int_decoder.decode(field)
    except msgspec.ValidationError:
        return None


def _is_list(value: msgspec.Raw) -> bool:
    return bytes(memoryview(value)[:1]) == b"["


def _is_text(value: msgspec.Raw) -> bool:
    return bytes(memoryview(value)[:1]) == b'"'
