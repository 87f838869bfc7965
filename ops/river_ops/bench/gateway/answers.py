"""What the stand-in engine answers: the same bytes each time, as long as a short chat."""

from __future__ import annotations

import msgspec

MODEL = "river/bench-stub"
CONTEXT_LENGTH = 8192
PROMPT_TOKENS, COMPLETION_TOKENS = 90, 64
STREAM_TOKENS = 64
_TEXT = "A river carries what it is given. " * 16


def whole_answer() -> bytes:
    """A chat completion of about 750 bytes, with its HTTP head."""
    body = msgspec.json.encode(
        {
            "id": "chatcmpl-stub",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": _TEXT},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": _usage(COMPLETION_TOKENS),
        }
    )
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
STREAM_END = b"0\r\n\r\n"


def stream_events(tokens: int, *, continuous_usage: bool) -> list[bytes]:
    """A stream's events as chunks of HTTP: one for each token, the sum of the usage, and the end."""
    events = [
        _event(
            [_choice(index, "stop" if index == tokens - 1 else None)],
            _usage(index + 1) if continuous_usage else None,
        )
        for index in range(tokens)
    ]
    return [*events, _event([], _usage(tokens)), _chunked(b"data: [DONE]\n\n")]


def _choice(index: int, finish_reason: str | None) -> dict[str, object]:
    delta = {"content": f" word{index}"}
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _event(choices: list[dict[str, object]], usage: dict[str, int] | None) -> bytes:
    chunk: dict[str, object] = {
        "id": "chatcmpl-stub",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": MODEL,
        "choices": choices,
    }
    if usage is not None:
        chunk["usage"] = usage
    return _chunked(b"data: " + msgspec.json.encode(chunk) + b"\n\n")


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _usage(completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + completion_tokens,
        "completion_tokens": completion_tokens,
    }
