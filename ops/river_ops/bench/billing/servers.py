"""A real Postgres and a real nats-server, both with fsync on, and recorders between them."""

# nats-py leaves the keyword arguments of its methods untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import nats
from nats.js.api import StreamState

from river_billing.database import Connection
from river_billing.events import EVENTS_STREAM
from river_billing.partitions import ensure_partitions, months_ahead
from river_billing.prices import seed_prices
from river_ops.bench.billing.traffic import tenant_ids
from river_ops.bench.gateway.processes import processor_s
from river_ops.bench.programs import ProgramError
from river_ops.children import Child, ChildError, part_argv
from river_ops.embedded.nats import EmbeddedNats
from river_ops.embedded.postgres import EmbeddedPostgres
from river_ops.migrate import migrate

POLL_S = 0.1
DRAIN_TIMEOUT_S = 300.0
RESTARTS = 20
WARM_SHARE, TAIL_SHARE = 0.1, 0.05
"""Of the stream, at both ends, that is not timed: writers start, and at last some have nothing left."""
FORTUNE_NANO_USD = 10**15

_TENANTS = """
insert into tenant (tenant_id, name, billing)
select tenant_id, tenant_id, case when number % 2 = 0 then 'prepaid' else 'postpaid' end
from unnest($1::text[]) with ordinality as t (tenant_id, number)
"""
_CREDIT = """
with begun as (
  insert into ledger_transaction (tenant_id, kind, reference)
  select tenant_id, 'top_up', 'bench' from tenant where billing = 'prepaid'
  returning transaction_id, tenant_id
)
insert into ledger_entry (transaction_id, tenant_id, account, amount_nano_usd)
select transaction_id, tenant_id, account, amount
from begun cross join (values ('payments', -$1::bigint), ('credit', $1)) as e (account, amount)
"""


@dataclass(frozen=True, slots=True)
class Drained:
    """What left the stream in how long, and the processor time that took, by part."""

    seconds: float
    messages: int
    cpu_s: dict[str, float]


@dataclass(slots=True)
class Servers:
    """What runs. `database` is the one that is written to now; each measurement has a fresh one."""

    data: Path
    postgres: EmbeddedPostgres
    nats: EmbeddedNats
    database: str = "postgres"
    recorders: list[Child] = field(default_factory=list[Child])

    @property
    def postgres_url(self) -> str:
        """Of the database in use."""
        return self.postgres.url(self.database)

    def new_database(self, name: str) -> None:
        """A fresh database with tenants, credit and prices, in use from now on."""
        asyncio.run(_make_database(self.postgres, name))
        self.database = name

    def start_recorders(self, count: int) -> None:
        """Starts the recorder's own processes, as `river serve recorder` does."""
        for number in range(count):
            environment = {
                "RIVER_POSTGRES_URL": self.postgres_url,
                "RIVER_NATS_URL": self.nats.url(),
                "RIVER_PORT": "0",
                "RIVER_LOG_LEVEL": "warning",
            }
            log = self.data / "logs" / f"recorder-{number}.log"
            child = Child(f"recorder {number}", part_argv("recorder"), log, environment)
            child.start()
            self.recorders.append(child)

    def stop_recorders(self) -> None:
        """Asks them to end and waits."""
        for child in self.recorders:
            child.ask_to_stop()
        for child in self.recorders:
            child.stop()
        self.recorders.clear()

    def kill_recorder(self) -> None:
        """Kills one with signal 9, in the middle of whatever it does, and starts it again."""
        child = self.recorders[0]
        assert child.process is not None
        child.process.kill()
        child.process.wait()
        child.start()

    def kill_postgres(self) -> None:
        """Kills the server with signal 9 and starts it again, which recovers from its log."""
        process = self.postgres.child.process
        assert process is not None
        process.kill()
        process.wait()
        for attempt in range(RESTARTS):
            try:
                self.postgres.start()
            except ChildError:
                # Its orphaned processes still hold its memory for a moment.
                if attempt == RESTARTS - 1:
                    raise
                time.sleep(POLL_S)
            else:
                return

    def processor_s(self) -> dict[str, float]:
        """Seconds of processor time so far, by part."""
        assert self.postgres.child.process is not None
        assert self.nats.child.process is not None
        recorders = [child.process.pid for child in self.recorders if child.process is not None]
        return {
            "recorders": sum(processor_s(process) for process in recorders),
            "postgres": sum(
                processor_s(one) for one in children_of(self.postgres.child.process.pid)
            ),
            "nats": processor_s(self.nats.child.process.pid),
        }

    async def add_partitions(self, now: float) -> None:
        """What recorders do for themselves when they start."""
        connection = await asyncpg.connect(self.postgres_url)
        try:
            await ensure_partitions(connection, months_ahead(datetime.fromtimestamp(now, UTC)))
        finally:
            await connection.close()

    async def drain(self, messages: int) -> Drained:
        """Times how the stream, which holds so many, empties, but for its first and last part.

        Messages leave the stream when they are acknowledged, which is after the commit.

        Raises:
            ProgramError: it does not get there.
        """
        first, last = int(messages * (1 - WARM_SHARE)), int(messages * TAIL_SHARE)
        async with self._stream() as state:
            began = await _reach(state, lambda now: now.messages <= first)
            began_s, cpu_before_s = time.perf_counter(), self.processor_s()
            ended = await _reach(state, lambda now: now.messages <= last)
            seconds, cpu_s = time.perf_counter() - began_s, self.processor_s()
        return Drained(
            seconds=seconds,
            messages=began.messages - ended.messages,
            cpu_s={part: cpu_s[part] - before for part, before in cpu_before_s.items()},
        )

    async def empty(self) -> None:
        """Waits until everything that was published is recorded."""
        async with self._stream() as state:
            await _reach(state, lambda now: now.messages == 0)

    async def published(self, messages: int) -> None:
        """Waits until so many messages more have been published."""
        async with self._stream() as state:
            goal = (await state()).last_seq + messages
            await _reach(state, lambda now: now.last_seq >= goal)

    async def waiting(self) -> int:
        """Messages that are not recorded."""
        async with self._stream() as state:
            return (await state()).messages

    @asynccontextmanager
    async def _stream(self) -> AsyncGenerator[Callable[[], Awaitable[StreamState]]]:
        client = await nats.connect(self.nats.url())
        try:

            async def state() -> StreamState:
                return (await client.jetstream().stream_info(EVENTS_STREAM)).state

            yield state
        finally:
            await client.close()


async def _reach(
    state: Callable[[], Awaitable[StreamState]], there: Callable[[StreamState], bool]
) -> StreamState:
    """Waits, in bounds."""
    deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
    while not there(now := await state()):
        if time.monotonic() > deadline_s:
            raise ProgramError(f"{now.messages} messages were left after {DRAIN_TIMEOUT_S:.0f} s")
        await asyncio.sleep(POLL_S)
    return now


def children_of(process: int) -> list[int]:
    """The processes that a process has started."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == process:
                    found.append(int(entry.name))
    return found


@contextmanager
def running_servers(data: Path) -> Iterator[Servers]:
    """Both servers for the block, and whatever recorders it starts."""
    servers = Servers(data, EmbeddedPostgres(data / "postgres"), EmbeddedNats(data / "nats"))
    try:
        servers.postgres.start()
        servers.nats.start()
        yield servers
    finally:
        servers.stop_recorders()
        servers.nats.stop()
        servers.postgres.stop()


async def _make_database(postgres: EmbeddedPostgres, name: str) -> None:
    administrator = await asyncpg.connect(postgres.url())
    try:
        await administrator.execute(f"create database {name}")
    finally:
        await administrator.close()
    await migrate(postgres.url(name))
    connection = await asyncpg.connect(postgres.url(name))
    try:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert await connection.fetchval("select current_setting($1)", setting) == "on"
        await seed_prices(connection)
        await add_tenants(connection)
    finally:
        await connection.close()


async def add_tenants(connection: Connection) -> None:
    """The tenants of the load, and credit for those that are prepaid."""
    async with connection.transaction():
        await connection.execute(_TENANTS, tenant_ids())
        await connection.execute(_CREDIT, FORTUNE_NANO_USD)
