"""How long adapters take to come: the last ones, for people, and all of them, for Prometheus."""

from __future__ import annotations

from collections import deque
from statistics import median

from prometheus_client import Histogram

from river_engine.limits import LOAD_TIMES_KEPT
from river_engine.protocol import LoadTimes

_BUCKETS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_fetch_s = Histogram(
    "river_engine_adapter_fetch_seconds",
    "From the wish for an adapter until its files are here and found fit.",
    buckets=_BUCKETS_S,
)
_load_s = Histogram(
    "river_engine_adapter_load_seconds",
    "Until vLLM has an adapter whose files are here, others that leave for it included.",
    buckets=_BUCKETS_S,
)


class RecentLoads:
    """The times of the last `LOAD_TIMES_KEPT` adapters of one engine."""

    def __init__(self) -> None:
        self._fetches_s: deque[float] = deque(maxlen=LOAD_TIMES_KEPT)
        self._loads_s: deque[float] = deque(maxlen=LOAD_TIMES_KEPT)

    def fetched(self, seconds: float) -> None:
        """One is here."""
        _fetch_s.observe(seconds)
        self._fetches_s.append(seconds)

    def loaded(self, seconds: float) -> None:
        """One is in vLLM."""
        _load_s.observe(seconds)
        self._loads_s.append(seconds)

    def told(self) -> LoadTimes | None:
        """None while nothing has been loaded."""
        if not self._loads_s:
            return None
        loads = sorted(self._loads_s)
        return LoadTimes(
            loads=len(loads),
            fetch_median_ms=1e3 * median(self._fetches_s) if self._fetches_s else 0.0,
            load_median_ms=1e3 * median(loads),
            load_p99_ms=1e3 * loads[-(-99 * len(loads) // 100) - 1],
        )
