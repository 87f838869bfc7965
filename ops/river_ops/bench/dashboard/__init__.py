"""`river bench dashboard`: how long every page takes on a platform that has been in use, and pictures of them all.

The data are made in Postgres, the gateway is the real one. Each page is asked for several times, in turns, over one
connection; its time is from sending the request to the last byte. There is no peer: nobody else serves these pages.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
from msgspec import Struct

from river_ops.bench.dashboard.data import (
    LONG_RUN,
    SHOWN_CHECKPOINT,
    SHOWN_KEY,
    Amounts,
    fill,
)
from river_ops.bench.dashboard.fleet import ENGINE, TRAINER, register
from river_ops.bench.dashboard.pictures import take_pictures
from river_ops.bench.gateway.platform import running_platform
from river_ops.bench.measure import Machine, machine, median, significant
from river_ops.bench.programs import ProgramError

FULL = Amounts(
    tenants=20,
    runs=1_000,
    steps=200,
    steps_long=20_000,
    checkpoints_per_run=10,
    usage_events=5_000_000,
    audit_lines=100_000,
)
QUICK = Amounts(
    tenants=5,
    runs=100,
    steps=50,
    steps_long=2_000,
    checkpoints_per_run=10,
    usage_events=100_000,
    audit_lines=2_000,
)
ROUNDS, ROUNDS_QUICK = 15, 5
GOAL_MS = 300.0
PAGES: Mapping[str, str] = {
    "overview": "/admin",
    "runs": "/admin/runs",
    "runs-found": "/admin/runs?search=task-3&status=ended",
    "run": f"/admin/runs/{LONG_RUN}",
    "samples": f"/admin/runs/{LONG_RUN}/samples?reward_min=0.5",
    "checkpoints": "/admin/checkpoints",
    "checkpoint": f"/admin/checkpoint?path=river://{LONG_RUN}/weights/{SHOWN_CHECKPOINT}",
    "chat": "/admin/chat?left=river/model-0&right=river/model-1",
    "learning": "/admin/learning",
    "usage": "/admin/usage?days=90&by=key",
    "invoice": "/admin/invoices/1",
    "engines": "/admin/machines",
    "engine": f"/admin/machines/engines/{ENGINE}",
    "trainer": f"/admin/machines/trainers/{TRAINER}",
    "health": "/admin/health",
    "keys": "/admin/keys",
    "key": f"/admin/keys/{SHOWN_KEY}",
    "tenant": "/admin/tenants/tenant-01",
    "prices": "/admin/prices",
    "prices-of-one": "/admin/prices?model=river/model-1",
    "audit": "/admin/audit",
    "audit-found": "/admin/audit?action=keys",
}
PARTS: Mapping[str, str] = {
    "run series": f"/admin/runs/{LONG_RUN}/series",
    "usage csv": "/admin/usage.csv",
}


class DashboardReport(Struct, frozen=True, kw_only=True):
    """Medians and the slowest of each page, milliseconds; `missed` names what took longer than the goal."""

    name: str = "dashboard"
    median_ms: dict[str, float]
    slowest_ms: dict[str, float]
    goal_ms: float
    missed: list[str]
    pictures: int
    amounts: Amounts
    rounds: int
    machine: Machine


def run(
    *, quick: bool, say: Callable[[str], None], screenshots: Path | None = None
) -> DashboardReport:
    """Measures on servers of its own; `screenshots` is a folder for pictures."""
    here = machine()
    amounts, rounds = (QUICK, ROUNDS_QUICK) if quick else (FULL, ROUNDS)
    cores = os.sched_getaffinity(0)
    with (
        tempfile.TemporaryDirectory(prefix="river-bench-") as name,
        running_platform(
            Path(name), real_engine=False, gateway_cores=cores, other_cores=cores
        ) as platform,
    ):
        say("making a month of data…")
        store_url = (Path(name) / "shown").as_uri()
        admin_key, _ = asyncio.run(fill(platform.postgres_url, store_url, amounts))
        asyncio.run(register(platform.nats_url))
        base_url = f"http://127.0.0.1:{platform.gateway_port}"
        say("asking for every page…")
        times = page_times_ms(base_url, admin_key, {**PAGES, **PARTS}, rounds)
        pictures = 0
        if screenshots is not None:
            say("taking pictures…")
            pictures = take_pictures(base_url, admin_key, PAGES, screenshots)
    medians = {page: significant(median(found)) for page, found in times.items()}
    return DashboardReport(
        median_ms=medians,
        slowest_ms={page: significant(max(found)) for page, found in times.items()},
        goal_ms=GOAL_MS,
        missed=[
            f"{page}: {value:g} ms, at most {GOAL_MS:g} wanted"
            for page, value in medians.items()
            if value > GOAL_MS and page in PAGES
        ],
        pictures=pictures,
        amounts=amounts,
        rounds=rounds,
        machine=here,
    )


def page_times_ms(
    base_url: str, key: str, pages: Mapping[str, str], rounds: int
) -> dict[str, list[float]]:
    """Each page's times, the pages in turns; a first round warms up.

    Raises:
        ProgramError: a page was not shown.
    """
    times: dict[str, list[float]] = {page: [] for page in pages}
    with httpx.Client(base_url=base_url, timeout=60.0) as client:
        client.post("/admin/sign-in", data={"key": key})
        for number in range(rounds + 1):
            for page, path in pages.items():
                begun = time.perf_counter()
                answer = client.get(path)
                took_ms = 1e3 * (time.perf_counter() - begun)
                if answer.status_code != httpx.codes.OK:
                    raise ProgramError(f"{path}: {answer.status_code}")
                if number:
                    times[page].append(took_ms)
    return times


def table(report: DashboardReport) -> list[str]:
    """The report for people."""
    lines = [f"{'page':<14}{'median ms':>12}{'slowest ms':>12}"]
    lines += [
        f"{page:<14}{value:>12.1f}{report.slowest_ms[page]:>12.1f}"
        for page, value in report.median_ms.items()
    ]
    if report.pictures:
        lines.append(f"{report.pictures} pictures")
    return [*lines, *(f"missed: {goal}" for goal in report.missed)]
