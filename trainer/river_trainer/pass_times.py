"""How long passes take forwards and backwards.

On the host a lane's own clock says so. A device is still at work when its host has gone on, so there the moments are
events in its stream, which are read when everything of a batch has come out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Moment = float | torch.cuda.Event
Moments = tuple[Moment, Moment, Moment]
"""The beginning of a pass, the end of its forward half, and its own end."""


def moment(device: torch.device) -> Moment:
    """Now, in the order of what is computed on `device`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(slots=True)
class Halves:
    """Seconds, summed over lanes."""

    forward_s: float = 0.0
    backward_s: float = 0.0

    @property
    def backward_share(self) -> float:
        """Of both."""
        both = self.forward_s + self.backward_s
        return self.backward_s / both if both else 0.0


class PassTimes:
    """What the passes since the last `take` took; lanes add side by side."""

    def __init__(self) -> None:
        self._halves = Halves()
        self._lock = threading.Lock()

    def add(self, passes: Sequence[Moments]) -> None:
        """These have come to their end."""
        for begun, middle, end in passes:
            forward_s, backward_s = _seconds(begun, middle), _seconds(middle, end)
            with self._lock:
                self._halves.forward_s += forward_s
                self._halves.backward_s += backward_s

    def take(self) -> Halves:
        """All of it, once."""
        with self._lock:
            taken, self._halves = self._halves, Halves()
        return taken


def _seconds(begun: Moment, end: Moment) -> float:
    if isinstance(begun, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return begun.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - begun
