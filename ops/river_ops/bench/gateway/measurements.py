"""The measurements that the benchmark consists of; whoever is compared takes turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from river_ops.bench.gateway.answers import MODEL
from river_ops.bench.gateway.messages import LoadResult, LoadSettings
from river_ops.bench.gateway.platform import Platform
from river_ops.bench.gateway.processes import pin, processor_s, resident_mb
from river_ops.bench.gateway.report import Contender
from river_ops.bench.measure import median, significant
from river_ops.bench.programs import ProgramError, run_program
from river_ops.models import TINY_MOE_NAME

LOAD_MODULE = "river_ops.bench.gateway.load"
LOAD_TIMEOUT_S = 300.0
RATE = 200.0
CONNECTIONS = 128
STREAMS = 64
ENGINE_CONNECTIONS = 64
USUAL_TOKENS, SHORT_TOKENS = 128, 16
"""Lengths of a real engine's answers: a chat's, and so short that the engine has little to do for each request."""
WARM_UP_S = 1.0


class Sizes(Struct, frozen=True, kw_only=True):
    """How long everything takes: seconds of one measurement, and rounds of them."""

    seconds: float
    rounds: int
    memory_requests: int
    real_engine: bool


@dataclass(frozen=True, slots=True)
class Door:
    """Something that answers completions; `process` is the one to be watched, if any."""

    port: int
    api_key: str
    process: int
    connections: int = CONNECTIONS


@dataclass(slots=True)
class Found:
    """What the rounds of one contender have shown."""

    rates: list[float] = field(default_factory=list[float])
    request_costs_us: list[float] = field(default_factory=list[float])
    event_costs_us: list[float] = field(default_factory=list[float])

    def medians(self) -> Contender:
        """The figures of the report."""
        return Contender(
            requests_per_s=significant(median(self.rates)),
            cpu_us_per_request=significant(median(self.request_costs_us), 3),
            cpu_us_per_event=significant(median(self.event_costs_us), 3),
        )

    def times(self, other: Found) -> float:
        """How many times as many requests per second as another's, round by round."""
        pairs = zip(self.rates, other.rates, strict=True)
        return significant(median([ours / theirs for ours, theirs in pairs]), 3)


class Bench:
    """Sends load and knows how much of it the gateway has to bill."""

    def __init__(self, platform: Platform, sizes: Sizes) -> None:
        self._platform = platform
        self._sizes = sizes
        self.billable = 0

    @property
    def ours(self) -> Door:
        """The gateway."""
        platform = self._platform
        return Door(platform.gateway_port, platform.api_key, platform.gateway_process)

    def send(
        self,
        door: Door,
        *,
        connections: int | None = None,
        model: str = MODEL,
        **settings: object,
    ) -> LoadResult:
        """One load, in a process of its own.

        Raises:
            ProgramError: something was not answered as it should.
        """
        asked = LoadSettings(
            port=door.port,
            api_key=door.api_key,
            model=model,
            connections=connections or door.connections,
            **settings,  # pyright: ignore[reportArgumentType] - the struct's own fields
        )
        result = run_program(LOAD_MODULE, asked, LoadResult, timeout_s=LOAD_TIMEOUT_S)
        if result.errors:
            raise ProgramError(f"{result.errors} of {result.requests} failed: {result.first_error}")
        if door.port == self._platform.gateway_port:
            self.billable += result.requests
        return result

    def added_latency(self, *, stream: bool) -> tuple[float, float]:
        """What the gateway adds at a steady rate, in milliseconds: at the median and at 99 %; medians over rounds."""
        straight = Door(self._platform.stub_port, self._platform.api_key, 0)
        p50_ms: list[float] = []
        p99_ms: list[float] = []
        for number in range(self._sizes.rounds):
            doors = (straight, self.ours)
            results = {
                door.port: self.send(door, rate=RATE, seconds=self._sizes.seconds, stream=stream)
                for door in (doors if number % 2 == 0 else reversed(doors))
            }
            without, through = results[straight.port], results[self.ours.port]
            p50_ms.append(through.p50_ms - without.p50_ms)
            p99_ms.append(through.p99_ms - without.p99_ms)
        return significant(median(p50_ms), 3), significant(median(p99_ms), 3)

    def saturation(self, doors: Mapping[str, Door]) -> dict[str, Found]:
        """As many requests as one core answers, and many slow streams at once."""
        found = {name: Found() for name in doors}
        for door in doors.values():
            self.send(door, seconds=min(self._sizes.seconds, WARM_UP_S))
        for number in range(self._sizes.rounds):
            names = list(doors)
            for name in names if number % 2 == 0 else reversed(names):
                self._saturate(doors[name], found[name])
        return found

    def _saturate(self, door: Door, found: Found) -> None:
        seconds = self._sizes.seconds
        before_s = processor_s(door.process)
        result = self.send(door, seconds=seconds)
        after_s = processor_s(door.process)
        found.rates.append(result.requests_per_s)
        found.request_costs_us.append(1e6 * (after_s - before_s) / result.requests)
        result = self.send(door, connections=STREAMS, seconds=seconds, stream=True, paced=True)
        spent_s = processor_s(door.process) - after_s
        found.event_costs_us.append(1e6 * spent_s / result.events)

    def memory_growth(self) -> tuple[float, float]:
        """The gateway's memory after many requests, and how much of it came after the first tenth; megabytes."""
        first = self._sizes.memory_requests // 10
        self.send(self.ours, requests=first)
        first_mb = resident_mb(self.ours.process)
        self.send(self.ours, requests=self._sizes.memory_requests - first)
        last_mb = resident_mb(self.ours.process)
        return significant(last_mb, 4), round(last_mb - first_mb, 1)

    def throughput_ratio(self, cores: set[int], *, max_tokens: int) -> float:
        """Requests per second through the gateway over those straight to a real engine that has all it can do."""
        platform = self._platform
        pin(platform.gateway_process, cores)
        straight = Door(platform.engine_port, platform.engine_token, 0)
        ratios: list[float] = []
        for number in range(self._sizes.rounds + 1):
            doors = (straight, self.ours)
            rates = {
                door.port: self.send(
                    door,
                    model=TINY_MOE_NAME,
                    connections=ENGINE_CONNECTIONS,
                    seconds=self._sizes.seconds,
                    max_tokens=max_tokens,
                    whole_length=True,
                ).requests_per_s
                for door in (doors if number % 2 == 0 else reversed(doors))
            }
            if number:  # The first round warms up.
                ratios.append(rates[self.ours.port] / rates[straight.port])
        return significant(median(ratios), 3)
