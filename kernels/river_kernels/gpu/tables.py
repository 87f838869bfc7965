"""What the adapters in a batch do at one place of the model, as numbers that kernels read.

Adapters are not copied together: a kernel finds each one's tensors by address. Any number of adapters of any ranks
share a launch, and none of them is padded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from river_kernels.segments import LoraPair, Pairs

RANK: tl.constexpr = tl.constexpr(0)
SCALE: tl.constexpr = tl.constexpr(1)
A: tl.constexpr = tl.constexpr(2)
B: tl.constexpr = tl.constexpr(3)
A_GRAD: tl.constexpr = tl.constexpr(4)
B_GRAD: tl.constexpr = tl.constexpr(5)


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """`rows` int64 [6, slots]: rank, scale (the bits of a float32), and the addresses of A, B and their gradients.

    The last slot is that of tokens without an adapter. A slot that does nothing here has rank 0; an address of a
    gradient that nobody wants is 0. `rank_max` is what grids have to cover. The tensors themselves are kept alive by
    `pairs`.
    """

    rows: torch.Tensor
    slots: int
    rank_max: int
    pairs: tuple[LoraPair | None, ...]


def adapter_table(pairs: Pairs, device: torch.device) -> AdapterTable:
    """The table of `pairs`, whose tensors lie on `device`, contiguous."""
    columns = [_column(pair) for pair in (*pairs, None)]
    ranks = [column[0] for column in columns]
    rows = uploaded(list(zip(*columns, strict=True)), torch.int64, device)
    return AdapterTable(rows, len(columns), max(ranks), tuple(pairs))


def uploaded(
    rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A table on `device`, without waiting for it."""
    return to_device(torch.tensor(rows, dtype=dtype), device)


def to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What the host has made, on `device`, without waiting for what runs there."""
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def check_precision(pairs: Pairs, x: torch.Tensor) -> None:
    """Asserts that adapters are in the precision of x, in which they are computed, and gradients in float32."""
    for slot, pair in enumerate(pairs):
        if pair is None:
            continue
        assert pair.a.dtype is pair.b.dtype is x.dtype, f"slot {slot} is not {x.dtype}"
        for grad in (pair.a_grad, pair.b_grad):
            assert grad is None or grad.dtype is torch.float32, f"slot {slot}'s gradient"


def _column(pair: LoraPair | None) -> tuple[int, ...]:
    if pair is None:
        return (0,) * 6
    return (
        pair.rank,
        struct.unpack("<i", struct.pack("<f", pair.scale))[0],
        _address(pair.a),
        _address(pair.b),
        _address(pair.a_grad),
        _address(pair.b_grad),
    )


def _address(tensor: torch.Tensor | None) -> int:
    if tensor is None or tensor.is_meta:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


@triton.jit
def rank_of(table, slots, slot):
    """The rank of the adapter in `slot`, 0 if it does nothing here."""
    return tl.load(table + RANK * slots + slot).to(tl.int32)


@triton.jit
def scale_of(table, slots, slot):
    """What the update of the adapter in `slot` is multiplied by."""
    return tl.load(table + SCALE * slots + slot).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def weights_of(table, slots, slot, WHICH: tl.constexpr, like):
    """A pointer to A or B of the adapter in `slot`, whose elements are of the type that `like` points to."""
    address = tl.load(table + WHICH * slots + slot)
    return address.to(tl.pointer_type(like.dtype.element_ty))


@triton.jit
def gradient_of(table, slots, slot, WHICH: tl.constexpr):
    """A pointer to the float32 gradient of A or B of the adapter in `slot`; null if nobody wants it."""
    return tl.load(table + WHICH * slots + slot).to(tl.pointer_type(tl.float32))
