"""Stored weights into numbers, see `river_kernels.quantized`; as fast as memory takes them.

Codes are taken apart as bits: not every GPU converts these types, and so all of them, and the interpreter, do the same.
A small float's bits, moved to where float16 has its exponent and mantissa, are that float16 number times a power of
two; subnormal numbers too.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl

from river_kernels.gpu.launch import launch

_ROWS = 16
_COLUMNS = 128
_WARPS = 4
_E4M3_NAN: tl.constexpr = tl.constexpr(0x7F)


def write_fp8(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], out: torch.Tensor
) -> None:
    """Writes `values * scales` into `out` [..., N, K], whose matrices and rows may lie apart."""
    values, scales, out = _as_matrices(values), _as_matrices(scales), _as_matrices(out)
    matrices, rows, columns = out.shape
    # No tile reaches over two blocks of columns.
    tile = min(_COLUMNS, gcd(triton.next_power_of_2(columns), block[1] & -block[1]))
    launch(
        _write_fp8,
        (triton.cdiv(columns, tile), triton.cdiv(rows, _ROWS), matrices),
        values.view(torch.uint8),
        scales,
        out,
        rows,
        columns,
        scales.shape[2],
        scales.shape[1] * scales.shape[2],
        out.stride(0),
        out.stride(1),
        warps=_WARPS,
        stages=1,
        BLOCK_ROWS=block[0],
        BLOCK_COLUMNS=block[1],
        ROWS=_ROWS,
        COLUMNS=tile,
    )


def write_nvfp4(
    packed: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor, out: torch.Tensor
) -> None:
    """Writes the values of `packed`, scaled, into `out` [..., N, K], whose matrices and rows may lie apart."""
    packed, scales, out = _as_matrices(packed), _as_matrices(scales), _as_matrices(out)
    matrices, rows, columns = out.shape
    launch(
        _write_nvfp4,
        (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS), matrices),
        packed,
        scales.view(torch.uint8),
        global_scale.reshape(-1),
        out,
        rows,
        columns // 2,
        scales.shape[2],
        out.stride(0),
        out.stride(1),
        warps=_WARPS,
        stages=1,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )


def _as_matrices(tensor: torch.Tensor) -> torch.Tensor:
    """[matrices, N, K]; a view."""
    assert tensor.stride(-1) == 1
    return tensor[None] if tensor.ndim == 2 else tensor.flatten(0, -3)  # noqa: PLR2004  # a matrix


@triton.jit
def _e4m3(code):
    """The float32 numbers of e4m3 codes, uint8."""
    bits = ((code & 0x80).to(tl.uint16) << 8) | ((code & 0x7F).to(tl.uint16) << 7)
    number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == _E4M3_NAN, float("nan"), number)


@triton.jit
def _e2m1(code):
    """The float32 numbers of e2m1 codes, uint8 below 16."""
    bits = ((code & 0x8).to(tl.uint16) << 12) | ((code & 0x7).to(tl.uint16) << 9)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def rounded(number, like, UPCAST: tl.constexpr):
    """float32 to what `like` points to, to nearest even; the interpreter would cut bfloat16 off."""
    if UPCAST and like.dtype.element_ty == tl.bfloat16:
        bits = number.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(number != number, (bits >> 16) | 0x40, kept)  # noqa: PLR0124  # it is NaN
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return number.to(like.dtype.element_ty)


@triton.jit
def _write_fp8(
    values,  # uint8 [E, N, K]
    scales,  # [E, N / BLOCK_ROWS, K / BLOCK_COLUMNS]
    out,  # [E, N, K]
    rows,
    columns,
    scale_columns,
    scale_matrix,
    out_matrix,
    out_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    matrix = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * COLUMNS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = start + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (matrix * rows + row) * columns
    code = tl.load(values + at[:, None] + column[None, :], mask=inside, other=0)
    block = row // BLOCK_ROWS * scale_columns + start // BLOCK_COLUMNS
    scale = tl.load(scales + matrix * scale_matrix + block, mask=row < rows, other=0.0)
    number = _e4m3(code) * scale.to(tl.float32)[:, None]
    target = out + matrix * out_matrix + row[:, None].to(tl.int64) * out_row + column[None, :]
    tl.store(target, rounded(number, out, UPCAST), mask=inside)


@triton.jit
def _write_nvfp4(
    packed,  # uint8 [E, N, K / 2]
    scales,  # uint8 [E, N, K / 16], e4m3
    global_scale,  # [E]
    out,  # [E, N, K]
    rows,
    half_columns,
    scale_columns,
    out_matrix,
    out_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    BLOCKS: tl.constexpr = COLUMNS // 16
    matrix = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    byte = part * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    inside = (row < rows)[:, None] & (byte < half_columns)[None, :]
    at = matrix * rows + row
    code = tl.load(packed + (at * half_columns)[:, None] + byte[None, :], mask=inside, other=0)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    has_scale = (row < rows)[:, None] & (block < scale_columns)[None, :]
    scale_at = (at * scale_columns)[:, None] + block[None, :]
    scale_code = tl.load(scales + scale_at, mask=has_scale, other=0)
    scale = _e4m3(scale_code) * tl.load(global_scale + matrix)
    even = tl.reshape(_e2m1(code & 0xF), (ROWS, BLOCKS, 8)) * scale[:, :, None]
    odd = tl.reshape(_e2m1(code >> 4), (ROWS, BLOCKS, 8)) * scale[:, :, None]
    number = tl.reshape(tl.interleave(even, odd), (ROWS, COLUMNS))
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    within = (row < rows)[:, None] & (column < 2 * half_columns)[None, :]
    target = out + matrix * out_matrix + row[:, None].to(tl.int64) * out_row + column[None, :]
    tl.store(target, rounded(number, out, UPCAST), mask=within)
