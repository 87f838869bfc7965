"""`river bench kernels`: a mixture of experts with adapters, forward and backward, against peers on the same work.

On a GPU it goes through the grid of the design, at the sizes of a model of 35 billion parameters; elsewhere it compares
the CPU path with loops and grouped products. It needs torch and triton, and takes transformers, peft and axolotl as
peers where they are: with `ops` and `kernels` on PYTHONPATH, `python -m river_ops.bench.kernels` does without the rest.
"""

from __future__ import annotations

from collections.abc import Callable

from river_ops.bench.kernels.report import KernelsReport, table

__all__ = ["KernelsReport", "run", "table"]


def run(*, quick: bool, say: Callable[[str], None]) -> KernelsReport:
    """Minutes, or under one if `quick`."""
    import torch  # noqa: PLC0415  # the command line is quick to say what there is

    from river_ops.bench.kernels.runs import run_cpu, run_gpu  # noqa: PLC0415

    return (run_gpu if torch.cuda.is_available() else run_cpu)(quick=quick, say=say)
