"""Stored weights against their formulas, spelled out with plain numbers."""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import product

import pytest
import torch

from river_kernels.quantized import (
    Fp8Weight,
    Nvfp4Weight,
    QuantizedWeight,
    Scratch,
    dense_weight,
    quantize_fp8,
    quantize_nvfp4,
    rows_of,
)

DTYPES = [torch.float32, torch.bfloat16]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def e4m3_number(code: int) -> float:
    """What an e4m3 code means, from its sign, exponent and mantissa."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 0xF, code & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def written(weight: Fp8Weight | Nvfp4Weight, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=dtype)
    weight.write(out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_every_e4m3_code(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    """Every code but the two NaNs is its number times its block's scale, rounded once."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    scales = torch.tensor([[0.37, 1e-3]], dtype=scale_dtype)
    weight = Fp8Weight(codes.view(torch.float8_e4m3fn)[None], scales, (1, 128))
    numbers = torch.tensor([e4m3_number(int(code)) for code in codes])
    spread = torch.cat((scales[0, :1].expand(128), scales[0, 1:].expand(126))).float()
    expected = (numbers * spread).to(dtype)
    assert torch.equal(written(weight, dtype)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_e2m1_codes(dtype: torch.dtype) -> None:
    """The even column is in the low four bits, and scale and global scale are multiplied first."""
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    generator = torch.Generator().manual_seed(1)
    scales = (torch.rand(1, 32, generator=generator) * 400).to(torch.float8_e4m3fn)
    global_scale = torch.tensor(0.0123)
    numbers = torch.tensor([E2M1[code >> shift & 15] for code in range(256) for shift in (0, 4)])
    spread = (scales.float() * global_scale)[0].repeat_interleave(16)
    expected = (numbers * spread).to(dtype)
    assert torch.equal(written(Nvfp4Weight(packed, scales, global_scale), dtype)[0], expected)


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (64, 32)])
@pytest.mark.parametrize("shape", [(3, 130, 200), (40, 7), (128, 256)])
def test_quantised_fp8_is_the_nearest(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    """Each number is off by at most half a step of its code, in every block, ragged ones too; the largest is kept."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    stored = quantize_fp8(weight, block)
    numbers = written(stored, torch.float32)
    scale = stored.scales.repeat_interleave(block[0], -2)[..., : shape[-2], :]
    scale = scale.repeat_interleave(block[1], -1)[..., : shape[-1]]
    # Three bits of mantissa: a step is at least 2^-9, and at most an eighth of a number.
    step = torch.exp2(torch.floor(torch.log2(weight.abs() / scale)) - 3).clamp_min(2.0**-9)
    assert ((numbers - weight).abs() <= step * scale * 0.5001).all()
    codes = stored.values.float().abs()
    assert codes.max() == 448.0
    rows, columns = (range(0, size, by) for size, by in zip(shape[-2:], block, strict=True))
    for row, column in product(rows, columns):
        part = codes[..., row : row + block[0], column : column + block[1]]
        assert (part.amax((-2, -1)) == 448.0).all()


def test_ties_go_to_the_even_code() -> None:
    """Halfway between two codes of e2m1 the even one is taken, of both signs."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.tensor([*ties, *(-tie for tie in ties), 6.0, -6.0])
    stored = quantize_nvfp4(torch.stack((row * 448, row))[None])
    assert (stored.scales.float() == torch.tensor([448.0, 1.0]).view(1, 2, 1)).all()
    numbers = written(stored, torch.float32)[0, 1].tolist()
    assert numbers == [0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4, 6, -6]


SAMPLERS_NUMBERS = """
import torch
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, scaled_dequantize
from river_kernels.quantized import quantize_fp8, quantize_nvfp4

weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(8))
four, eight = quantize_nvfp4(weight), quantize_fp8(weight)
for dtype in (torch.bfloat16, torch.float32):
    ours = [torch.empty(weight.shape, dtype=dtype) for _ in range(2)]
    four.write(ours[0])
    eight.write(ours[1])
    theirs = [
        dequantize_to_dtype(four.packed, four.scales, four.global_scale, dtype, swizzle=False),
        scaled_dequantize(eight.values, eight.scales, GroupShape(128, 128), dtype),
    ]
    print([torch.equal(*pair) for pair in zip(ours, theirs)])
"""


def test_the_numbers_are_those_of_the_sampler() -> None:
    """The functions of vLLM itself give the same bits, in both precisions."""
    done = subprocess.run(
        [sys.executable, "-c", SAMPLERS_NUMBERS], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-2:] == ["[True, True]"] * 2


@pytest.mark.parametrize("columns", [16, 40, 2])
def test_quantised_nvfp4_is_near(columns: int) -> None:
    """Within a sixth of the largest of 16 numbers: half the widest step, and what the scale's own rounding adds."""
    weight = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(3))
    weight[1] *= 1e-3
    numbers = written(quantize_nvfp4(weight), torch.float32)
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % 16)).unflatten(-1, (-1, 16))
    largest = padded.amax(-1).repeat_interleave(16, -1)[..., :columns]
    assert ((numbers - weight).abs() <= largest * (1 / 6 + 1 / 16)).all()


def test_zeros_stay_zeros() -> None:
    """A matrix of zeros, and a block of zeros beside others, have finite scales and are zeros again."""
    weight = torch.zeros(2, 128, 256)
    weight[1, :, 128:] = 3.0
    for stored in (quantize_fp8(weight), quantize_nvfp4(weight)):
        assert torch.equal(written(stored, torch.float32), weight)


def test_subnormal_codes() -> None:
    """The smallest numbers of e4m3 come back exactly."""
    row = torch.tensor([448.0, *(step * 2.0**-9 for step in range(9)), 0.0, -(2.0**-9)])
    assert torch.equal(written(quantize_fp8(row[None]), torch.float32)[0], row)


@pytest.mark.parametrize("quantize", [quantize_fp8, quantize_nvfp4])
def test_rows_of_several_parts(quantize: type) -> None:
    """Parts with scales of their own are one matrix, also inside of a wider buffer, whose other columns stay."""
    scratch = Scratch()
    tops, bottoms = torch.randn(2, 5, 24), torch.randn(2, 3, 24) * 100
    parts = [
        QuantizedWeight((quantize(part),), torch.bfloat16, scratch) for part in (tops, bottoms)
    ]
    both = QuantizedWeight((*parts[0].parts, *parts[1].parts), torch.bfloat16, scratch)
    assert both.shape == (2, 8, 24)
    expected = torch.cat([dense_weight(part).clone() for part in parts], dim=1)
    wide = torch.full((2, 8, 32), 7.0, dtype=torch.bfloat16)
    both.write(wide[..., :24])
    assert torch.equal(wide[..., :24], expected)
    assert (wide[..., 24:] == 7.0).all()
    assert torch.equal(dense_weight(both), expected)
    assert torch.equal(dense_weight(both.matrices(1, 2)), expected[1:])
    assert sum(tensor.nbytes for tensor in both.tensors) < expected.nbytes


def test_rows_of_matrices_that_are_stored_or_not() -> None:
    """`rows_of` joins tensors as tensors and stored weights as stored weights."""
    one, two = torch.randn(4, 32), torch.randn(2, 32)
    assert torch.equal(dense_weight(rows_of([one, two])), torch.cat([one, two]))
    scratch = Scratch()
    stored = [
        QuantizedWeight((quantize_nvfp4(part),), torch.float32, scratch) for part in (one, two)
    ]
    expected = torch.cat([part.dense().clone() for part in stored])
    assert torch.equal(dense_weight(rows_of(stored)), expected)


def test_layers_share_one_buffer_and_threads_do_not() -> None:
    """Two weights are written to the same memory; another thread has its own, so that lanes can work side by side."""
    scratch = Scratch()
    large, small = (
        QuantizedWeight((quantize_fp8(torch.randn(rows, 128)),), torch.float32, scratch)
        for rows in (64, 32)
    )
    first = large.dense()
    assert small.dense().data_ptr() == first.data_ptr() == large.dense().data_ptr()
    seen: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: seen.append(small.dense()))
    thread.start()
    thread.join()
    assert seen[0].data_ptr() != first.data_ptr()
    assert torch.equal(first, large.dense())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fp8Weight(torch.zeros(4, 4), torch.ones(1, 1), (128, 128)),
        lambda: Fp8Weight(
            torch.zeros(4, 200).to(torch.float8_e4m3fn), torch.ones(1, 1), (128, 128)
        ),
        lambda: Nvfp4Weight(
            torch.zeros(4, 16, dtype=torch.uint8),
            torch.ones(4, 1).to(torch.float8_e4m3fn),
            torch.tensor(1.0),
        ),
    ],
    ids=["values of another type", "a scale too few", "half of the scales"],
)
def test_parts_that_do_not_fit_are_no_weight(make: type) -> None:
    """Tensors whose types or shapes contradict each other are refused where they are put together."""
    with pytest.raises(AssertionError):
        make()
