"""The Triton path. Loaded when the first tensor of a GPU comes, so that CPUs need no Triton."""

from river_kernels.gpu import adam, launch, tables, tiles

__all__ = ["adam", "launch", "tables", "tiles"]
