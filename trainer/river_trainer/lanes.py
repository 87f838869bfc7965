"""Threads that compute side by side, each alone on its core.

Torch's own threads split every single operation and wait for each other after it; on the small matrices of an adapter
the waiting costs more than the work. A lane instead does whole passes with one thread, and lanes meet only at the end
of a batch. An accelerator has one lane: what its thread starts there is done in that order, and nobody is waited for.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from river_trainer.devices import HOST

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 1 << 30
_OBJECTS_BEFORE_COLLECTION = 50_000


class Lanes:
    """`count` lanes for what is computed on `device`. Use it from one thread at a time, and `close` it in the end."""

    def __init__(self, count: int, device: torch.device = HOST) -> None:
        assert count > 0
        self.count = count
        self._pool = ThreadPoolExecutor(count, "lane", initializer=_enter, initargs=(device,))

    def run(self, work: Sequence[Callable[[], Answer]]) -> list[Answer]:
        """Does all of `work`, in that order as lanes become free; the answers in the same order.

        Raises:
            Exception: the first failure, after everything has ended.
        """
        futures = [self._pool.submit(item) for item in work]
        failures = [future.exception() for future in futures]
        for failure in failures:
            if failure is not None:
                raise failure
        return [future.result() for future in futures]

    def map(self, function: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
        """`function` of every item."""
        return self.run([lambda item=item: function(item) for item in items])

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _enter(device: torch.device) -> None:
    """What a new thread does first."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)


class PerLane(threading.local):
    """Base of what each lane keeps for itself."""


def settle() -> None:
    """Makes the process fit for passes: call it once, when the model is loaded and before the first of them.

    Lets the C library, where it can be told so, keep the memory that it was given back: a pass frees and allocates the
    same hundreds of megabytes again and again, and every page of it would have to be faulted in anew. Takes what is
    loaded out of the garbage collector's sight, and lets it look less often: a pass makes many objects and no garbage.
    """
    gc.collect()
    gc.freeze()
    # Extension modules complain at the end of what was never collected.
    atexit.register(gc.unfreeze)
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return
    for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        mallopt(option, _KEPT_BYTES)
