"""The ways in which checkpoints store weights in fewer bits: what `quantization_config` says, and what a layer has.

| `quant_method` | | tensors of a layer |
|---|---|---|
| `fp8` | `weight_block_size` | `weight`, `weight_scale_inv` |
| `compressed-tensors` | `format: float-quantized`, blocks | `weight`, `weight_scale` |
| `compressed-tensors` | `format: nvfp4-pack-quantized` | `weight_packed`, `weight_scale`, `weight_global_scale` |
| `modelopt` | `quant_algo: NVFP4` | `weight`, `weight_scale`, `weight_scale_2` |

By `weight_global_scale` everything else is divided, by `weight_scale_2` it is multiplied.

What a checkpoint says of activations is for those who quantise them; the trainer computes with whole ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from river_kernels import Fp8Weight, Nvfp4Weight, StoredWeight
from river_kernels.quantized import NVFP4_BLOCK
from river_trainer.errors import ModelFormatError

SUPPORTED = (
    "fp8 with weight_block_size, compressed-tensors' float-quantized in blocks and nvfp4-pack-quantized, "
    "modelopt's NVFP4"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the ways: a layer that has `tensors` is stored so, and `combine` makes a weight of them, in that order."""

    tensors: tuple[str, ...]
    combine: Callable[[Sequence[torch.Tensor]], StoredWeight]


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The way that a `quantization_config` speaks of.

    Raises:
        ModelFormatError: it is none of those that the trainer knows.
    """
    method = config.get("quant_method")
    if method == "fp8":
        block = _block(config.get("weight_block_size"), "weight_block_size")
        return Kind(("weight", "weight_scale_inv"), _fp8(block))
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method == "modelopt":
        inner: Mapping[str, Any] = config.get("quantization", config)
        algorithm = str(inner.get("quant_algo")).upper()
        if algorithm == "NVFP4":
            _check_group(inner.get("group_size", NVFP4_BLOCK), "group_size")
            return Kind(("weight", "weight_scale", "weight_scale_2"), _nvfp4(is_divisor=False))
        raise _unsupported("quant_algo", algorithm)
    raise _unsupported("quant_method", method)


def _compressed_tensors(config: Mapping[str, Any]) -> Kind:
    groups: Sequence[Mapping[str, Any]] = list(config.get("config_groups", {}).values())
    formats = {group.get("format") or config.get("format") for group in groups}
    if len(formats) != 1:
        raise _unsupported("format", sorted(map(str, formats)))
    (kind,) = formats
    weights: list[Mapping[str, Any]] = [group.get("weights") or {} for group in groups]
    if kind == "nvfp4-pack-quantized":
        for arguments in weights:
            _check_group(arguments.get("group_size"), "config_groups.weights.group_size")
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        return Kind(names, _nvfp4(is_divisor=True))
    if kind == "float-quantized":
        sizes = {tuple(arguments.get("block_structure") or ()) for arguments in weights}
        if len(sizes) != 1:
            raise _unsupported("config_groups.weights.block_structure", sorted(sizes))
        block = _block(list(*sizes), "config_groups.weights.block_structure")
        return Kind(("weight", "weight_scale"), _fp8(block))
    raise _unsupported("format", kind)


def _fp8(block: tuple[int, int]) -> Callable[[Sequence[torch.Tensor]], StoredWeight]:
    def combine(tensors: Sequence[torch.Tensor]) -> StoredWeight:
        values, scales = tensors
        _check_dtype("values", values, torch.float8_e4m3fn)
        lead, (rows, columns) = values.shape[:-2], values.shape[-2:]
        blocks = (*lead, -(-rows // block[0]), -(-columns // block[1]))
        _check_shape("scales", scales, blocks)
        # Powers of two in a byte, as some write them, are the same numbers in float32.
        kept = scales if scales.dtype is torch.bfloat16 else scales.float()
        return Fp8Weight(values, kept, block)

    return combine


def _nvfp4(*, is_divisor: bool) -> Callable[[Sequence[torch.Tensor]], StoredWeight]:
    def combine(tensors: Sequence[torch.Tensor]) -> StoredWeight:
        packed, scales, global_scale = tensors
        _check_dtype("values", packed, torch.uint8)
        _check_dtype("scales", scales, torch.float8_e4m3fn)
        lead, (rows, half) = packed.shape[:-2], packed.shape[-2:]
        _check_shape("scales", scales, (*lead, rows, -(-2 * half // NVFP4_BLOCK)))
        # A scalar is sometimes stored as a vector of one.
        if global_scale.numel() != lead.numel():
            _check_shape("global scale", global_scale, lead)
        multiplier = global_scale.float().reshape(lead)
        return Nvfp4Weight(packed, scales, 1.0 / multiplier if is_divisor else multiplier)

    return combine


def _check_dtype(what: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype:
        raise ModelFormatError(f"{what} are {tensor.dtype}, not {dtype}")


def _check_shape(what: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ModelFormatError(f"{what} have the shape {tuple(tensor.shape)}, not {tuple(shape)}")


def _block(value: Any, field: str) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2):  # noqa: PLR2004  # rows and columns
        raise _unsupported(field, value)
    if not all(isinstance(size, int) and size > 0 for size in value):
        raise _unsupported(field, value)
    return value[0], value[1]


def _check_group(value: Any, field: str) -> None:
    if value != NVFP4_BLOCK:
        raise _unsupported(field, value)


def _unsupported(field: str, value: Any) -> ModelFormatError:
    return ModelFormatError(
        f"quantization_config.{field} {value!r} is not supported; supported are {SUPPORTED}"
    )
