"""What all benchmarks share: alternating, medians, and the machine that the numbers are of."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Seconds = float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """No struct, since benchmarks of kernels run where nothing but torch is installed.

    `load_average` is that of the last minute when the benchmark began: above zero, others were at work too.
    """

    processor: str
    cores: int
    memory_gb: float
    system: str
    python: str
    load_average: float


def machine() -> Machine:
    """The machine we are on, now."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(memory_bytes / 1e9, 1),
        system=platform.platform(),
        python=platform.python_version(),
        load_average=round(os.getloadavg()[0], 2),
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def alternating(
    cases: Mapping[str, Callable[[], Seconds]], *, rounds: int
) -> dict[str, list[Seconds]]:
    """What each case measures in each round.

    Cases take turns, so that whatever else the machine is doing hits all of them alike, and every other round goes
    backwards, so that none always follows the same one.
    """
    assert rounds > 0
    found: dict[str, list[Seconds]] = {name: [] for name in cases}
    for number in range(rounds):
        names = list(cases)
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(cases[name]())
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that `percent` of them do not exceed."""
    assert values
    assert 0 < percent <= 100  # noqa: PLR2004
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def significant(value: float, digits: int = 4) -> float:
    """`value` without the digits that a measurement cannot have."""
    return float(f"{value:.{digits}g}")
