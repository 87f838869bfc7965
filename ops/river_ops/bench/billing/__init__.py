"""`river bench billing`: from JetStream into Postgres, how fast, and what is left after kills.

Everything is real and durable: nats-server that syncs each message, Postgres with fsync on, the recorder's own
processes. Events of many tenants, keys, models and price tiers wait in the stream in groups, as busy gateways send
them; recorders move them into events, hourly and monthly sums and the ledger, one transaction a batch. The peers are
the plain ways of doing it, between the same servers. Then events go on arriving while a recorder and Postgres are
killed with signal 9 and started again, and at the end everything is counted against sums made apart from it all.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

from river_ops.bench.billing.books import Books, compare
from river_ops.bench.billing.messages import (
    PEER,
    PROGRAM_TIMEOUT_S,
    PUBLISHER,
    WAYS,
    PeerDone,
    PeerSettings,
    Published,
    PublisherSettings,
    Way,
)
from river_ops.bench.billing.report import BillingReport, missed_goals, table
from river_ops.bench.billing.servers import Servers, running_servers
from river_ops.bench.billing.traffic import (
    EVENTS_PER_S,
    KEYS_PER_TENANT,
    TENANTS,
    Expected,
    draw_events,
    expected,
)
from river_ops.bench.measure import machine, median, significant
from river_ops.bench.programs import finish_program, run_program, start_program

__all__ = ["BillingReport", "run", "table"]

WRITERS = 4
GROUP = 20
"""Events a message: what a gateway sends at once under a load at which this rate would be reached."""
SEED = 7


class Sizes(Struct, frozen=True, kw_only=True):
    """How many events, and how often."""

    rounds: int
    events: int
    peer_events: dict[str, int]
    crash_events: int
    crash_events_per_s: float


FULL = Sizes(
    rounds=3,
    events=300_000,
    peer_events={"insert_per_event": 10_000, "executemany": 60_000},
    crash_events=200_000,
    crash_events_per_s=15_000.0,
)
QUICK = Sizes(
    rounds=1,
    events=100_000,
    peer_events={"insert_per_event": 3_000, "executemany": 15_000},
    crash_events=50_000,
    crash_events_per_s=10_000.0,
)


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement of the recorders; processor time by part, in microseconds."""

    events_per_s: float
    cpu_us_per_event: dict[str, float]
    books: Books
    lines_per_event: float


@dataclass(frozen=True, slots=True)
class Crash:
    """What the kills left."""

    books: Books
    killed_mid_work: bool
    recovery_s: float


def run(*, quick: bool, say: Callable[[str], None]) -> BillingReport:
    """Measures on servers of its own."""
    here = machine()
    sizes = QUICK if quick else FULL
    rounds: list[Round] = []
    peers: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="river-bench-") as data,
        running_servers(Path(data)) as servers,
    ):
        for number in range(sizes.rounds):
            say(f"{sizes.events:,} events, {WRITERS} recorders…")
            rounds.append(_record(servers, f"round_{number}", sizes.events))
            if number == 0:
                for way in WAYS:
                    say(f"the plain way: {way}…")
                    peers[way] = _plain_way(servers, way, sizes.peer_events[way])
        say("killing a recorder and Postgres…")
        crash = _crash(servers, sizes)
    events_per_s = median([one.events_per_s for one in rounds])
    all_books = [*(one.books for one in rounds), crash.books]
    report = BillingReport(
        events_per_s=significant(events_per_s),
        lines_per_s=significant(events_per_s * rounds[0].lines_per_event),
        lines_per_event=significant(rounds[0].lines_per_event),
        rounds_events_per_s=[significant(one.events_per_s) for one in rounds],
        cpu_us_per_event={
            part: significant(median([one.cpu_us_per_event[part] for one in rounds]), 3)
            for part in rounds[0].cpu_us_per_event
        },
        peers={way: significant(per_s) for way, per_s in peers.items()},
        speedup=significant(events_per_s / max(peers.values()), 3),
        lost=sum(books.lost for books in all_books),
        doubled=sum(books.doubled for books in all_books),
        wrong_nano_usd=sum(books.wrong_nano_usd for books in all_books),
        ledger_differences=sum(books.ledger_differences for books in all_books),
        deadlocks=sum(books.deadlocks for books in all_books),
        killed_mid_work=crash.killed_mid_work,
        crash_recovery_s=significant(crash.recovery_s, 3),
        missed=missed_goals(events_per_s),
        settings={
            "writers": WRITERS,
            "events_per_message": GROUP,
            "events": sizes.events,
            "rounds": sizes.rounds,
            "crash_events": sizes.crash_events,
            "tenants": TENANTS,
            "keys_per_tenant": KEYS_PER_TENANT,
            "events_per_s_of_their_clock": EVENTS_PER_S,
            "postgres": "fsync on, synchronous_commit on",
            "nats": "sync_interval always",
            "seed": SEED,
        },
        machine=here,
        errors=[],
    )
    report.errors.extend(_errors(report))
    return report


def _record(servers: Servers, database: str, events: int) -> Round:
    """A full stream, then recorders: how fast it empties, and whether all of it arrived."""
    servers.new_database(database)
    published, wanted = _publish(servers, events)
    servers.start_recorders(WRITERS)
    drained = asyncio.run(servers.drain(published.messages))
    asyncio.run(servers.empty())
    events_drained = drained.messages * GROUP
    servers.stop_recorders()
    return Round(
        events_per_s=events_drained / drained.seconds,
        cpu_us_per_event={
            part: 1e6 * used_s / events_drained for part, used_s in drained.cpu_s.items()
        },
        books=asyncio.run(compare(servers.postgres_url, wanted)),
        lines_per_event=wanted.lines / wanted.events,
    )


def _plain_way(servers: Servers, way: Way, events: int) -> float:
    """Events a second of as many processes that work the plain way."""
    servers.new_database(way)
    asyncio.run(servers.add_partitions(time.time()))
    published, _ = _publish(servers, events)
    settings = PeerSettings(way=way, nats_url=servers.nats.url(), postgres_url=servers.postgres_url)
    programs = [start_program(PEER, settings) for _ in range(WRITERS)]
    drained = asyncio.run(servers.drain(published.messages))
    for program in programs:
        finish_program(program, PeerDone, timeout_s=PROGRAM_TIMEOUT_S)
    return drained.messages * GROUP / drained.seconds


def _crash(servers: Servers, sizes: Sizes) -> Crash:
    """Kills in the middle of a steady stream of events, restarts, and counts."""
    servers.new_database("crash")
    servers.start_recorders(WRITERS)
    settings = _publisher_settings(servers, sizes.crash_events, sizes.crash_events_per_s)
    wanted = _expected(settings)
    publishing = start_program(PUBLISHER, settings)
    waiting: list[int] = []
    for share, kill in ((0.25, servers.kill_recorder), (0.5, servers.kill_postgres)):
        asyncio.run(servers.published(int(share * sizes.crash_events / GROUP)))
        kill()
        waiting.append(asyncio.run(servers.waiting()))
    finish_program(publishing, Published, timeout_s=PROGRAM_TIMEOUT_S)
    published_s = time.perf_counter()
    asyncio.run(servers.empty())
    recovery_s = time.perf_counter() - published_s
    servers.stop_recorders()
    return Crash(
        books=asyncio.run(compare(servers.postgres_url, wanted)),
        killed_mid_work=all(waiting),
        recovery_s=recovery_s,
    )


def _publish(servers: Servers, events: int) -> tuple[Published, Expected]:
    """Fills the stream."""
    settings = _publisher_settings(servers, events)
    published = run_program(PUBLISHER, settings, Published, timeout_s=PROGRAM_TIMEOUT_S)
    return published, _expected(settings)


def _publisher_settings(
    servers: Servers, events: int, events_per_s: float | None = None
) -> PublisherSettings:
    return PublisherSettings(
        nats_url=servers.nats.url(),
        events=events,
        seed=SEED,
        began_at=time.time() - events / EVENTS_PER_S,
        group=GROUP,
        events_per_s=events_per_s,
    )


def _expected(settings: PublisherSettings) -> Expected:
    return expected(draw_events(settings.events, seed=settings.seed, began_at=settings.began_at))


def _errors(report: BillingReport) -> list[str]:
    """What must never be."""
    found = {
        "events lost": report.lost,
        "events doubled": report.doubled,
        "nano-dollars wrong": report.wrong_nano_usd,
        "differences in the ledger": report.ledger_differences,
        "deadlocks": report.deadlocks,
    }
    errors = [f"{count} {what}" for what, count in found.items() if count]
    if not report.killed_mid_work:
        errors.append("the kills hit when no event waited, and so showed nothing")
    return errors
