"""How long a step takes and how much memory it needs.

On a GPU times are the device's own, between events. Before each step memory of several times the cache's size is
written: nothing of the last step is left in the cache, and the host gets ahead, as it is in the middle of a model. On a
CPU times are those of the processor in the one thread that computes, so that other programs do not count.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from river_ops.bench.kernels.contender import Contender, step

FLUSH_BYTES = 256 << 20
FLUSHES = 3
STEPS_MAX, STEPS_MIN = 20, 3
MARKS = 3
"""Before a forward pass, between it and the backward pass, and after that."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One step, all of its parts together."""

    forward_ms: float
    backward_ms: float

    @property
    def both_ms(self) -> float:
        return self.forward_ms + self.backward_ms


def samples(contender: Contender, count: int) -> list[Sample]:
    """The times of `count` steps."""
    if contender.workload.x_TH.is_cuda:
        return _device_samples(contender, count)
    found: list[Sample] = []
    for _ in range(count):
        marks: list[float] = []
        step(contender, lambda marks=marks: marks.append(1000 * time.process_time()))
        found.append(_sample(marks))
    return found


def steps_within(seconds: float, step_ms: float) -> int:
    """How many steps to measure."""
    return max(STEPS_MIN, min(STEPS_MAX, int(1000 * seconds / max(step_ms, 1e-3))))


def peak_mib(contender: Contender) -> float | None:
    """The most memory that a step has beside what was there before; None where it cannot be known."""
    device = contender.workload.x_TH.device
    if device.type != "cuda":
        return None
    contender.clear_inputs()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(contender)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def free_memory(device: torch.device) -> None:
    """Gives back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _device_samples(contender: Contender, count: int) -> list[Sample]:
    device = contender.workload.x_TH.device
    steps: list[list[torch.cuda.Event]] = []
    for _ in range(count):
        events: list[torch.cuda.Event] = []

        def mark(events: list[torch.cuda.Event] = events) -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)

        for _ in range(FLUSHES):
            _flushed(device).zero_()
        step(contender, mark)
        steps.append(events)
    torch.cuda.synchronize(device)
    return [_sample([events[0].elapsed_time(event) for event in events]) for events in steps]


@lru_cache(maxsize=1)
def _flushed(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def _sample(marks_ms: list[float]) -> Sample:
    starts, middles, ends = (marks_ms[index::MARKS] for index in range(MARKS))
    return Sample(
        sum(middle - start for start, middle in zip(starts, middles, strict=True)),
        sum(end - middle for middle, end in zip(middles, ends, strict=True)),
    )
