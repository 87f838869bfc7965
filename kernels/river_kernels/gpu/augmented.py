"""Frozen weights with room behind their columns for an adapter's B: `[x | v] [W | B]^T` is one product.

That adds rank / in to the arithmetic, and no pass over y. The room is scratch: whoever multiplies writes it first, in
forward and in backward, so a weight serves one stream of work at a time.
"""

from __future__ import annotations

import torch

from river_kernels.quantized import FrozenWeight, QuantizedWeight

PAD_STEP = 64
PAD_MAX = 512


def augmented(weight_OI: torch.Tensor, pad: int) -> torch.Tensor:
    """The same weights, [out, in], as a view of [out, in + pad]: the row stride says that there is room.

    No other frozen weight may be a view of that kind, as the room is written to.
    """
    assert 0 < pad <= PAD_MAX
    assert pad % PAD_STEP == 0
    outputs, inputs = weight_OI.shape
    storage = weight_OI.new_zeros(outputs, inputs + pad)
    storage[:, :inputs] = weight_OI
    return storage[:, :inputs]


def room_of(weight_OI: FrozenWeight) -> int:
    """How many columns there may be behind `weight_OI`; 0 if it is a tensor not made by `augmented`."""
    if isinstance(weight_OI, QuantizedWeight):
        return PAD_MAX
    outputs, inputs = weight_OI.shape
    pad = weight_OI.stride(0) - inputs
    elements = weight_OI.untyped_storage().nbytes() // weight_OI.element_size()
    is_whole = weight_OI.storage_offset() == 0 and elements == outputs * (inputs + pad)
    fits = 0 < pad <= PAD_MAX and pad % PAD_STEP == 0 and weight_OI.stride(1) == 1
    return pad if is_whole and fits else 0


def numbers_with_room(weight_OI: FrozenWeight, columns: int, device: torch.device) -> torch.Tensor:
    """The numbers of `weight_OI` with room for `columns`; of a stored one until the next is asked for."""
    if isinstance(weight_OI, torch.Tensor):
        return weight_OI
    outputs, inputs = weight_OI.shape
    scratch = weight_OI.scratch.take((outputs, inputs + columns), weight_OI.dtype, device)
    weight_OI.write(scratch[:, :inputs])
    return scratch[:, :inputs]


def with_room(weight_OI: torch.Tensor, columns: int) -> torch.Tensor:
    """`weight_OI` and the first `columns` behind it, [out, in + columns]."""
    outputs, inputs = weight_OI.shape
    assert inputs + columns <= weight_OI.stride(0)
    return weight_OI.as_strided((outputs, inputs + columns), weight_OI.stride())
