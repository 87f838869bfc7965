"""Everything a request may need, opened once for the process, and the tasks that keep it current."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from river_billing.streams import ensure_streams
from river_gateway.bus import Bus, BusError
from river_gateway.checkpoints.names import LiveVersions, Names
from river_gateway.checkpoints.signed_urls import UrlSigner
from river_gateway.checkpoints.sweeper import sweep_forever
from river_gateway.database import open_pool
from river_gateway.dialects.tinker.samplers import Samplers
from river_gateway.engines.registry import Engines, Trainers
from river_gateway.engines.upstream import Upstream
from river_gateway.feedback.learner import Learner
from river_gateway.feedback.store import CompletionStore
from river_gateway.feedback.store import sweep_forever as sweep_completions
from river_gateway.health.metrics import HealthMetrics
from river_gateway.health.shared import SharedHealth
from river_gateway.inference.futures import Futures
from river_gateway.inference.meter import Meter
from river_gateway.inference.spool import Spool
from river_gateway.limits import IMPORTS_CONCURRENT_MAX, USAGE_RETRY_S
from river_gateway.telemetry import Telemetry
from river_gateway.tenancy.auth import KeyCache
from river_gateway.tenancy.credit import Credit
from river_gateway.tenancy.exchange import Exchange
from river_gateway.tenancy.messages import ACCOUNTS_SUBJECT
from river_gateway.tenancy.quotas import Quotas
from river_gateway.training.results import Results
from river_gateway.training.runs import RunCache

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from litestar import Request

    from river_gateway.database import Pool
    from river_gateway.settings import Settings

logger = logging.getLogger("river.gateway")


@dataclass(frozen=True, slots=True)
class Services:
    """`stopping` is set when the process has been asked to end: long polls answer at once.

    `learning_wake` is set when a run is to learn: somebody looks at once.
    `imports` bounds how many uploaded adapters are worked on at once.
    """

    settings: Settings
    pool: Pool
    bus: Bus
    keys: KeyCache
    quotas: Quotas
    credit: Credit
    runs: RunCache
    samplers: Samplers
    names: Names
    completions: CompletionStore
    live: LiveVersions
    results: Results
    futures: Futures
    engines: Engines
    trainers: Trainers
    upstream: Upstream
    meter: Meter
    telemetry: Telemetry
    url_signer: UrlSigner
    health: SharedHealth
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    learning_wake: asyncio.Event = field(default_factory=asyncio.Event)
    imports: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(IMPORTS_CONCURRENT_MAX)
    )

    @property
    def registered(self) -> bool:
        """Whether it is known by now which base models there are."""
        return self.engines.loaded and self.trainers.loaded

    async def ready(self) -> str | None:
        """None when requests can be answered, else what is missing."""
        if not self.bus.connected:
            return "NATS is not reachable"
        await self.pool.fetchval("select 1")
        if not self.registered:
            return "the registry has not been read"
        if not self.engines.alive():
            return "no engine has registered"
        return None


def services_of(request: Request[Any, Any, Any]) -> Services:
    """What the app of a request was made with."""
    return cast("Services", request.app.state.services)


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncGenerator[Services]:
    """Opens everything and runs the background tasks while the block runs.

    Usage events still waiting at the end are sent if NATS takes them, and else are on disk for the next start.
    """
    spool = Spool(settings.usage_spool, size_max_bytes=settings.usage_spool_max_bytes)
    spool.open()
    bus = Bus()
    await bus.connect(settings.nats_url)
    pool = await open_pool(settings.postgres_url)
    telemetry = Telemetry()
    engines, quotas = Engines(bus), Quotas()
    upstream = Upstream(
        engines,
        telemetry,
        token=settings.engine_token,
        hedge_after_s=settings.hedge_after_ms / 1000,
    )
    health = SharedHealth(bus, quotas.replicas.gateway_id, upstream.fleet.failing)
    telemetry.registry.register(HealthMetrics(health.window))
    services = Services(
        settings=settings,
        pool=pool,
        bus=bus,
        keys=KeyCache(pool),
        quotas=quotas,
        credit=Credit(pool),
        runs=RunCache(pool),
        samplers=Samplers(pool),
        names=Names(pool, bus),
        completions=CompletionStore(pool, kept_s=settings.completions_kept_s),
        live=LiveVersions(bus),
        results=Results(bus),
        futures=Futures(bus),
        engines=engines,
        trainers=Trainers(bus),
        upstream=upstream,
        meter=Meter(bus, telemetry, spool),
        telemetry=telemetry,
        url_signer=UrlSigner(pool, settings.url_secret),
        health=health,
    )
    try:
        # Before results, so that a version is heard before the result that made it.
        await services.live.listen()
        await services.names.listen()
        await services.results.listen()
        await services.futures.listen()
        await bus.hear(ACCOUNTS_SUBJECT, services.keys.hear)
        bus.on_back.append(services.keys.distrust)
        exchange = Exchange(bus, services.quotas)
        await exchange.join()
        learner = Learner(services)
        async with _delivering(services), asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(services.results.stop_with(services.stopping), name="results"),
                tasks.create_task(services.futures.run(services.stopping), name="futures"),
                tasks.create_task(services.engines.watch(), name="engines"),
                tasks.create_task(services.trainers.watch(), name="trainers"),
                tasks.create_task(services.meter.run(), name="usage"),
                tasks.create_task(exchange.run(), name="limits"),
                tasks.create_task(health.tell(), name="health told"),
                tasks.create_task(health.watch(), name="health heard"),
                tasks.create_task(services.credit.run(), name="credit"),
                tasks.create_task(services.completions.run(), name="completions"),
                tasks.create_task(
                    sweep_completions(pool, interval_s=settings.sweep_interval_s),
                    name="completion sweeper",
                ),
                tasks.create_task(learner.run(), name="learning"),
                tasks.create_task(_make_event_stream(bus), name="event stream"),
                tasks.create_task(_sweep(services), name="sweeper"),
            ]
            try:
                yield services
            finally:
                # While usage still goes out: what is cut off here may have been produced in part.
                await services.futures.close()
                for task in background:
                    task.cancel()
        await learner.close()
    finally:
        await services.credit.close()
        await services.upstream.close()
        await pool.close()
        await bus.close()


@asynccontextmanager
async def _delivering(services: Services) -> AsyncGenerator[None]:
    """At the block's end, however it comes, what is still in memory goes where it belongs."""
    try:
        yield
    finally:
        try:
            if not await services.completions.flush():
                logger.error("some completions were not stored")
        finally:
            if not await services.meter.close():
                logger.error("%d usage events are lost", services.meter.waiting)


async def _make_event_stream(bus: Bus) -> None:
    """Makes sure that usage has somewhere to go even before the first recorder has started."""
    while True:
        try:
            await ensure_streams(bus.jetstream)
        except BusError as error:
            logger.warning("the event stream cannot be made: %s", error)
            await asyncio.sleep(USAGE_RETRY_S)
        else:
            return


async def _sweep(services: Services) -> None:
    """Without a store of its own a gateway has nothing to clear."""
    settings = services.settings
    if settings.store_url is not None:
        await sweep_forever(
            services.pool,
            settings.store_url,
            interval_s=settings.sweep_interval_s,
            grace_s=settings.sweep_grace_s,
        )
