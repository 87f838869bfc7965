"""What a request to vLLM's routes may cost, as far as its body says so: an estimate, made without tokenising."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import msgspec

from river_engine.admission import Turn
from river_engine.limits import BYTES_PER_TOKEN, SAMPLES_MAX

_MAX_TOKENS_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_PLAIN_PATHS = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/ping",
        "/v1/messages/count_tokens",
        "/inference/v1/abort_requests",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
    }
)
_PLAIN_ENDINGS = ("/render", "/derender", "/cancel")

Fields = Mapping[str, msgspec.Raw]


def generates(path: str) -> bool:
    """Whether a POST to `path` may make vLLM compute: anything that is not known to be harmless."""
    return path not in _PLAIN_PATHS and not path.endswith(_PLAIN_ENDINGS)


def turn_of_body(
    fields: Fields, size_bytes: int, *, tenant: str, version: str | None, context_length: int
) -> Turn:
    """The turn of a request with the body `fields` of so many bytes."""
    prompts, prompt_tokens = _prompts(fields, size_bytes)
    sequences = prompts * min(max(1, _whole(fields, "n") or 1), SAMPLES_MAX)
    prompt_tokens = min(prompt_tokens, prompts * context_length)
    asked = [value for name in _MAX_TOKENS_FIELDS if (value := _whole(fields, name)) is not None]
    return Turn(
        tenant=tenant,
        version=version,
        prompt_tokens=prompt_tokens,
        completion_tokens_max=min(max(1, *asked) if asked else context_length, context_length),
        sequences=sequences,
        size_bytes=size_bytes,
    )


def is_many(prompt: bytes) -> bool:
    """Whether the `prompt` of a completion is several: a list of more than one string or list of tokens."""
    return len(_items(prompt)) > 1


def _prompts(fields: Fields, size_bytes: int) -> tuple[int, int]:
    """How many there are and how many tokens they have in all."""
    prompt = bytes(fields.get("prompt") or fields.get("token_ids") or b"")
    if not prompt.startswith(b"["):
        return 1, size_bytes // BYTES_PER_TOKEN
    count = max(1, len(_items(prompt)))
    is_text = b'"' in prompt
    return count, size_bytes // BYTES_PER_TOKEN if is_text else prompt.count(b",") + 1


def _items(prompt: bytes) -> list[msgspec.Raw]:
    """Of a list of prompts; none if it is one prompt."""
    if not prompt.startswith(b"["):
        return []
    items = msgspec.json.decode(prompt, type=list[msgspec.Raw])
    return items if items and bytes(items[0])[:1] in (b'"', b"[") else []


def _whole(fields: Fields, name: str) -> int | None:
    """A whole number among the fields; None where there is none, which vLLM will have its own words for."""
    value = fields.get(name)
    if value is not None:
        with contextlib.suppress(msgspec.ValidationError, msgspec.DecodeError):
            return msgspec.json.decode(value, type=int)
    return None
