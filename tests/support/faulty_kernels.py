"""Kernels with which `river_kernels.aot` has to find fault, and one with which not.

    python -m support.faulty_kernels

prints, as JSON, what became of each on sm_90. Not for a process in which Triton interprets.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from river_kernels.aot.compiling import compile_program
from river_kernels.aot.programs import program_of
from river_kernels.gpu.launch import Launch, dot


@triton.jit
def multiply(  # noqa: ANN201  # a kernel
    a,  # noqa: ANN001  # [ROWS, steps * 64]
    b,  # noqa: ANN001  # [steps * 64, COLUMNS]
    out,  # noqa: ANN001  # [ROWS, COLUMNS]
    steps,  # noqa: ANN001
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    row, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, 64)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(steps):
        at = step * 64 + inner
        left = tl.load(a + row[:, None] * steps * 64 + at[None, :])
        right = tl.load(b + at[:, None] * COLUMNS + column[None, :])
        total = dot(left, right, total, UPCAST)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], total)


def launch_of(rows: int, columns: int, *, stages: int = 2, steps: int = 32) -> Launch:
    shapes = (rows, steps * 64), (steps * 64, columns), (rows, columns)
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
    tensors = [
        torch.empty(shape, dtype=dtype, device="meta")
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    constants = {"ROWS": rows, "COLUMNS": columns, "UPCAST": False}
    return Launch(multiply, (1,), (*tensors, steps), constants, 4, stages)


def main() -> None:
    """Prints what became of each."""
    launches = {
        "large": launch_of(64, 64),
        "small": launch_of(16, 64),
        "spills": launch_of(128, 512),
        "too much shared memory": launch_of(64, 256, stages=8),
        "does not compile": launch_of(64, 48),
    }
    compiled = {
        name: asdict(compile_program(program_of(launch), 90)) for name, launch in launches.items()
    }
    print(json.dumps(compiled))  # noqa: T201  # a command's answer


if __name__ == "__main__":
    main()
