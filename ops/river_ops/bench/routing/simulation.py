"""The simulation: several gateways, many engines of which some die and join, and one way of choosing between them."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from river_engine.protocol import HEARTBEAT_INTERVAL_S
from river_gateway.limits import UPSTREAM_ATTEMPTS
from river_ops.bench.routing.choosers import Chooser, Directory, MakeChooser
from river_ops.bench.routing.engine import Counts, Job, SimulatedEngine
from river_ops.bench.routing.traffic import Request

ENGINES = 64
GATEWAYS = 4
"""Each knows what it has sent itself, and of the others' requests what engines report."""
DEATHS = 2
"""At different times an engine is killed, and a new one joins later."""
WARM_SHARE = 0.25
"""Of the time, at the beginning: what happens then fills caches and is not counted."""


@dataclass(slots=True)
class Outcome:
    """Of the requests that came after the beginning. `lost` could not be answered, `cut` were under way at a death."""

    counts: Counts
    latencies_s: list[float] = field(default_factory=list[float])
    first_token_latencies_s: list[float] = field(default_factory=list[float])
    cut: int = 0
    lost: int = 0


Event = tuple[float, int, Callable[[], None]]


class Simulation:
    """One run; `outcome` is filled by `run`."""

    def __init__(self, requests: Sequence[Request], make_chooser: MakeChooser) -> None:
        self._requests = requests
        self._counts = Counts()
        self.outcome = Outcome(self._counts)
        self._directory = Directory()
        self._choosers: list[Chooser] = [
            make_chooser(self._directory, gateway) for gateway in range(GATEWAYS)
        ]
        self._engines: dict[str, SimulatedEngine] = {}
        self._under_way: set[Job] = set()
        self._events: list[Event] = []
        self._order = itertools.count()
        self._names = itertools.count()
        self._ends_s = requests[-1].arrives_s
        self.counted_from_s = WARM_SHARE * self._ends_s

    def run(self) -> Outcome:
        """Until every request is over."""
        for index in range(ENGINES):
            # Heartbeats of different engines come at different times.
            self._join(HEARTBEAT_INTERVAL_S * index / ENGINES)
        self._plan_deaths()
        self._at(self.counted_from_s, self._begin_to_count)
        for index, request in enumerate(self._requests):
            job = Job(request, index % GATEWAYS)
            self._at(request.arrives_s, partial(self._send, job))
        while self._events and (self._under_way or self._now_s <= self._ends_s):
            now_s, _, happen = heapq.heappop(self._events)
            self._directory.now_s = now_s
            happen()
        return self.outcome

    @property
    def _now_s(self) -> float:
        return self._directory.now_s

    def _at(self, time_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happen))

    def _begin_to_count(self) -> None:
        self._counts = self.outcome.counts = Counts()
        for engine in self._engines.values():
            engine.counts = self._counts

    # ---- Engines -----------------------------------------------------------------------------------------------------

    def _plan_deaths(self) -> None:
        counted_s = self._ends_s - self.counted_from_s
        for number in range(1, DEATHS + 1):
            dies_s = self.counted_from_s + counted_s * number / (DEATHS + 1)
            self._at(dies_s, self._kill_one)
            self._at(dies_s + counted_s / (2 * (DEATHS + 1)), partial(self._join, 0.0))

    def _join(self, heartbeat_delay_s: float) -> None:
        engine = SimulatedEngine(f"eng_{next(self._names)}", self._counts)
        self._engines[engine.engine_id] = engine
        self._update(engine)
        self._directory.records[engine.engine_id] = engine.record()
        self._at(self._now_s + heartbeat_delay_s, partial(self._beat, engine))

    def _beat(self, engine: SimulatedEngine) -> None:
        if engine.alive:
            self._update(engine)
            self._directory.records[engine.engine_id] = engine.record()
            self._at(self._now_s + HEARTBEAT_INTERVAL_S, partial(self._beat, engine))

    def _kill_one(self) -> None:
        """The oldest dies; what it had not begun to answer goes elsewhere, as at any connection that breaks."""
        engine = next(engine for engine in self._engines.values() if engine.alive)
        self._update(engine)
        for job in engine.die():
            self._forget(job)
            self._choosers[job.gateway].failed(job.request, engine.engine_id)
            if job.first_token_s < math.inf:
                self.outcome.cut += self._is_counted(job)
            else:
                self._send(job)

    def _wake(self, engine: SimulatedEngine, number: int) -> None:
        if engine.alive and engine.wake_number == number:
            self._update(engine)

    def _update(self, engine: SimulatedEngine) -> None:
        """Brings an engine to the present and plans when to look at it again."""
        for job in engine.advance(self._now_s):
            self._forget(job)
            self._count(job)
        engine.wake_number += 1
        wakes_s = engine.next_wake_s()
        if wakes_s < math.inf:
            self._at(wakes_s, partial(self._wake, engine, engine.wake_number))

    # ---- Requests ----------------------------------------------------------------------------------------------------

    def _send(self, job: Job) -> None:
        """Asks engines until one takes the request."""
        chooser = self._choosers[job.gateway]
        while len(job.tries) < UPSTREAM_ATTEMPTS:
            engine_id = chooser.choose(job.request, job.tries)
            if engine_id is None:
                break
            job.tries.add(engine_id)
            engine = self._engines[engine_id]
            if not engine.alive:
                chooser.failed(job.request, engine_id)
                continue
            self._under_way.add(job)
            chooser.sent(job.request, engine_id)
            self._update(engine)
            engine.add(job)
            self._update(engine)
            return
        self.outcome.lost += self._is_counted(job)

    def _forget(self, job: Job) -> None:
        self._under_way.remove(job)
        self._choosers[job.gateway].over(job.request)

    def _count(self, job: Job) -> None:
        if self._is_counted(job):
            arrived_s = job.request.arrives_s
            self.outcome.latencies_s.append(self._now_s - arrived_s)
            self.outcome.first_token_latencies_s.append(job.first_token_s - arrived_s)

    def _is_counted(self, job: Job) -> bool:
        return job.request.arrives_s >= self.counted_from_s
