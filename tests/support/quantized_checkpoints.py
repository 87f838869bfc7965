"""The tiny model in every stored form that the trainer reads, each with a twin that has the same numbers in float32.

What the numbers are is spelled out here once more, with plain operations of torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from river_kernels.quantized import quantize_fp8, quantize_nvfp4

Tensors = dict[str, torch.Tensor]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
BLOCK = [128, 128]
EXPERTS = ("experts.",)
LAYERS = ("experts.", "q_proj", "k_proj", "v_proj", "o_proj")

LEFT_OUT = ("layers.0.self_attn.o_proj", "layers.1.mlp.experts")
"""Calibration leaves out what is sensitive."""


@dataclass(frozen=True, slots=True)
class Form:
    """A way to store weights: what config.json says, which weights, and what becomes of one, with its numbers."""

    config: dict[str, Any]
    chosen: tuple[str, ...]
    store: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def write_twins(
    source: Path, folder: Path, form: Form, left_out: tuple[str, ...] = LEFT_OUT
) -> tuple[Path, Path]:
    """Two models made of `source`: one stored in `form`, one with the same numbers.

    Layers with a part of `left_out` in their names are as they were in both.
    """
    tensors = load_file(source / "model.safetensors")
    stored: Tensors = {}
    plain: Tensors = {}
    for name, tensor in tensors.items():
        stored[name] = plain[name] = tensor
        layer = name.removesuffix(".weight")
        chosen = any(part in layer for part in form.chosen)
        if not chosen or any(part in layer for part in left_out):
            continue
        del stored[name]
        parts, numbers = form.store(tensor.float())
        stored |= {f"{layer}.{part}": value for part, value in parts.items()}
        plain[name] = numbers
    return (
        _write(source, folder / "stored", stored, {"quantization_config": form.config}),
        _write(source, folder / "plain", plain, {}),
    )


def _write(source: Path, folder: Path, tensors: Tensors, changes: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_bytes()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _spread(scales: torch.Tensor, block: list[int], shape: torch.Size) -> torch.Tensor:
    spread = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return spread[: shape[0], : shape[1]]


def _fp8(scale_name: str, scale_dtype: torch.dtype) -> Callable[..., tuple[Tensors, torch.Tensor]]:
    def store(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        quantized = quantize_fp8(weight, (BLOCK[0], BLOCK[1]))
        scales = quantized.scales.to(scale_dtype)
        parts = {"weight": quantized.values, scale_name: scales}
        return parts, quantized.values.float() * _spread(scales, BLOCK, weight.shape)

    return store


def _nvfp4(
    names: tuple[str, str, str], *, divides: bool
) -> Callable[..., tuple[Tensors, torch.Tensor]]:
    def store(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        quantized = quantize_nvfp4(weight)
        multiplier = quantized.global_scale
        stored = 1.0 / multiplier.reshape(1) if divides else multiplier
        if divides:
            multiplier = 1.0 / stored
        parts = dict(zip(names, (quantized.packed, quantized.scales, stored), strict=True))
        low, high = quantized.packed & 15, quantized.packed >> 4
        numbers = torch.tensor(E2M1)[torch.stack((low, high), -1).flatten(1).long()]
        scales = quantized.scales.float() * multiplier
        return parts, numbers * _spread(scales, [1, 16], weight.shape)

    return store


_CT_NVFP4 = ("weight_packed", "weight_scale", "weight_global_scale")
_MODELOPT = ("weight", "weight_scale", "weight_scale_2")


def _compressed(kind: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "float"} | weights, "format": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMS = {
    "fp8": Form(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": BLOCK},
        LAYERS,
        _fp8("weight_scale_inv", torch.float32),
    ),
    "fp8 with the head": Form(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": BLOCK},
        (*LAYERS, "lm_head"),
        _fp8("weight_scale_inv", torch.bfloat16),
    ),
    "compressed fp8": Form(
        _compressed(
            "float-quantized", {"num_bits": 8, "strategy": "block", "block_structure": BLOCK}
        ),
        EXPERTS,
        _fp8("weight_scale", torch.float32),
    ),
    "compressed nvfp4": Form(
        _compressed(
            "nvfp4-pack-quantized", {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
        ),
        LAYERS,
        _nvfp4(_CT_NVFP4, divides=True),
    ),
    "modelopt nvfp4": Form(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        EXPERTS,
        _nvfp4(_MODELOPT, divides=False),
    ),
}
