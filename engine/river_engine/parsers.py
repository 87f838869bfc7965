"""Which of vLLM's parsers finds tool calls and thoughts in what a model writes: how its family was trained."""

from __future__ import annotations

import json
from pathlib import Path

from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import get_tokenizer
from vllm.tool_parsers import ToolParserManager

_BY_MODEL_TYPE = {
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "deepseek_v4": "deepseek_v4",
    "glm4_moe": "glm45",
    "glm4_moe_lite": "glm47",
    "glm_moe_dsa": "glm47",
    "gpt_oss": "openai",
    "kimi_k2": "kimi_k2",
    "kimi_k25": "kimi_k2",
    "llama": "llama3_json",
    "llama4": "llama4_pythonic",
    "minimax_m2": "minimax_m2",
    "mistral": "mistral",
    "qwen2": "hermes",
    "qwen2_moe": "hermes",
    "qwen3": "hermes",
    "qwen3_moe": "hermes",
    "qwen3_next": "hermes",
    "qwen3_5": "qwen3_coder",
    "qwen3_5_moe": "qwen3_coder",
}
_USUAL = "hermes"


class UnfitParserError(RuntimeError):
    """vLLM has no such parser, or the model no such tokens; the message is one line and names the variable."""


def check_parsers(model_path: str, *, tool_parser: str, reasoning_parser: str) -> None:
    """Finds out before the model is loaded what vLLM would say to every single request; empty names are none.

    Raises:
        UnfitParserError: there is something.
    """
    known = ToolParserManager.list_registered()
    if tool_parser and tool_parser not in known:
        raise UnfitParserError(f"RIVER_TOOL_PARSER={tool_parser}: must be one of {known}")
    if not reasoning_parser:
        return
    known = ReasoningParserManager.list_registered()
    if reasoning_parser not in known:
        raise UnfitParserError(f"RIVER_REASONING_PARSER={reasoning_parser}: must be one of {known}")
    parser = ReasoningParserManager.get_reasoning_parser(reasoning_parser)
    try:
        parser(get_tokenizer(model_path))
    except (RuntimeError, ValueError) as error:
        raise UnfitParserError(
            f"RIVER_REASONING_PARSER={reasoning_parser}: the model does not fit: {error}"
        ) from error


def tool_parser_of(model_path: str) -> str:
    """The name of the parser for a model, by the `model_type` in its `config.json`; the most usual one for others."""
    config = Path(model_path) / "config.json"
    if not config.is_file():  # A hub id.
        return _USUAL
    model_type = json.loads(config.read_text()).get("model_type")
    return _BY_MODEL_TYPE.get(model_type, _USUAL)
