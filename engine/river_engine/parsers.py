"""Which of vLLM's parsers finds the tool calls in what a model writes: a question of how its family was trained."""

from __future__ import annotations

import json
from pathlib import Path

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


def tool_parser_of(model_path: str) -> str:
    """The name of the parser for a model, by the `model_type` in its `config.json`; the most usual one for others."""
    config = Path(model_path) / "config.json"
    if not config.is_file():  # A hub id.
        return _USUAL
    model_type = json.loads(config.read_text()).get("model_type")
    return _BY_MODEL_TYPE.get(model_type, _USUAL)
