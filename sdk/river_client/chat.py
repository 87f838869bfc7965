"""Chat completions, as far as this SDK goes; for more, point the `openai` package at the same server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from river_client import exceptions
from river_client.results import ChatReply

if TYPE_CHECKING:
    import httpx

ChatMessages: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A user's text, or a list of messages as in OpenAI's API."""

POLICY_HEADER = "x-river-policy-version"

_EVENT_PREFIX = "data:"
_LAST_EVENT = "[DONE]"


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message = msgspec.field(default_factory=_Message)
    delta: _Message = msgspec.field(default_factory=_Message)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _StreamError(msgspec.Struct):
    message: str = ""
    type: str | None = None


class _Completion(msgspec.Struct):
    model: str = ""
    choices: list[_Choice] = msgspec.field(default_factory=list[_Choice])
    usage: _Usage | None = None
    error: _StreamError | None = None


def chat_body(
    messages: ChatMessages,
    model: str,
    max_tokens: int | None,
    temperature: float | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The request, with what was not said left out."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, **options}
    body["temperature"] = temperature
    return {name: value for name, value in body.items() if value is not None}


def chat_reply(response: httpx.Response) -> ChatReply:
    """The first choice of an answer."""
    completion = _decode(response.content)
    if not completion.choices:
        raise exceptions.ServerError("the answer has no choices")
    choice, usage = completion.choices[0], completion.usage or _Usage()
    return ChatReply(
        text=choice.message.content or "",
        model=completion.model,
        finish_reason=choice.finish_reason,
        policy_version=response.headers.get(POLICY_HEADER),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )


async def stream_texts(response: httpx.Response) -> AsyncGenerator[str]:
    """The texts of a stream's events.

    Raises:
        ServerError: the stream says that something failed, or ends before it is done.
    """
    async for line in response.aiter_lines():
        if not line.startswith(_EVENT_PREFIX):
            continue
        event = line.removeprefix(_EVENT_PREFIX).strip()
        if event == _LAST_EVENT:
            return
        chunk = _decode(event.encode())
        if chunk.error is not None:
            raise exceptions.ServerError(chunk.error.message, type=chunk.error.type)
        for choice in chunk.choices:
            if choice.delta.content:
                yield choice.delta.content
    raise exceptions.ServerError("the answer broke off")


def _decode(content: bytes) -> _Completion:
    try:
        return msgspec.json.decode(content, type=_Completion)
    except msgspec.DecodeError as error:
        raise exceptions.ServerError(f"the answer is no chat completion: {error}") from error
