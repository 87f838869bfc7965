"""Where passes are computed, and how data get there and back without the host waiting for the device.

What comes from clients is made into tensors on the host, and all tensors of a pass go to the device in one copy from
pinned memory. What comes out of passes is fetched at the end of a batch, when everything has been started. Copies that
the host writes down are made beside the computing, on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch

from river_trainer.errors import DeviceError

Item = TypeVar("Item")

HOST = torch.device("cpu")
_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Home:
    """Where the model is, and runs that are trained; `dtype` is that of the model."""

    device: torch.device = HOST
    dtype: torch.dtype = torch.float32

    @property
    def is_host(self) -> bool:
        return self.device.type == "cpu"

    @property
    def has_copies(self) -> bool:
        """Whether kernels read weights in another precision than they are kept in."""
        return self.dtype is not torch.float32

    def run_bytes(self, weights: int) -> int:
        """Memory of a run of so many weights: they, two moments and a gradient in float32, and what kernels read."""
        return weights * (4 * 4 + (self.dtype.itemsize if self.has_copies else 0))


HOME_OF_FLOATS = Home()
"""The host, in float32."""


def find_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device that `wanted`, one of "auto", "cpu" and "cuda", means for process `local_rank` of a machine's.

    Raises:
        DeviceError: there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return HOST
    if local_rank >= count:
        raise DeviceError(
            f"RIVER_DEVICE=cuda: there are {count} devices, this needs {local_rank + 1}"
        )
    return torch.device("cuda", local_rank)


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that nobody has."""
    return torch.cuda.mem_get_info(device)[0]


# ---- To the device -----------------------------------------------------------------------------------


def moved(item: Item, device: torch.device) -> Item:
    """`item` with all tensors in it on `device`: in dataclasses, tuples and lists, as deep as they go.

    They come from the host in one copy, and nobody waits for it.
    """
    if device.type == "cpu":
        return item
    there = iter(_together(list(_tensors(item)), device))
    return _rebuilt(item, there)


def _tensors(item: Any) -> Iterator[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, tuple | list):
        for part in item:
            yield from _tensors(part)
    elif is_dataclass(item):
        for field in fields(item):
            yield from _tensors(getattr(item, field.name))


def _rebuilt(item: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """`item` with the next of `tensors` in the place of each of its own."""
    if isinstance(item, torch.Tensor):
        return next(tensors)
    if isinstance(item, tuple | list):
        parts = [_rebuilt(part, tensors) for part in item]
        return type(item)(parts)
    if is_dataclass(item) and not isinstance(item, type):
        changed = {
            field.name: _rebuilt(getattr(item, field.name), tensors) for field in fields(item)
        }
        return replace(item, **changed)
    return item


def _together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    ends: list[int] = []
    size_bytes = 0
    for tensor in tensors:
        ends.append(size_bytes + tensor.nbytes)
        size_bytes = -(-ends[-1] // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    staged = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, tensor in zip(_views(staged, tensors, ends), tensors, strict=True):
        place.copy_(tensor)
    return _views(staged.to(device, non_blocking=True), tensors, ends)


def _views(
    buffer: torch.Tensor, tensors: Sequence[torch.Tensor], ends: Sequence[int]
) -> list[torch.Tensor]:
    # Autograd takes views of one tensor for changed when one of them is; `data` are tensors of their own.
    return [
        buffer[end - tensor.nbytes : end].view(tensor.dtype).view(tensor.shape).data
        for tensor, end in zip(tensors, ends, strict=True)
    ]


# ---- To the host -------------------------------------------------------------------------------------


class Arrival(Protocol):
    """The end of a copy that goes on."""

    def synchronize(self) -> None: ...


def fetched(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`tensors` on the host, once the device has computed them. Blocking."""
    if all(tensor.is_cpu for tensor in tensors):
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
    host.copy_(flat)
    pieces = host.split([tensor.nbytes for tensor in tensors])
    return [
        # Each in memory of its own, as views of odd offsets could not be.
        piece.clone().view(tensor.dtype).view(tensor.shape)
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]


def leaving(tensor: torch.Tensor) -> tuple[torch.Tensor, Arrival | None]:
    """A copy of `tensor` on the host, in pinned memory, and what to wait for before it is read.

    `tensor` may be freed at once, and must not be changed any more.
    """
    if not tensor.is_cuda:
        return tensor.to(HOST, copy=True), None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = _leaving_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(stream)
    tensor.record_stream(stream)
    return host, arrival


@lru_cache
def _leaving_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
