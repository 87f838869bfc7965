"""`river bench routing`: the gateway's own choice of engines against others', in a simulation of many engines.

The code that chooses is the gateway's, the time it takes at an engine is what was measured of vLLM (`engine.py`). All
ways get the same requests, know the same reports of engines, and see the same engines die and join. What is simulated
is the same on every machine; only `choose_us` is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import Struct, structs

from river_ops.bench.measure import Machine, machine, median, percentile, significant
from river_ops.bench.routing import engine, traffic
from river_ops.bench.routing.choosers import CHOOSERS, ByFleet, Directory
from river_ops.bench.routing.simulation import DEATHS, ENGINES, GATEWAYS, Outcome, Simulation
from river_ops.bench.routing.traffic import draw_requests

REQUESTS, REQUESTS_QUICK = 40_000, 5_000
REQUESTS_PER_S = (48.0, 96.0)
"""Moderate, and near the most that engines with so few adapter slots can do."""
SEED = 5
CHOICES_TIMED = 2000
CHOICE_ROUNDS = 5
CHOICE_ENGINES = (8, ENGINES)


class ChooserRow(Struct, frozen=True, kw_only=True):
    """What one way of choosing made of one load.

    Times are seconds from the client's sending, to the last token or to the first. `cold_loads_per_request` is of the
    requests for adapters, `prefix_hits` the share of the system prompts' tokens that were in a prefix cache. `cut`
    answers had begun when their engine died; `lost` requests found no engine.
    """

    cold_loads: int
    cold_loads_per_request: float
    prefix_hits: float
    p50_s: float
    p99_s: float
    first_token_p50_s: float
    first_token_p99_s: float
    cut: int
    lost: int


class LoadReport(Struct, frozen=True, kw_only=True):
    """All ways of choosing under one load."""

    requests_per_s: float
    ways: dict[str, ChooserRow]


class RoutingReport(Struct, frozen=True, kw_only=True):
    """The ratios are ours over theirs at the highest load: below one is better. `choose_us` is by number of engines."""

    name: str = "routing"
    cold_loads_ratio: dict[str, float]
    p99_ratio: dict[str, float]
    first_token_p99_ratio: dict[str, float]
    loads: list[LoadReport]
    choose_us: dict[str, float]
    settings: dict[str, int | float]
    machine: Machine
    errors: list[str]


def run(*, quick: bool, say: Callable[[str], None]) -> RoutingReport:
    """Every way of choosing under every load."""
    here = machine()
    count = REQUESTS_QUICK if quick else REQUESTS
    loads = [_load_report(per_s, count, say) for per_s in REQUESTS_PER_S]
    highest = loads[-1].ways
    return RoutingReport(
        cold_loads_ratio=_ratios(highest, "cold_loads"),
        p99_ratio=_ratios(highest, "p99_s"),
        first_token_p99_ratio=_ratios(highest, "first_token_p99_s"),
        loads=loads,
        choose_us={str(engines): _choose_us(engines) for engines in CHOICE_ENGINES},
        settings={
            "engines": ENGINES,
            "gateways": GATEWAYS,
            "adapters": traffic.ADAPTERS,
            "adapter_exponent": traffic.ADAPTER_EXPONENT,
            "base_share": traffic.BASE_SHARE,
            "max_loras": engine.MAX_LORAS,
            "max_cpu_loras": engine.MAX_CPU_LORAS,
            "load_s": engine.LOAD_S,
            "deaths": DEATHS,
            "requests": count,
            "seed": SEED,
        },
        machine=here,
        errors=[
            f"{name} lost {row.lost} requests at {load.requests_per_s:g}/s"
            for load in loads
            for name, row in load.ways.items()
            if row.lost
        ],
    )


def _load_report(per_s: float, count: int, say: Callable[[str], None]) -> LoadReport:
    requests = draw_requests(count, per_s=per_s, seed=SEED)
    ways: dict[str, ChooserRow] = {}
    for name, make_chooser in CHOOSERS.items():
        say(f"{count:,} requests at {per_s:g}/s, {name}…")
        ways[name] = _row(Simulation(requests, make_chooser).run())
    return LoadReport(requests_per_s=per_s, ways=ways)


def _row(outcome: Outcome) -> ChooserRow:
    counts = outcome.counts
    return ChooserRow(
        cold_loads=counts.cold_loads,
        cold_loads_per_request=significant(counts.cold_loads / counts.adapter_requests, 3),
        prefix_hits=significant(counts.system_tokens_cached / counts.system_tokens, 3),
        p50_s=significant(percentile(outcome.latencies_s, 50)),
        p99_s=significant(percentile(outcome.latencies_s, 99)),
        first_token_p50_s=significant(percentile(outcome.first_token_latencies_s, 50)),
        first_token_p99_s=significant(percentile(outcome.first_token_latencies_s, 99)),
        cut=outcome.cut,
        lost=outcome.lost,
    )


def _ratios(ways: dict[str, ChooserRow], field: str) -> dict[str, float]:
    """Ours over each of the others'."""
    values = {name: structs.asdict(row)[field] for name, row in ways.items()}
    ours = values.pop("river")
    return {name: significant(ours / value, 3) for name, value in values.items()}


def _choose_us(engines: int) -> float:
    """What one decision costs, in microseconds of this machine's processor."""
    directory = Directory()
    chooser = ByFleet(directory, with_reasons=True)
    for index in range(engines):
        simulated = engine.SimulatedEngine(f"eng_{index}", engine.Counts())
        directory.records[simulated.engine_id] = simulated.record()
    requests = draw_requests(CHOICES_TIMED, per_s=1.0, seed=SEED)
    found: list[float] = []
    for _ in range(CHOICE_ROUNDS):
        began_s = time.thread_time()
        for request in requests:
            chooser.choose(request, ())
        found.append((time.thread_time() - began_s) / CHOICES_TIMED)
    return significant(1e6 * median(found), 3)


def table(report: RoutingReport) -> list[str]:
    """The report for people."""
    heading = "| way | cold loads | per request | prefix hits | p50 s | p99 s | first token p50 s | p99 s |"
    lines: list[str] = []
    for load in report.loads:
        lines += [f"{load.requests_per_s:g} requests/s:", "", heading, "|---|" + "--:|" * 7]
        lines += [
            f"| {name} | {row.cold_loads:,} | {row.cold_loads_per_request:.2f} | {row.prefix_hits:.2f} "
            f"| {row.p50_s:.2f} | {row.p99_s:.2f} | {row.first_token_p50_s:.3f} | {row.first_token_p99_s:.2f} |"
            for name, row in load.ways.items()
        ]
        lines.append("")
    costs = ", ".join(f"{cost:.0f} µs of {count}" for count, cost in report.choose_us.items())
    return [*lines, f"A choice takes {costs} engines."]
