"""LoRA on linear layers, the embedding and the head, on the CPU.

vLLM's own version gathers a weight per row with `weights[slot]`; for rows without an adapter the slot is -1, which
in Python is the last one, so another tenant's adapter answers for the base model. This one works group by group,
leaves rows without an adapter alone, and reads every weight once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

RowGroup = tuple[int, torch.Tensor | None]
"""A slot (-1: no adapter) and its row numbers; None stands for every row there is."""


def row_groups(slots: torch.Tensor) -> list[RowGroup]:
    """`slots` [M], one per row, as groups."""
    if slots.numel() == 0:
        return []
    distinct = torch.unique(slots).tolist()
    if len(distinct) == 1:
        return [(distinct[0], None)]
    return [(slot, (slots == slot).nonzero(as_tuple=True)[0]) for slot in distinct]


class GroupedPunica(PunicaWrapperCPU):
    """`token_groups` covers all rows of a step, also those without an adapter; MoE layers use it too."""

    token_groups: list[RowGroup]
    _token_adapters: list[RowGroup]
    _sampler_adapters: list[RowGroup]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.token_groups, self._token_adapters, self._sampler_adapters = [], [], []

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.token_groups = row_groups(self.token_lora_indices)
        self._token_adapters = [group for group in self.token_groups if group[0] >= 0]
        self._sampler_adapters = [
            group for group in row_groups(self.sampler_indices) if group[0] >= 0
        ]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,  # noqa: ARG002 - vLLM's signature, here and below
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """`y[:, slice i] += scale * x A_i^T B_i^T`."""
        _add_low_rank(
            self._token_adapters, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices
        )

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """`y += scale * x A^T B^T` over the rows that are sampled from."""
        width = (y.shape[-1],)
        _add_low_rank(
            self._sampler_adapters, y, x, (lora_a_stacked,), (lora_b_stacked,), scale, width
        )

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """`y[i] += scale * x A_i^T`."""
        x = x.reshape(-1, x.shape[-1])
        for part, a in zip(y, lora_a_stacked, strict=True):
            for slot, rows in self._token_adapters:
                delta = (_pick(x, rows).float() @ _weight(a, slot).t()) * scale
                _add(part.view(-1, part.shape[-1]), rows, 0, delta)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """`y[:, slice i] += x[i] B_i^T`, or `=` without `add_inputs`."""
        y = y.view(-1, y.shape[-1])
        offset = offset_start
        for part, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
            if not add_inputs:
                y[:, offset : offset + width] = 0
            for slot, rows in self._token_adapters:
                _add(y, rows, offset, _pick(part, rows).float() @ _weight(b, slot).t())
            offset += width

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """`y += x B^T`, x being rows of A already."""
        for slot, rows in self._token_adapters:
            delta = _pick(x, rows).float() @ _weight(lora_b_stacked, slot).t()
            _add(y.view(-1, y.shape[-1]), rows, 0, delta)


def _add_low_rank(
    groups: list[RowGroup],
    y: torch.Tensor,
    x: torch.Tensor,
    a_stacked: Sequence[torch.Tensor],
    b_stacked: Sequence[torch.Tensor],
    scale: float,
    widths: Sequence[int],
) -> None:
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    for slot, rows in groups:
        picked = _pick(x, rows).float()
        offset = 0
        for a, b, width in zip(a_stacked, b_stacked, widths, strict=True):
            shrunk = picked @ _weight(a, slot).t()
            if scale != 1.0:
                shrunk *= scale
            _add(y, rows, offset, shrunk @ _weight(b, slot)[:width].t())
            offset += width


def _add(y: torch.Tensor, rows: torch.Tensor | None, offset: int, delta: torch.Tensor) -> None:
    columns = y[:, offset : offset + delta.shape[1]]
    if rows is None:
        columns += delta.to(y.dtype)
    else:
        columns.index_add_(0, rows, delta.to(y.dtype))


def _pick(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else x.index_select(0, rows)


def _weight(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    """[slots, 1, out, in] or [slots, out, in] to the [out, in] of one slot, in float32."""
    weight = stacked[slot]
    return (weight[0] if weight.dim() == 3 else weight).float()  # noqa: PLR2004 - dimensions
