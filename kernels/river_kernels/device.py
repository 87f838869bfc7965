"""Which path computes: torch on CPUs, Triton on GPUs.

`Triton` is also chosen for tensors without storage (device "meta"), where kernels are planned and not run: that nothing
waits for a device and nothing lies on the wrong one can be seen without having one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_on_cpu: ContextVar[bool] = ContextVar("triton_on_cpu", default=False)


def uses_triton(x: torch.Tensor) -> bool:
    """Whether functions of `x` run as Triton kernels."""
    return x.is_cuda or x.is_meta or _on_cpu.get()


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Runs the Triton kernels on CPU tensors too, in Triton's interpreter; for tests, it takes 10 ms a program.

    Triton has to be imported with TRITON_INTERPRET=1.
    """
    token = _on_cpu.set(True)
    try:
        yield
    finally:
        _on_cpu.reset(token)
