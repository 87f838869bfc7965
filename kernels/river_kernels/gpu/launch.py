"""How kernels are started, and what all of them share.

Rules that keep kernels both fast on a GPU and testable in Triton's interpreter:

* every product goes through `dot`: the interpreter multiplies the bits of bfloat16 as if they were integers;
* no autotuning: `configs.py` chooses tile shapes from shapes that the host knows, so that the same work is done by the
  same program, with the same bits, every time;
* every sum has one order: no atomics, a result is written by one program only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

FUSES_MULTIPLY_ADD = True
"""Said aloud, because Triton changes what it does when nobody says."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a kernel: what `triton.compile` needs to compile the same program without a GPU."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_recorder: ContextVar[Callable[[Launch], None] | None] = ContextVar("recorder", default=None)


@contextmanager
def recorded(record: Callable[[Launch], None]) -> Iterator[None]:
    """Tells `record` of every launch."""
    token = _recorder.set(record)
    try:
        yield
    finally:
        _recorder.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int = 4,
    stages: int = 2,
    **constants: Any,
) -> None:
    """Starts `kernel`, whose last constexpr parameter is `UPCAST`; nothing runs on tensors without storage."""
    constants["UPCAST"] = isinstance(kernel, InterpretedFunction)
    record = _recorder.get()
    if record is not None:
        record(Launch(kernel, grid, arguments, constants, warps, stages))
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    if 0 in grid or tensors[0].is_meta:
        return
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](
            *arguments,
            **constants,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=FUSES_MULTIPLY_ADD,
        )


@triton.jit
def dot(a, b, sum_, UPCAST: tl.constexpr):
    """`sum_ + a @ b`, accumulated in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_, input_precision="ieee")
    return tl.dot(a, b, sum_, input_precision="ieee")
