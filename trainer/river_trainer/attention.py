"""Attention with its projections as one frozen matrix, where that is what a model's own attention computes.

A step on small adapters is many small operations; queries, keys and values read the same input, and one product for all
three, one function for the rotation, save a tenth of it.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N806

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn

from river_kernels import (
    Block,
    LoraPair,
    Packing,
    Segments,
    lora_linear_blocks,
    packed_causal_attention,
    rotate,
    rows_of,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Running(Protocol):
    """What attention needs to know of the pass that is running."""

    segments: Segments
    packing: Packing | None

    def pairs(self, site_name: str) -> Sequence[LoraPair | None]: ...


class FusedAttention(nn.Module):
    """Stands for `original`, whose projections become views of one matrix."""

    def __init__(self, original: Any, name: str, running: Running) -> None:
        super().__init__()
        layers = [getattr(original, kind) for kind in PROJECTIONS]
        weight_OI = rows_of([layer.weight for layer in layers])
        ends = list(accumulate((layer.weight.shape[0] for layer in layers), initial=0))
        if isinstance(weight_OI, torch.Tensor):
            for layer, start, end in zip(layers, ends, ends[1:], strict=False):
                layer.weight = nn.Parameter(weight_OI[start:end], requires_grad=False)
            weight_OI = nn.Parameter(weight_OI, requires_grad=False)
        self.weight = weight_OI
        biases = [layer.bias for layer in layers]
        self.bias = (
            None if biases[0] is None else nn.Parameter(torch.cat(biases), requires_grad=False)
        )
        self.o_proj = original.o_proj
        self.q_norm = getattr(original, "q_norm", nn.Identity())
        self.k_norm = getattr(original, "k_norm", nn.Identity())
        self.head_size: int = original.head_dim
        self.scale: float = original.scaling
        self._bounds = list(zip(PROJECTIONS, ends, ends[1:], strict=False))
        self._name, self._running = name, running

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """(1, T, hidden) in and out, as transformers calls it."""
        running = self._running
        assert running.packing is not None, "the model only runs inside token_logprobs"
        blocks = [
            Block(running.pairs(f"{self._name}.{kind}"), start, end)
            for kind, start, end in self._bounds
        ]
        projected_TO = lora_linear_blocks(
            hidden_states[0], self.weight, running.segments, blocks, self.bias
        )
        query, key, value = (
            projected_TO[:, start:end].unflatten(1, (-1, self.head_size))
            for _, start, end in self._bounds
        )
        cos_TD, sin_TD = (table[0] for table in position_embeddings)
        attended_THD = packed_causal_attention(
            rotate(self.q_norm(query), cos_TD, sin_TD),
            rotate(self.k_norm(key), cos_TD, sin_TD),
            value,
            running.packing,
            scale=self.scale,
        )
        return self.o_proj(attended_THD.flatten(1)[None]), None


def fused(original: Any, name: str, running: Running, rotary: nn.Module) -> FusedAttention | None:
    """`original` with fused projections; None if it is no attention of that kind, or computes something else.

    Call it inside a pass of one sequence without adapters, of as many tokens as the probe has.
    """
    if not all(hasattr(original, kind) for kind in (*PROJECTIONS, "o_proj", "head_dim", "scaling")):
        return None
    if len({type(getattr(original, kind).weight) for kind in PROJECTIONS}) != 1:
        return None  # Some are stored in fewer bits, some are not.
    if original.q_proj.weight.shape[0] != original.o_proj.weight.shape[1]:
        return None  # Queries bring a gate of the output with them.
    assert running.packing is not None
    tokens, width = running.packing.packed.numel(), original.q_proj.weight.shape[1]
    probe = torch.linspace(-2.0, 2.0, tokens * width).sin().view(1, tokens, width)
    probe = probe.to(original.q_proj.weight.dtype)
    tables = rotary(probe, torch.arange(tokens)[None])
    if tables[0].shape[-1] != original.head_dim:
        return None  # Only a part of each head is rotated.
    with torch.no_grad():
        expected, _ = original(probe, position_embeddings=tables, attention_mask=None)
        ours = FusedAttention(original, name, running)
        actual, _ = ours(probe, tables)
    tolerance = 1e-4 if probe.dtype == torch.float32 else 5e-2
    return ours if torch.allclose(actual, expected, rtol=tolerance, atol=tolerance) else None
