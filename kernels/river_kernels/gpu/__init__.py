"""The Triton path. Loaded when the first tensor of a GPU comes, so that CPUs need no Triton."""

from river_kernels.gpu import launch, tables, tiles

__all__ = ["launch", "tables", "tiles"]
