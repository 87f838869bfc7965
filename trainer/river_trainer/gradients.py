"""Buffers for gradients, used again and again: a fresh one costs more page faults than the additions into it."""

from __future__ import annotations

import threading

import torch

from river_trainer import limits
from river_trainer.adapter import FlatTensors, Layout
from river_trainer.devices import HOST


class GradientPool:
    """Zeroed buffers on one device, by layout. Every lane may take and give at the same time."""

    def __init__(self, device: torch.device = HOST) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._spare: dict[int, list[torch.Tensor]] = {}
        self._spare_bytes = 0

    def take(self, layout: Layout) -> FlatTensors:
        """A buffer of zeros."""
        with self._lock:
            spare = self._spare.get(layout.size)
            flat = spare.pop() if spare else None
            if flat is not None:
                self._spare_bytes -= flat.nbytes
        if flat is None:
            return FlatTensors.zeros(layout, self._device)
        return FlatTensors(layout, flat.zero_())

    def give(self, gradient: FlatTensors) -> None:
        """Takes back a buffer that nobody uses any more."""
        flat = gradient.flat
        with self._lock:
            if self._spare_bytes + flat.nbytes > limits.SPARE_GRADIENTS_MAX_BYTES:
                return
            self._spare.setdefault(flat.numel(), []).append(flat)
            self._spare_bytes += flat.nbytes
