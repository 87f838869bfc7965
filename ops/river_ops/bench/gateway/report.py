"""What is found out about the gateway, for programs and for people."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from river_ops.bench.measure import Machine

GOALS: dict[str, tuple[Literal["at least", "at most"], float]] = {
    "throughput_ratio": ("at least", 0.97),
    "added_p50_ms": ("at most", 1.0),
    "added_p99_ms": ("at most", 3.0),
    "added_stream_p50_ms": ("at most", 1.0),
    "added_stream_p99_ms": ("at most", 3.0),
    "vllm_router_ratio": ("at least", 0.6),
    "litellm_ratio": ("at least", 40.0),
    "cpu_us_per_event": ("at most", 60.0),
    "memory_growth_mb": ("at most", 10.0),
}


class Contender(Struct, frozen=True, kw_only=True):
    """One gateway in front of the stand-in, on one core; medians over rounds."""

    requests_per_s: float
    cpu_us_per_request: float
    cpu_us_per_event: float


class GatewayReport(Struct, frozen=True, kw_only=True):
    """`peers` are null where they are not installed; the throughput ratios where no real engine was run.

    Ratios are medians over rounds of ours over another's. `memory_growth_mb` is what the gateway's memory grew by after
    the first tenth of `memory_requests`. `recorded` of the `billable` requests that the gateway answered were found in
    Postgres by the end.
    """

    name: str = "gateway"
    throughput_ratio: float | None
    throughput_ratio_short: float | None
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
    billable: int
    recorded: int
    missed: list[str]
    settings: dict[str, int | float | str]
    machine: Machine


def missed_goals(report: GatewayReport) -> list[str]:
    """The goals that were measured and not reached."""
    missed: list[str] = []
    for name, (relation, goal) in GOALS.items():
        value: float | None = getattr(report, name)
        if value is None:
            continue
        if value < goal if relation == "at least" else value > goal:
            missed.append(f"{name} {value:g}, {relation} {goal:g} wanted")
    if report.recorded != report.billable:
        missed.append(f"{report.recorded} of {report.billable} requests were recorded")
    return missed


def table(report: GatewayReport) -> list[str]:
    """The report for people."""
    ours = Contender(
        requests_per_s=report.requests_per_s,
        cpu_us_per_request=report.cpu_us_per_request,
        cpu_us_per_event=report.cpu_us_per_event,
    )
    contenders = {"river": ours, **report.peers}
    lines = [f"{'':<14}{'requests/s':>12}{'us/request':>12}{'us/event':>10}"]
    lines += [
        f"{name:<14}{found.requests_per_s:>12.0f}{found.cpu_us_per_request:>12.0f}"
        f"{found.cpu_us_per_event:>10.0f}"
        if found is not None
        else f"{name:<14}{'not installed':>24}"
        for name, found in contenders.items()
    ]
    lines.append("")
    for name, ratio in (
        ("vllm-router's", report.vllm_router_ratio),
        ("LiteLLM's", report.litellm_ratio),
    ):
        if ratio is not None:
            lines.append(f"times {name} requests/s: {ratio:.2f}")
    lines += [
        f"added to an answer: {report.added_p50_ms:.2f} ms (99 %: {report.added_p99_ms:.2f})",
        f"added to a stream: {report.added_stream_p50_ms:.2f} ms (99 %: {report.added_stream_p99_ms:.2f})",
        f"memory: {report.memory_mb:.0f} MB, grown by {report.memory_growth_mb:.1f}",
        f"usage recorded: {report.recorded} of {report.billable} requests",
    ]
    if report.throughput_ratio is not None:
        lines.append(f"of a real engine's throughput: {100 * report.throughput_ratio:.1f} %")
    if report.throughput_ratio_short is not None:
        lines.append(
            f"the same, answers of a few tokens: {100 * report.throughput_ratio_short:.1f} %"
        )
    return [*lines, *(f"missed: {goal}" for goal in report.missed)]
