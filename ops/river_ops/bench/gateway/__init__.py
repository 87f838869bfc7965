"""`river bench gateway`: what the gateway adds to a request, and what it costs, beside other gateways.

Five questions: how much latency at a steady rate; how many requests one core carries, beside the peers; what a streamed
event costs; whether memory grows; how much of a real engine's throughput is left. The gateway has one core, everything
else the other: load, stand-in engine, Postgres, NATS and recorder. Keys, limits, credit and metering are on; the peers
have none of these.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from river_ops.bench.gateway.measurements import (
    CONNECTIONS,
    RATE,
    SHORT_TOKENS,
    STREAMS,
    USUAL_TOKENS,
    Bench,
    Door,
    Sizes,
)
from river_ops.bench.gateway.peers import API_KEY, PEERS, peers_environment, running_peer
from river_ops.bench.gateway.platform import (
    CUSTOMER_HAS,
    Platform,
    recorded_requests,
    running_platform,
)
from river_ops.bench.gateway.processes import pin
from river_ops.bench.gateway.report import GatewayReport, missed_goals, table
from river_ops.bench.measure import machine

__all__ = ["GatewayReport", "run", "table"]

LITELLM_CONNECTIONS = 8
"""More of them only make it slower."""
FULL = Sizes(seconds=5.0, rounds=3, memory_requests=100_000, real_engine=True)
QUICK = Sizes(seconds=1.5, rounds=1, memory_requests=10_000, real_engine=False)


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
        bench = Bench(platform, sizes)
        say("memory…")
        memory_mb, growth_mb = bench.memory_growth()
        say("latency at a steady rate…")
        added = bench.added_latency(stream=False)
        added_stream = bench.added_latency(stream=True)
        say("requests on one core, and streams…")
        with running_peers(programs, platform, data, gateway_cores) as doors:
            found = bench.saturation({"river": bench.ours, **doors})
        ratio = short_ratio = None
        if sizes.real_engine:
            say("a real engine…")
            ratio = bench.throughput_ratio(set(cores), max_tokens=USUAL_TOKENS)
            short_ratio = bench.throughput_ratio(set(cores), max_tokens=SHORT_TOKENS)
        say("usage that was recorded…")
        recorded = recorded_requests(platform, bench.billable)
    river = found["river"]
    ours = river.medians()
    report = GatewayReport(
        throughput_ratio=ratio,
        throughput_ratio_short=short_ratio,
        added_p50_ms=added[0],
        added_p99_ms=added[1],
        added_stream_p50_ms=added_stream[0],
        added_stream_p99_ms=added_stream[1],
        requests_per_s=ours.requests_per_s,
        cpu_us_per_request=ours.cpu_us_per_request,
        cpu_us_per_event=ours.cpu_us_per_event,
        memory_mb=memory_mb,
        memory_growth_mb=growth_mb,
        vllm_router_ratio=river.times(found["vllm_router"]) if "vllm_router" in found else None,
        litellm_ratio=river.times(found["litellm"]) if "litellm" in found else None,
        peers={name: found[name].medians() if name in found else None for name in PEERS},
        billable=bench.billable,
        recorded=recorded,
        missed=[],
        settings={
            "rate": RATE,
            "connections": CONNECTIONS,
            "litellm_connections": LITELLM_CONNECTIONS,
            "streams": STREAMS,
            "engine_tokens": USUAL_TOKENS,
            "engine_tokens_short": SHORT_TOKENS,
            "seconds": sizes.seconds,
            "rounds": sizes.rounds,
            "memory_requests": sizes.memory_requests,
            "customer": CUSTOMER_HAS,
        },
        machine=here,
    )
    report.missed.extend(missed_goals(report))
    return report


@contextmanager
def running_peers(
    programs: Path | None, platform: Platform, data: Path, cores: set[int]
) -> Iterator[dict[str, Door]]:
    """All peers in front of the stand-in, on the gateway's core; none where they are not installed."""
    doors: dict[str, Door] = {}
    with ExitStack() as stack:
        if programs is not None:
            for name in PEERS:
                peer = stack.enter_context(running_peer(name, programs, platform.stub_url, data))
                pin(peer.process, cores)
                connections = LITELLM_CONNECTIONS if name == "litellm" else CONNECTIONS
                doors[name] = Door(peer.port, API_KEY, peer.process, connections)
        yield doors
