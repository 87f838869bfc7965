"""The Triton path. Loaded when the first tensor of a GPU comes, so that CPUs need no Triton."""

from river_kernels.gpu import adam, dequantize, launch, tables, tiles

__all__ = ["adam", "dequantize", "launch", "tables", "tiles"]
