"""Frozen weights as a checkpoint stores them, in 8 or 4 bits, and how they become numbers again.

    FP8     w = value * scale                        e4m3; one scale for each block of rows x columns (128x128, 1x128)
    NVFP4   w = value * (scale * global_scale)       e2m1; one e4m3 scale for each 16 of a row, one float32 for all

Every multiplication is one of float32, in the order of the parentheses, and the result is rounded once, to nearest
even, to the type that the model computes in (not at all in float32). CPUs and GPUs give the same bits, and they are
those that vLLM makes of the same checkpoint where it dequantises. Where it multiplies 8 or 4 bits as they are, and
quantises activations too, the rounding of its products differs, while the stored numbers are the same.

No layer keeps its numbers. A product asks for them (`dense_weight`) when it begins and gets them in memory that all
layers share (`Scratch`); the next layer's overwrite them, and backward makes them once more.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from river_kernels.device import uses_triton

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_BLOCK = 16

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """`values` e4m3 [..., N, K]; `scales` float32 or bfloat16 [..., N / block[0], K / block[1]], rounded up."""

    values: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        *lead, rows, columns = self.values.shape
        blocks = [-(-rows // self.block[0]), -(-columns // self.block[1])]
        assert self.values.dtype is torch.float8_e4m3fn
        assert self.scales.dtype in {torch.float32, torch.bfloat16}
        assert list(self.scales.shape) == [*lead, *blocks], "one scale for each block"

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.values, self.scales

    def matrices(self, first: int, end: int) -> Fp8Weight:
        """The matrices `first` to `end` (exclusive) of several; copies."""
        values, scales = (tensor[first:end].clone() for tensor in self.tensors)
        return Fp8Weight(values, scales, self.block)

    def write(self, out: torch.Tensor) -> None:
        """Writes the numbers into `out` [..., N, K], whose rows may be longer than K in memory."""
        if uses_triton(self.values):
            from river_kernels.gpu.dequantize import write_fp8  # noqa: PLC0415  # CPUs need no Triton

            write_fp8(self.values, self.scales, self.block, out)
            return
        rows, columns = self.shape[-2:]
        for values, scales, target in _matrices(*self.tensors, out):
            spread = scales.float().repeat_interleave(self.block[0], 0)[:rows]
            spread = spread.repeat_interleave(self.block[1], 1)[:, :columns]
            target.copy_(values.float().mul_(spread))


@dataclass(frozen=True, slots=True)
class Nvfp4Weight:
    """`packed` uint8 [..., N, K / 2], the even column in the low four bits; `scales` e4m3 [..., N, K / 16], rounded up.

    `global_scale` float32 [...], one for each matrix, multiplies.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor

    def __post_init__(self) -> None:
        *lead, rows, half = self.packed.shape
        assert self.packed.dtype is torch.uint8
        assert self.scales.dtype is torch.float8_e4m3fn
        assert self.global_scale.dtype is torch.float32
        blocks = [rows, -(-2 * half // NVFP4_BLOCK)]
        assert list(self.scales.shape) == [*lead, *blocks], "one scale for each 16"
        assert list(self.global_scale.shape) == lead, "one global scale for each matrix"

    @property
    def shape(self) -> torch.Size:
        *lead, half = self.packed.shape
        return torch.Size([*lead, 2 * half])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.packed, self.scales, self.global_scale

    def matrices(self, first: int, end: int) -> Nvfp4Weight:
        """The matrices `first` to `end` (exclusive) of several; copies."""
        return Nvfp4Weight(*(tensor[first:end].clone() for tensor in self.tensors))

    def write(self, out: torch.Tensor) -> None:
        """Writes the numbers into `out` [..., N, K], whose rows may be longer than K in memory."""
        if uses_triton(self.packed):
            from river_kernels.gpu.dequantize import write_nvfp4  # noqa: PLC0415  # CPUs need no Triton

            write_nvfp4(self.packed, self.scales, self.global_scale, out)
            return
        table = torch.tensor(_E2M1 + tuple(-number for number in _E2M1))
        for packed, scales, global_scale, target in _matrices(*self.tensors, out):
            codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
            spread = (scales.float() * global_scale).repeat_interleave(NVFP4_BLOCK, 1)
            target.copy_(table[codes.int()].mul_(spread[:, : codes.shape[1]]))


StoredWeight = Fp8Weight | Nvfp4Weight


def _matrices(*tensors: torch.Tensor) -> zip[tuple[torch.Tensor, ...]]:
    """The tensors of each matrix, [N, …]; one matrix at a time, so that little is held in float32."""
    *stored, out = tensors
    lead = out.ndim - 2
    flat = [tensor.reshape(-1, *tensor.shape[lead:]) for tensor in stored]
    return zip(*flat, out.view(-1, *out.shape[-2:]) if lead != 1 else out, strict=True)


Buffers = dict[tuple[torch.device, int], torch.Tensor]


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.buffers: Buffers = {}


class Scratch:
    """Memory for the numbers of one weight at a time, as large as the largest.

    Those that work in turn share it: on a CPU what one thread does, on a GPU what one stream does. What was written
    stays until the same thread or stream asks for another weight.
    """

    def __init__(self) -> None:
        self._of_thread = _OfThread()
        self._of_streams: Buffers = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a tensor, with anything in it."""
        if device.type == "cuda":
            buffers = self._of_streams
            key = (device, torch.cuda.current_stream(device).cuda_stream)
        else:
            buffers, key = self._of_thread.buffers, (device, 0)
        size_bytes = torch.Size(shape).numel() * dtype.itemsize
        buffer = buffers.get(key)
        if buffer is None or buffer.numel() < size_bytes:
            buffers.pop(key, None)
            buffer = buffers[key] = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        return buffer[:size_bytes].view(dtype).view(*shape)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A frozen weight [..., N, K] that is kept as it is stored; its rows are those of all `parts`, one after another.

    It has `dtype` when it is written into `scratch`.
    """

    parts: tuple[StoredWeight, ...]
    dtype: torch.dtype
    scratch: Scratch

    def __post_init__(self) -> None:
        assert self.parts
        shapes = {(part.shape[:-2], part.shape[-1]) for part in self.parts}
        assert len(shapes) == 1, f"parts differ in more than their rows: {shapes}"

    @property
    def shape(self) -> torch.Size:
        *lead, _, columns = self.parts[0].shape
        return torch.Size([*lead, sum(part.shape[-2] for part in self.parts), columns])

    @property
    def requires_grad(self) -> bool:
        """Never: it is frozen."""
        return False

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    def matrices(self, first: int, end: int) -> QuantizedWeight:
        """The matrices `first` to `end` (exclusive) of several; copies."""
        return replace(self, parts=tuple(part.matrices(first, end) for part in self.parts))

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same weight there."""
        return replace(self, parts=tuple(_on(part, device) for part in self.parts))

    def write(self, out: torch.Tensor) -> None:
        """Writes the numbers into `out` [..., N, K], whose rows may be longer than K in memory."""
        assert out.shape == self.shape
        start = 0
        for part in self.parts:
            end = start + part.shape[-2]
            part.write(out[..., start:end, :])
            start = end

    def dense(self) -> torch.Tensor:
        """The numbers [..., N, K], until `scratch` is asked for another weight."""
        out = self.scratch.take(self.shape, self.dtype, self.parts[0].tensors[0].device)
        self.write(out)
        return out


def _on(part: StoredWeight, device: torch.device) -> StoredWeight:
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    tensors = {name: v.to(device) for name, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(part, **tensors)


FrozenWeight = torch.Tensor | QuantizedWeight
"""A weight of the base model: its numbers, or how they are stored."""


def dense_weight(weight: FrozenWeight) -> torch.Tensor:
    """The numbers of a weight; those of a stored one only until the next is asked for, see `Scratch`."""
    return weight if isinstance(weight, torch.Tensor) else weight.dense()


def matrices_of(weight: FrozenWeight, first: int, end: int) -> FrozenWeight:
    """The matrices `first` to `end` (exclusive) of several; copies, so that the others can be let go."""
    if isinstance(weight, torch.Tensor):
        return weight[first:end].clone()
    return weight.matrices(first, end)


def rows_of(weights: Sequence[FrozenWeight]) -> FrozenWeight:
    """One weight with the rows of all; either all are stored or none."""
    stored = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if not stored:
        return torch.cat([w for w in weights if isinstance(w, torch.Tensor)], dim=-2)
    assert len(stored) == len(weights), "all stored or none"
    return replace(stored[0], parts=tuple(part for weight in stored for part in weight.parts))


# Quantising, to nearest even, with the largest magnitude of a block at the end of the range. -----


def quantize_fp8(weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> Fp8Weight:
    """`weight` [..., N, K] in FP8 with a float32 scale for each block."""
    rows, columns = weight.shape[-2:]
    padding = (0, -columns % block[1], 0, -rows % block[0])
    padded = torch.nn.functional.pad(weight.float(), padding)
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    largest = blocks.abs().amax((-3, -1))
    scales = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    scaled = (blocks / scales[..., :, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    values = scaled.to(torch.float8_e4m3fn).flatten(-2).flatten(-3, -2)
    return Fp8Weight(values[..., :rows, :columns].contiguous(), scales, block)


def quantize_nvfp4(weight: torch.Tensor) -> Nvfp4Weight:
    """`weight` [..., N, K], K even, in NVFP4."""
    columns = weight.shape[-1]
    assert columns % 2 == 0, "two values to a byte"
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % NVFP4_BLOCK))
    blocks = padded.unflatten(-1, (-1, NVFP4_BLOCK))
    largest = blocks.abs().amax(-1)
    global_scale = largest.amax((-2, -1)) / (E2M1_MAX * E4M3_MAX)
    global_scale = torch.where(global_scale > 0, global_scale, 1.0)
    divisor = global_scale[..., None, None]
    scales = (largest / E2M1_MAX / divisor).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)
    step = (scales.float() * divisor)[..., None]
    codes = _to_e2m1(torch.where(step > 0, blocks / step, 0.0)).flatten(-2)[..., :columns]
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return Nvfp4Weight(packed.contiguous(), scales, global_scale)


def _to_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest codes, uint8; of two that are equally near the even one."""
    grid = torch.tensor(_E2M1, device=numbers.device)
    middles = (grid[1:] + grid[:-1]) / 2
    magnitude = numbers.abs()
    below = torch.bucketize(magnitude, middles)
    above = torch.bucketize(magnitude, middles, right=True)
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * numbers.signbit()).to(torch.uint8)
