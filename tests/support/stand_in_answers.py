"""What a stand-in engine answers on `/v1/responses`, `/v1/messages` and `/v1/messages/count_tokens`, in vLLM's form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from river_engine.protocol import USAGE_COMMENT, StreamUsage

PATHS = ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens")
PROMPT_TOKENS, CACHED_TOKENS, COMPLETION_TOKENS = 7, 2, 4


def whole_answer(path: str, model: str) -> dict[str, Any]:
    """A whole answer."""
    if path == "/v1/responses":
        return _response(model, "completed")
    if path == "/v1/messages":
        return {
            "id": "chatcmpl-1",
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": "w0 "}],
            "model": model,
            "stop_reason": "end_turn",
            "usage": _message_usage(COMPLETION_TOKENS),
        }
    return {"input_tokens": PROMPT_TOKENS}


def stream_events(path: str, model: str, *, cut_off: bool = False) -> Iterator[tuple[int, bytes]]:
    """The events of a stream, and how many tokens each has come to; vLLM names the last alike when it is cut off."""
    chat = path == "/v1/messages"
    if chat:
        message = whole_answer(path, model) | {"content": [], "stop_reason": None}
        message["usage"] = {"input_tokens": PROMPT_TOKENS, "output_tokens": 0}
        yield 0, _event("message_start", {"message": message})
        block = {"type": "text", "text": ""}
        yield 0, _event("content_block_start", {"index": 0, "content_block": block})
    else:
        yield 0, _event("response.created", {"response": _response(model, "in_progress")})
    for index in range(COMPLETION_TOKENS):
        usage = StreamUsage(PROMPT_TOKENS, CACHED_TOKENS, index + 1)
        comment = USAGE_COMMENT + msgspec.json.encode(usage) + b"\n\n"
        if chat:
            delta = {"type": "text_delta", "text": f"w{index} "}
            told = _event("content_block_delta", {"index": 0, "delta": delta})
        else:
            place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
            told = _event("response.output_text.delta", {"delta": f"w{index} ", **place})
        yield index + 1, comment + told
    if chat:
        yield COMPLETION_TOKENS, _event("content_block_stop", {"index": 0})
        end = {"stop_reason": "end_turn", "stop_sequence": None}
        usage = _message_usage(COMPLETION_TOKENS)
        yield COMPLETION_TOKENS, _event("message_delta", {"delta": end, "usage": usage})
        yield COMPLETION_TOKENS, _event("message_stop", {})
    else:
        response = _response(model, "incomplete" if cut_off else "completed")
        yield COMPLETION_TOKENS, _event("response.completed", {"response": response})


def _event(name: str, data: dict[str, Any]) -> bytes:
    fields = {"type": name, "sequence_number": 0} | data
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(fields) + b"\n\n"


def _message_usage(produced: int) -> dict[str, Any]:
    return {
        "input_tokens": PROMPT_TOKENS - CACHED_TOKENS,
        "output_tokens": produced,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": CACHED_TOKENS,
    }


def _response(model: str, status: str) -> dict[str, Any]:
    text = {"type": "output_text", "text": "w0 ", "annotations": [], "logprobs": None}
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [text],
    }
    usage = {
        "input_tokens": PROMPT_TOKENS,
        "input_tokens_details": {"cached_tokens": CACHED_TOKENS, "cache_write_tokens": 0},
        "output_tokens": COMPLETION_TOKENS,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
    }
    running = status == "in_progress"
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": model,
        "status": status,
        "output": [] if running else [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "temperature": 1.0,
        "top_p": 1.0,
        "instructions": None,
        "metadata": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "usage": None if running else usage,
    }
