"""What is found out about recording, for programs and for people."""

from __future__ import annotations

from msgspec import Struct

from river_ops.bench.measure import Machine

GOAL_EVENTS_PER_S = 30_000.0


class BillingReport(Struct, frozen=True, kw_only=True):
    """An event is one request or operation, of `lines_per_event` lines in the tables.

    `events_per_s` is the median over rounds, from JetStream into Postgres with `settings.writers` recorders, and
    `cpu_us_per_event` the processor time of all recorders, Postgres and NATS meanwhile. `peers` are the plain ways, in
    events/s, and `speedup` is ours over the best of them. `lost`, `doubled`, `wrong_nano_usd` and `deadlocks` are of
    everything that was recorded, the part with the kills included; `killed_mid_work` says that both kills hit while
    events waited, and `crash_recovery_s` how long after the last was sent all were recorded.
    """

    name: str = "billing"
    events_per_s: float
    lines_per_s: float
    lines_per_event: float
    rounds_events_per_s: list[float]
    cpu_us_per_event: dict[str, float]
    peers: dict[str, float]
    speedup: float
    lost: int
    doubled: int
    wrong_nano_usd: int
    ledger_differences: int
    deadlocks: int
    killed_mid_work: bool
    crash_recovery_s: float
    missed: list[str]
    settings: dict[str, int | float | str]
    machine: Machine
    errors: list[str]


def missed_goals(events_per_s: float) -> list[str]:
    """The goals that were not reached."""
    if events_per_s >= GOAL_EVENTS_PER_S:
        return []
    return [f"events_per_s {events_per_s:g}, at least {GOAL_EVENTS_PER_S:g} wanted"]


def table(report: BillingReport) -> list[str]:
    """The report for people."""
    rows = {"river": report.events_per_s, **report.peers}
    lines = [f"{'':<18}{'events/s':>10}"]
    lines += [f"{name:<18}{per_s:>10,.0f}" for name, per_s in rows.items()]
    costs = ", ".join(f"{part} {cost:.1f}" for part, cost in report.cpu_us_per_event.items())
    return [
        *lines,
        "",
        f"lines/s: {report.lines_per_s:,.0f} ({report.lines_per_event:.2f} an event)",
        f"processor time, us an event: {costs}",
        f"deadlocks: {report.deadlocks}",
        (
            f"after kill -9 of a recorder and of Postgres: lost {report.lost}, doubled {report.doubled}, "
            f"balances off by {report.wrong_nano_usd} nano-dollars"
        ),
        *(f"missed: {goal}" for goal in report.missed),
    ]
