"""What an engine found wrong with a request, in the words of the API that the client speaks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from river_gateway.errors import EngineRefusedError

if TYPE_CHECKING:
    from river_engine.protocol import EngineError

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"

_TOO_LONG = ("maximum context length", "max_model_len", "longer than the maximum model length")
# vLLM appends the field that it has already named, and its value, which may be as long as the prompt.
_TRAILER = re.compile(r"\s*\(parameter=\w+(?:, value=.*)?\)$", re.DOTALL)
_VALIDATION = re.compile(
    r"\d+ validation errors?:\s*\{'type': '(?P<type>[^']*)', 'loc': '(?P<loc>[^']*)',"
    r" 'msg': (?P<quote>['\"])(?P<message>.*?)(?P=quote), 'input'",
    re.DOTALL,
)
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
_TYPE_SUFFIXES = ("_type", "_parsing", "_from_float")


def refused_by_engine(status: int, refusal: EngineError) -> EngineRefusedError:
    """The refusal with OpenAI's `param` and `code`, and without what only vLLM's own log needs.

    `status` is the engine's, between 400 and 499.
    """
    message, param, code = _TRAILER.sub("", refusal.message), refusal.param, None
    found = _VALIDATION.match(message)
    if found is not None:
        param = _field(found["loc"])
        message = found["message"].removeprefix("Value error, ")
        code = _code(found["type"])
        if found["type"] == "missing":
            message = f"Missing required parameter: '{param}'."
        elif param is not None:
            message = f"Invalid value for '{param}': {message}"
    elif any(phrase in message for phrase in _TOO_LONG):
        code = CONTEXT_LENGTH_EXCEEDED
    return EngineRefusedError(status, message, param=param, code=code)


def _field(location: str) -> str | None:
    """`messages[0].content` of vLLM's `body.messages.0.content`; without the names of the types it tried."""
    path = ""
    for part in location.split(".")[1:]:
        if part.isdigit():
            path += f"[{part}]"
        elif re.fullmatch(r"[a-z_]+", part):
            path += f".{part}" if path else part
    return path or None


def _code(type_name: str) -> str | None:
    if type_name in _CODES:
        return _CODES[type_name]
    return "invalid_type" if type_name.endswith(_TYPE_SUFFIXES) else "invalid_value"
