"""A slice of a model on disk: its true dimensions, fewer layers, random weights.

All layers have full attention, also those that have linear attention in the model: the trainer knows no other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.utils import logging as transformers_logging

PATTERN_SIZE = 4_194_301
"""Random numbers that weights repeat: a prime, so that no two experts are alike."""

INITIAL_STD = 0.02

REDUCED: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
"""For machines without a GPU."""


def slice_config(layers: int, *, reduced: bool) -> Qwen3_5MoeTextConfig:
    """Qwen3.6-35B-A3B with so many layers: what transformers takes for granted of its family are its dimensions."""
    dimensions: dict[str, Any] = REDUCED if reduced else {}
    return Qwen3_5MoeTextConfig(
        num_hidden_layers=layers, layer_types=["full_attention"] * layers, **dimensions
    )


def write_slice(config: Qwen3_5MoeTextConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes the model into `folder`, as checkpoints are."""
    transformers_logging.disable_progress_bar()
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = empty.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(PATTERN_SIZE, generator=generator).mul_(INITIAL_STD).to(dtype)
    with torch.no_grad():
        start = 0
        for weight in model.parameters():
            # Norms of this family scale by one more than their weight.
            start = fill(weight, pattern, start) if weight.ndim > 1 else _zero(weight, start)
    model.save_pretrained(folder)


def fill(weight: torch.Tensor, pattern: torch.Tensor, start: int) -> int:
    """Lays `pattern`, from its number `start` on, over `weight` again and again; returns where the next one starts."""
    flat = weight.view(-1)
    position = 0
    while position < flat.numel():
        piece = pattern[start : start + flat.numel() - position]
        flat[position : position + piece.numel()] = piece
        position += piece.numel()
        start = (start + piece.numel()) % pattern.numel()
    return start


def _zero(weight: torch.Tensor, start: int) -> int:
    weight.zero_()
    return start
