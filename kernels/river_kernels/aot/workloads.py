"""Calls of the public functions that start every kernel in every configuration, on tensors without storage.

Sizes are those of Qwen3.6-35B-A3B in bfloat16, and of a tiny model in float32.
"""

from __future__ import annotations

import torch

from river_kernels.adam import AdamRule, AdamUpdate, multi_adam
from river_kernels.gpu.adam import norms
from river_kernels.gpu.launch import Launch, recorded
from river_kernels.quantized import (
    Fp8Weight,
    Nvfp4Weight,
    QuantizedWeight,
    Scratch,
    StoredWeight,
    dense_weight,
)

META = torch.device("meta")
WIDTH, EXPERT_WIDTH, EXPERTS = 2048, 512, 256


def all_launches() -> list[Launch]:
    """Every launch of all workloads."""
    launches: list[Launch] = []
    with recorded(launches.append):
        _stored_weights()
        _optimizer()
    return launches


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _fp8(rows: int, columns: int, block: tuple[int, int], scales: torch.dtype) -> StoredWeight:
    blocks = -(-rows // block[0]), -(-columns // block[1])
    values = _empty(EXPERTS, rows, columns, dtype=torch.float8_e4m3fn)
    return Fp8Weight(values, _empty(EXPERTS, *blocks, dtype=scales), block)


def _nvfp4(rows: int, columns: int) -> StoredWeight:
    return Nvfp4Weight(
        _empty(EXPERTS, rows, columns // 2, dtype=torch.uint8),
        _empty(EXPERTS, rows, columns // 16, dtype=torch.float8_e4m3fn),
        _empty(EXPERTS, dtype=torch.float32),
    )


def _stored_weights() -> None:
    for rows, columns in ((EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)):
        stored = [
            _fp8(rows, columns, (128, 128), torch.float32),
            _fp8(rows, columns, (128, 128), torch.bfloat16),
            _fp8(rows, columns, (1, 128), torch.float32),
            _nvfp4(rows, columns),
        ]
        for weight in stored:
            for dtype in (torch.bfloat16, torch.float32):
                dense_weight(QuantizedWeight((weight,), dtype, Scratch()))


def _optimizer() -> None:
    rule = AdamRule(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    for copy_dtype in (torch.bfloat16, None):
        updates = [
            AdamUpdate(
                *(_empty(size, dtype=torch.float32) for _ in range(4)),
                step=3,
                rule=rule,
                copy=None if copy_dtype is None else _empty(size, dtype=copy_dtype),
            )
            for size in (40_000_000, 100, 65_537)
        ]
        multi_adam(updates)
        multi_adam(updates[:1])
        norms([update.gradient for update in updates])
