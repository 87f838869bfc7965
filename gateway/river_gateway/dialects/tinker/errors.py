"""River's errors as the Tinker protocol says them: a status, and `{"detail": sentence}`.

The client knows what a status means by two rules, which decide how some of ours are said:

* It repeats a request for minutes that is answered by 408, 409, 429 or 5xx. So what no repetition will mend, of ours
  409 and 501, is said as 422.
* 402 makes it wait for credit and try again, for an hour at most.

What was wrong with a field is told by the names that its client used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException

from river_gateway.context import context_of
from river_gateway.errors import (
    AheadError,
    ConflictError,
    GatewayError,
    NotSupportedError,
    RateLimitedError,
    as_gateway_error,
    headers_of,
)
from river_gateway.limits import RETRY_AFTER_S

_JSON = "application/json"

# ---- Names -----------------------------------------------------------------------------------------------------------

_FIELDS = {
    "input_ids": "model_input",
    "target_tokens": "loss_fn_inputs.target_tokens",
    "weights": "loss_fn_inputs.weights",
    "old_logprobs": "loss_fn_inputs.logprobs",
    "advantages": "loss_fn_inputs.advantages",
    "clip_low": "loss_fn_inputs.clip_low_threshold",
    "clip_high": "loss_fn_inputs.clip_high_threshold",
    "sequence_mask": "loss_fn_inputs.sequence_ratio_mask",
}
_NAMES = {
    "adam.lr": "adam_params.learning_rate",
    "lora": "lora_config",
    "loss_config.clip_low": "loss_fn_config.clip_low_threshold",
    "loss_config.clip_high": "loss_fn_config.clip_high_threshold",
    "loss_config.eps_max": "loss_fn_config.clip_high_threshold",
    "loss_config": "loss_fn_config",
    "num_samples": "num_samples",
    "max_tokens": "sampling_params.max_tokens",
    "temperature": "sampling_params.temperature",
    "top_p": "sampling_params.top_p",
    "top_k": "sampling_params.top_k",
    "seed": "sampling_params.seed",
    "stop": "sampling_params.stop",
    "stop_token_ids": "sampling_params.stop",
    "logprobs": "topk_sample_logprobs",
    "prompt_token_ids[0]": "prompt",
    "ttl_s": "ttl_seconds",
    "age_recipients": "age_encryption_recipients",
    "checkpoint": "path",
    "seq": "seq_id",
    "name": "path",
}
_DATUM_FIELD = re.compile(rf"\b(data\[[0-9]+\])\.({'|'.join(_FIELDS)})\b")
_NAME = re.compile(
    rf"^({'|'.join(map(re.escape, sorted(_NAMES, key=len, reverse=True)))})(?=[:.\[]|$)"
)


def in_their_words(sentence: str) -> str:
    """A sentence about a field, the field called as the client calls it."""
    sentence = _DATUM_FIELD.sub(lambda match: f"{match[1]}.{_FIELDS[match[2]]}", sentence)
    sentence = sentence.replace(" input_ids", " tokens of model_input")
    sentence = re.sub(r"^adam\.(?!lr\b)", "adam_params.", sentence)
    return _NAME.sub(lambda match: _NAMES[match[1]], sentence)


# ---- Answers ---------------------------------------------------------------------------------------------------------


def status_of(error: GatewayError) -> int:
    """The status that makes the client do what is right."""
    if isinstance(error, AheadError):
        return HTTPStatus.TOO_MANY_REQUESTS
    if isinstance(error, ConflictError | NotSupportedError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    return int(error.status)


def answer_to(error: GatewayError) -> Response[bytes]:
    """The answer to a request that failed."""
    headers = headers_of(error, scheme="ApiKey")
    body = msgspec.json.encode({"detail": in_their_words(error.message)})
    return Response(body, status_code=status_of(error), media_type=_JSON, headers=headers)


def _answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    return answer_to(as_gateway_error(error, context_of(request.scope)))


def _answer_unhurried(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    known = as_gateway_error(error, context_of(request.scope))
    if status_of(known) >= HTTPStatus.INTERNAL_SERVER_ERROR:
        known = RateLimitedError(known.message, retry_after_s=known.retry_after_s or RETRY_AFTER_S)
    return answer_to(known)


_Handlers = dict[int | type[Exception], Callable[[Any, Any], Response[bytes]]]

EXCEPTION_HANDLERS: _Handlers = {HTTPException: _answer, Exception: _answer}

UNHURRIED_HANDLERS: _Handlers = {HTTPException: _answer_unhurried, Exception: _answer_unhurried}
"""Where the client repeats its request at once after a 5xx, and without an end: there 429 makes it wait."""
