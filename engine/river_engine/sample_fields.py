"""The ranges of what a sampling request may ask, prompts aside."""

from __future__ import annotations

from river_engine import limits
from river_engine.errors import InvalidField
from river_engine.protocol import EngineSample


def check_fields(request: EngineSample, vocab_size: int) -> None:
    """Everything but the tokens of prompts.

    Raises:
        InvalidField: a field is out of range.
    """
    if (request.prompts is None) == (request.prompt_token_ids is None):
        raise InvalidField(
            "exactly one of prompts and prompt_token_ids must be given", param="prompts"
        )
    field = "prompts" if request.prompts is not None else "prompt_token_ids"
    count = len(request.prompts if request.prompts is not None else request.prompt_token_ids or [])
    _in_range(field, count, 1, limits.PROMPTS_MAX)
    _in_range("num_samples", request.num_samples, 1, limits.SAMPLES_MAX)
    _in_range("max_tokens", request.max_tokens, 0, float("inf"))
    _in_range("temperature", request.temperature, 0.0, limits.TEMPERATURE_MAX)
    _in_range("logprobs", request.logprobs, 0, limits.TOP_LOGPROBS_MAX)
    _in_range("prompt_top_logprobs", request.prompt_top_logprobs, 0, limits.TOP_LOGPROBS_MAX)
    _in_range("prompt_logprobs_last", request.prompt_logprobs_last, 1, float("inf"))
    _in_range("seed", request.seed, 0, limits.SEED_MAX)
    _in_range("top_k", request.top_k, -1, float("inf"))
    if not 0.0 < request.top_p <= 1.0:
        raise InvalidField(f"must be above 0 and at most 1, is {request.top_p}", param="top_p")
    _in_range("stop", len(request.stop), 0, limits.STOPS_MAX)
    if "" in request.stop:
        raise InvalidField("must not be empty", param=f"stop[{request.stop.index('')}]")
    _in_range("stop_token_ids", len(request.stop_token_ids), 0, limits.STOP_TOKENS_MAX)
    for index, token in enumerate(request.stop_token_ids):
        _in_range(f"stop_token_ids[{index}]", token, 0, vocab_size - 1)


def _in_range(field: str, value: float | None, lowest: float, highest: float) -> None:
    """None is what was not given."""
    if value is not None and not lowest <= value <= highest:
        raise InvalidField(f"must be between {lowest} and {highest}, is {value}", param=field)
