"""`river bench gateway`: what the gateway adds to a request, and what it costs, beside other gateways.

Four questions, each to all contenders in turns: how much latency at a steady rate; how many requests one core carries;
what a streamed event costs; how much of a real engine's throughput is left. The gateway has one core, everything else
the other: load, stand-in engine, Postgres, NATS and recorder. Keys, limits, credit and metering are on; the peers have
none of these.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct

from river_ops.bench.gateway.answers import MODEL
from river_ops.bench.gateway.messages import LoadResult, LoadSettings
from river_ops.bench.gateway.peers import API_KEY, PEERS, Peer, peers_environment, running_peer
from river_ops.bench.gateway.platform import Platform, running_platform
from river_ops.bench.gateway.processes import pin, processor_s, resident_mb
from river_ops.bench.measure import Machine, machine, median, significant
from river_ops.bench.programs import ProgramError, run_program
from river_ops.models import TINY_MOE_NAME

LOAD_MODULE = "river_ops.bench.gateway.load"
RATE = 200.0
CONNECTIONS = 64
STREAMS = 64
ENGINE_CONNECTIONS, ENGINE_TOKENS = 16, 16
MEMORY_REQUESTS, MEMORY_WARM_REQUESTS = 100_000, 10_000
LITELLM_CONNECTIONS = 8
LOAD_TIMEOUT_S = 300.0

GOALS = {
    "throughput_ratio": ("at least", 0.97),
    "added_p50_ms": ("at most", 1.0),
    "added_p99_ms": ("at most", 3.0),
    "added_stream_p50_ms": ("at most", 1.0),
    "added_stream_p99_ms": ("at most", 3.0),
    "vllm_router_ratio": ("at least", 0.6),
    "litellm_ratio": ("at least", 40.0),
    "cpu_us_per_event": ("at most", 60.0),
}


class Sizes(Struct, frozen=True, kw_only=True):
    """How long everything takes: seconds of one measurement, and rounds of them."""

    seconds: float
    rounds: int
    memory_requests: int
    real_engine: bool


FULL = Sizes(seconds=6.0, rounds=5, memory_requests=MEMORY_REQUESTS, real_engine=True)
QUICK = Sizes(seconds=1.5, rounds=1, memory_requests=20_000, real_engine=False)


class Contender(Struct, frozen=True, kw_only=True):
    """One gateway in front of the stand-in, on one core; medians over rounds."""

    requests_per_s: float
    cpu_us_per_request: float
    cpu_us_per_event: float


class GatewayReport(Struct, frozen=True, kw_only=True):
    """`peers` are null where they are not installed; `throughput_ratio` where no real engine was run.

    `memory_growth_mb` is what the gateway's memory grew by between its first requests and the last.
    """

    name: str = "gateway"
    throughput_ratio: float | None
    added_p50_ms: float
    added_p99_ms: float
    added_stream_p50_ms: float
    added_stream_p99_ms: float
    requests_per_s: float
    cpu_us_per_request: float
    cpu_us_per_event: float
    memory_mb: float
    memory_growth_mb: float
    vllm_router_ratio: float | None
    litellm_ratio: float | None
    peers: dict[str, Contender | None]
    missed: list[str]
    settings: dict[str, int | float | str]
    machine: Machine


def run(*, quick: bool, say: Callable[[str], None]) -> GatewayReport:
    """Measures on servers of its own."""
    here = machine()
    sizes = QUICK if quick else FULL
    cores = sorted(os.sched_getaffinity(0))
    gateway_cores, other_cores = {cores[0]}, set(cores[1:]) or {cores[0]}
    programs = peers_environment(say, install=not quick)
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="river-bench-")))
        say("starting the platform…")
        platform = stack.enter_context(
            running_platform(
                data,
                real_engine=sizes.real_engine,
                gateway_cores=gateway_cores,
                other_cores=other_cores,
            )
        )
        say("latency at a steady rate…")
        added = added_latency(platform, sizes, stream=False)
        added_stream = added_latency(platform, sizes, stream=True)
        say("requests on one core…")
        saturation = Saturation(platform, sizes)
        ours = saturation.of_ours()
        peers: dict[str, Contender | None] = {}
        for name in PEERS:
            peers[name] = None
            if programs is not None:
                say(f"{name}…")
                with running_peer(name, programs, platform.stub_url, data) as peer:
                    pin(peer.process, gateway_cores)
                    peers[name] = saturation.of_peer(name, peer)
        say("memory…")
        memory_mb, growth_mb = memory_growth(platform, sizes)
        ratio = None
        if sizes.real_engine:
            say("a real engine…")
            ratio = throughput_ratio(platform, sizes, set(cores))
    router, litellm = peers["vllm_router"], peers["litellm"]
    report = GatewayReport(
        throughput_ratio=ratio,
        added_p50_ms=added[0],
        added_p99_ms=added[1],
        added_stream_p50_ms=added_stream[0],
        added_stream_p99_ms=added_stream[1],
        requests_per_s=ours.requests_per_s,
        cpu_us_per_request=ours.cpu_us_per_request,
        cpu_us_per_event=ours.cpu_us_per_event,
        memory_mb=memory_mb,
        memory_growth_mb=growth_mb,
        vllm_router_ratio=router and significant(ours.requests_per_s / router.requests_per_s, 3),
        litellm_ratio=litellm and significant(ours.requests_per_s / litellm.requests_per_s, 3),
        peers=peers,
        missed=[],
        settings={
            "rate": RATE,
            "connections": CONNECTIONS,
            "streams": STREAMS,
            "seconds": sizes.seconds,
            "rounds": sizes.rounds,
            "memory_requests": sizes.memory_requests,
        },
        machine=here,
    )
    report.missed.extend(missed_goals(report))
    return report


# ---- Measurements ----------------------------------------------------------------------------------------------------


def send(port: int, key: str, model: str, connections: int, **settings: object) -> LoadResult:
    """One load, in a process of its own.

    Raises:
        ProgramError: something was not answered as it should.
    """
    asked = LoadSettings(
        port=port,
        api_key=key,
        model=model,
        connections=connections,
        **settings,  # pyright: ignore[reportArgumentType] - the struct's own fields
    )
    result = run_program(LOAD_MODULE, asked, LoadResult, timeout_s=LOAD_TIMEOUT_S)
    if result.errors:
        raise ProgramError(f"{result.errors} of {result.requests} failed: {result.first_error}")
    return result


def added_latency(platform: Platform, sizes: Sizes, *, stream: bool) -> tuple[float, float]:
    """What the gateway adds at a steady rate, in milliseconds: at the median and at 99 %; medians over rounds."""
    p50_ms: list[float] = []
    p99_ms: list[float] = []
    for _ in range(sizes.rounds):
        straight, through = (
            send(
                port,
                platform.api_key,
                MODEL,
                CONNECTIONS,
                rate=RATE,
                seconds=sizes.seconds,
                stream=stream,
            )
            for port in (platform.stub_port, platform.gateway_port)
        )
        p50_ms.append(through.p50_ms - straight.p50_ms)
        p99_ms.append(through.p99_ms - straight.p99_ms)
    return significant(median(p50_ms), 3), significant(median(p99_ms), 3)


class Saturation:
    """Requests as fast as one core answers them."""

    def __init__(self, platform: Platform, sizes: Sizes) -> None:
        self._platform = platform
        self._sizes = sizes

    def of_ours(self) -> Contender:
        """Ours."""
        platform = self._platform
        return self._measure(
            platform.gateway_port, platform.gateway_process, platform.api_key, CONNECTIONS
        )

    def of_peer(self, name: str, peer: Peer) -> Contender:
        """Another's, with no more connections than do it good."""
        connections = LITELLM_CONNECTIONS if name == "litellm" else CONNECTIONS
        return self._measure(peer.port, peer.process, API_KEY, connections)

    def _measure(self, port: int, process: int, key: str, connections: int) -> Contender:
        seconds = self._sizes.seconds
        send(port, key, MODEL, connections, seconds=min(seconds, 1.0))
        rates: list[float] = []
        costs_us: list[float] = []
        for _ in range(self._sizes.rounds):
            before_s = processor_s(process)
            result = send(port, key, MODEL, connections, seconds=seconds)
            rates.append(result.requests_per_s)
            costs_us.append(1e6 * (processor_s(process) - before_s) / result.requests)
        return Contender(
            requests_per_s=significant(median(rates)),
            cpu_us_per_request=significant(median(costs_us), 3),
            cpu_us_per_event=self._cost_of_events(port, process, key),
        )

    def _cost_of_events(self, port: int, process: int, key: str) -> float:
        """Microseconds of processor time for an event, with many slow streams at once."""
        costs_us: list[float] = []
        for _ in range(self._sizes.rounds):
            before_s = processor_s(process)
            result = send(
                port, key, MODEL, STREAMS, seconds=self._sizes.seconds, stream=True, paced=True
            )
            costs_us.append(1e6 * (processor_s(process) - before_s) / result.events)
        return significant(median(costs_us), 3)


def memory_growth(platform: Platform, sizes: Sizes) -> tuple[float, float]:
    """The gateway's memory after many requests, and how much of it came after the first tenth of them; megabytes."""

    def request(count: int) -> float:
        send(platform.gateway_port, platform.api_key, MODEL, CONNECTIONS, requests=count)
        return resident_mb(platform.gateway_process)

    first_mb = request(sizes.memory_requests // 10)
    last_mb = request(sizes.memory_requests - sizes.memory_requests // 10)
    return significant(last_mb, 3), round(last_mb - first_mb, 1)


def throughput_ratio(platform: Platform, sizes: Sizes, cores: set[int]) -> float:
    """Requests per second through the gateway over those straight to a real engine that has all it can do."""
    pin(platform.gateway_process, cores)
    ways = {
        "straight": (platform.engine_port, platform.engine_token),
        "through": (platform.gateway_port, platform.api_key),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(sizes.rounds + 1):
        for way in ways if number % 2 else reversed(ways):
            port, key = ways[way]
            result = send(
                port,
                key,
                TINY_MOE_NAME,
                ENGINE_CONNECTIONS,
                seconds=sizes.seconds,
                max_tokens=ENGINE_TOKENS,
            )
            if number:  # The first round warms up.
                rates[way].append(result.requests_per_s)
    return significant(median(rates["through"]) / median(rates["straight"]), 3)


# ---- Results ---------------------------------------------------------------------------------------------------------


def missed_goals(report: GatewayReport) -> list[str]:
    """The goals that were measured and not reached."""
    missed: list[str] = []
    for name, (relation, goal) in GOALS.items():
        value: float | None = getattr(report, name)
        if value is None:
            continue
        if value < goal if relation == "at least" else value > goal:
            missed.append(f"{name} {value:g}, {relation} {goal:g} wanted")
    return missed


def table(report: GatewayReport) -> list[str]:
    """The report for people."""
    lines = [f"{'':<16}{'requests/s':>12}{'us/request':>12}{'ratio':>8}"]
    contenders = {"river": (report.requests_per_s, report.cpu_us_per_request)}
    for name, peer in report.peers.items():
        if peer is not None:
            contenders[name] = (peer.requests_per_s, peer.cpu_us_per_request)
    for name, (rate, cost_us) in contenders.items():
        lines.append(f"{name:<16}{rate:>12.0f}{cost_us:>12.0f}{report.requests_per_s / rate:>8.2f}")
    lines += [f"{name} is not installed" for name, peer in report.peers.items() if peer is None]
    lines += [
        f"added at {RATE:.0f} requests/s: {report.added_p50_ms:.2f} ms (99 %: {report.added_p99_ms:.2f})",
        f"  streams: {report.added_stream_p50_ms:.2f} ms (99 %: {report.added_stream_p99_ms:.2f})",
        f"memory: {report.memory_mb:.0f} MB, grown by {report.memory_growth_mb:.1f}",
    ]
    if report.throughput_ratio is not None:
        lines.append(f"of a real engine's throughput: {100 * report.throughput_ratio:.1f} %")
    return [*lines, *(f"missed: {goal}" for goal in report.missed)]
