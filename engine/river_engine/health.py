"""How this engine is: what vLLM's own metrics say of it, and what only we know."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from river_engine.adapters import AdapterStore
from river_engine.admission import Admission
from river_engine.limits import RATE_WINDOW_S
from river_engine.problems import RecentProblems
from river_engine.protocol import ADAPTERS_TOLD_MAX, EngineHealth

RUNNING = "vllm:num_requests_running"
CACHE_USED = "vllm:kv_cache_usage_perc"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
GENERATED = "vllm:generation_tokens_total"
NAMES = (RUNNING, CACHE_USED, PREFIX_QUERIES, PREFIX_HITS, GENERATED)


@dataclass(frozen=True, slots=True)
class _Totals:
    """vLLM's counters at one moment (monotonic seconds), in tokens."""

    at: float
    queries: float
    hits: float
    generated: float


class Health:
    """Made once for a process; `batch_max` is how many sequences vLLM's batch can have."""

    def __init__(
        self,
        registry: CollectorRegistry,
        admission: Admission,
        store: AdapterStore,
        problems: RecentProblems,
        *,
        batch_max: int,
        ends: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._admission = admission
        self._store = store
        self._problems = problems
        self._batch_max = batch_max
        self._ends = ends
        self._clock = clock
        self._started_at = time.time()
        self._totals: deque[_Totals] = deque()
        self._hit_rate: float | None = None

    def now(self) -> EngineHealth:
        """To be called at every heartbeat: rates are those between calls of the last `RATE_WINDOW_S`."""
        values = vllm_values(self._registry)
        tokens_per_s = self._rates(values)
        return EngineHealth(
            started_at=self._started_at,
            inside=self._admission.turns_inside(),
            waiting=sum(self._admission.waiting().values()),
            batch=int(values.get(RUNNING, 0.0)),
            batch_max=self._batch_max,
            slots_used=self._admission.slots_used(),
            kv_cache_used=values.get(CACHE_USED),
            prefix_hit_rate=self._hit_rate,
            tokens_per_s=tokens_per_s,
            adapters=self._store.held()[-ADAPTERS_TOLD_MAX:],
            load_times=self._store.times.told(),
            problems=self._problems.told(),
            ends=self._ends,
        )

    def _rates(self, values: Mapping[str, float]) -> float:
        """Tokens generated per second; notes the share of the prompts' tokens that came from the cache."""
        now = _Totals(
            self._clock(),
            values.get(PREFIX_QUERIES, 0.0),
            values.get(PREFIX_HITS, 0.0),
            values.get(GENERATED, 0.0),
        )
        self._totals.append(now)
        while len(self._totals) > 2 and now.at - self._totals[1].at >= RATE_WINDOW_S:  # noqa: PLR2004 - two ends
            self._totals.popleft()
        before = self._totals[0]
        if now.queries > before.queries:
            self._hit_rate = (now.hits - before.hits) / (now.queries - before.queries)
        elapsed_s = now.at - before.at
        return (now.generated - before.generated) / elapsed_s if elapsed_s > 0 else 0.0


def vllm_values(registry: CollectorRegistry) -> dict[str, float]:
    """Those of `NAMES` that vLLM has counted; over several of its engines in one process, their sums."""
    values: dict[str, float] = {}
    engines: dict[str, int] = {}
    for metric in registry.restricted_registry(NAMES).collect():
        for sample in metric.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
            engines[sample.name] = engines.get(sample.name, 0) + 1
    if CACHE_USED in values:
        values[CACHE_USED] /= engines[CACHE_USED]
    return values
