"""The Triton path. Loaded when the first tensor of a GPU comes, so that CPUs need no Triton."""

from river_kernels.gpu import (
    adam,
    augmented,
    column_grams,
    columns,
    dequantize,
    expand,
    launch,
    lce,
    linear,
    logprobs,
    products,
    project,
    tables,
    tiles,
)

__all__ = [
    "adam",
    "augmented",
    "column_grams",
    "columns",
    "dequantize",
    "expand",
    "launch",
    "lce",
    "linear",
    "logprobs",
    "products",
    "project",
    "tables",
    "tiles",
]
