"""The kernels that write stored weights, in Triton's interpreter: the same bits as on CPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from river_kernels.device import triton_on_cpu
from river_kernels.gpu.launch import Launch, recorded
from river_kernels.quantized import (
    Fp8Weight,
    Nvfp4Weight,
    QuantizedWeight,
    Scratch,
    quantize_fp8,
    quantize_nvfp4,
)

DTYPES = [torch.float32, torch.bfloat16]


def in_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits, by which also zeros of both signs differ."""
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def check_equal(weight: Fp8Weight | Nvfp4Weight, dtype: torch.dtype) -> None:
    """Both paths write the same bits, and leave what lies behind the rows alone."""
    columns = weight.shape[-1]
    outs = [torch.full((*weight.shape[:-1], columns + 6), 7.0, dtype=dtype) for _ in range(2)]
    weight.write(outs[0][..., :columns])
    with triton_on_cpu():
        weight.write(outs[1][..., :columns])
    assert (outs[1][..., columns:] == 7.0).all()
    assert torch.equal(in_bits(outs[0]), in_bits(outs[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_every_e4m3_code(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    """All codes but the NaNs, with scales that make the products round."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).expand(17, 254).contiguous()
    scales = torch.rand(17, 2, generator=torch.Generator().manual_seed(4)).to(scale_dtype)
    check_equal(Fp8Weight(values, scales, (1, 128)), dtype)


def test_a_nan_stays_one() -> None:
    """A broken checkpoint is not made to look whole."""
    codes = torch.tensor([[0x7F, 0xFF, 0x7E, 0]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = Fp8Weight(codes, torch.ones(1, 1), (128, 128))
    for dtype in DTYPES:
        out = torch.empty(1, 4, dtype=dtype)
        with triton_on_cpu():
            weight.write(out)
        assert out.isnan().tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_e2m1_codes(dtype: torch.dtype) -> None:
    """All bytes, with scales and global scales that make the products round."""
    packed = torch.arange(256, dtype=torch.uint8).expand(2, 3, 256).contiguous()
    generator = torch.Generator().manual_seed(5)
    scales = (torch.rand(2, 3, 32, generator=generator) * 448).to(torch.float8_e4m3fn)
    check_equal(Nvfp4Weight(packed, scales, torch.tensor([0.0123, 1e-4])), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 130, 200), (40, 6), (3, 16, 128)])
@pytest.mark.parametrize(
    "quantize",
    [
        quantize_fp8,
        lambda weight: quantize_fp8(weight, (1, 128)),
        lambda weight: quantize_fp8(weight, (48, 96)),
        quantize_nvfp4,
    ],
    ids=["fp8 128x128", "fp8 1x128", "fp8 48x96", "nvfp4"],
)
def test_ragged_blocks(
    quantize: Callable[[torch.Tensor], Fp8Weight | Nvfp4Weight],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Rows and columns that are no multiple of a block or a tile, and numbers from subnormal codes to the largest."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(6)).pow(5)
    check_equal(quantize(weight), dtype)


@pytest.mark.parametrize("quantize", [quantize_fp8, quantize_nvfp4])
def test_nothing_is_read_from_a_device(
    quantize: Callable[[torch.Tensor], Fp8Weight | Nvfp4Weight],
) -> None:
    """Without storage a weight is planned: one launch for each part, into scratch of the same kind of device."""
    stored = quantize(torch.randn(2, 32, 128))
    part = (
        Fp8Weight(stored.values.to("meta"), stored.scales.to("meta"), stored.block)
        if isinstance(stored, Fp8Weight)
        else Nvfp4Weight(*(tensor.to("meta") for tensor in stored.tensors))
    )
    launches: list[Launch] = []
    with recorded(launches.append):
        dense = QuantizedWeight((part, part), torch.bfloat16, Scratch()).dense()
    assert dense.is_meta
    assert dense.shape == (2, 64, 128)
    assert len(launches) == 2
