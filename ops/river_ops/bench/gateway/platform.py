"""The platform around one gateway: servers, recorder, a stand-in engine and, if asked for, a real one."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import asyncpg
import httpx
import msgspec

from river_billing.budgets import set_budget
from river_billing.events import UsageKind
from river_billing.ledger import add_credit, set_billing
from river_billing.prices import set_price
from river_client.wire import Limits
from river_gateway.limits import UPSTREAM_CONCURRENT_MAX
from river_gateway.tenancy.accounts import create_key, create_tenant
from river_ops.bench.gateway.answers import CONTEXT_LENGTH, MODEL
from river_ops.bench.gateway.messages import Listening, StubSettings
from river_ops.bench.gateway.processes import on_cores, pin
from river_ops.bench.programs import start_program
from river_ops.children import Child, free_port, part_argv
from river_ops.embedded.nats import EmbeddedNats
from river_ops.embedded.postgres import EmbeddedPostgres
from river_ops.migrate import migrate
from river_ops.settings import TINY_BASE

STUB_MODULE = "river_ops.bench.gateway.stub"
START_TIMEOUT_S = 180.0
RECORD_TIMEOUT_S, RECORD_POLL_S = 120.0, 1.0
AMPLE = Limits(
    requests_per_minute=10**8,
    tokens_per_minute=2**31 - 1,
    concurrent_requests=UPSTREAM_CONCURRENT_MAX,
)
CUSTOMER_HAS = "limits of key and tenant, prepaid credit, a monthly budget"
FORTUNE_NANO_USD = 10**15
PRICE_NANO_USD = Decimal(330)
_COUNT_REQUESTS = """
select coalesce(sum(events), 0)::bigint from usage_hour where kind = 'completion'
"""


@dataclass(frozen=True, slots=True)
class Platform:
    """`gateway_process` is the gateway's only process; `engine_port` that of the real engine, 0 without one."""

    gateway_port: int
    gateway_process: int
    stub_url: str
    engine_port: int
    engine_token: str
    postgres_url: str
    nats_url: str
    api_key: str

    @property
    def stub_port(self) -> int:
        """Where the stand-in answers."""
        return int(self.stub_url.rpartition(":")[2])


@contextmanager
def running_platform(
    data: Path, *, real_engine: bool, gateway_cores: set[int], other_cores: set[int]
) -> Iterator[Platform]:
    """Everything running while the block runs; the gateway on cores of its own, a real engine on any.

    Raises:
        ChildError: a part does not come up.
    """
    own_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, other_cores)
    postgres, nats = EmbeddedPostgres(data / "postgres"), EmbeddedNats(data / "nats")
    children: list[Child] = []
    stub: subprocess.Popen[bytes] | None = None
    try:
        postgres.start()
        nats.start()
        asyncio.run(migrate(postgres.url()))
        stub, stub_url = _start_stub(nats.url())
        token = secrets.token_urlsafe(24)
        ports = {"gateway": free_port(), "engine": free_port() if real_engine else 0}
        for part in ("engine", "recorder", "gateway") if real_engine else ("recorder", "gateway"):
            environment = {
                "RIVER_POSTGRES_URL": postgres.url(),
                "RIVER_NATS_URL": nats.url(),
                "RIVER_STORE_URL": (data / "store").as_uri(),
                "RIVER_ENGINE_TOKEN": token,
                "RIVER_PORT": str(ports.get(part) or free_port()),
                "RIVER_DATA_DIR": str(data / part),
                # As for the peers: no line for every request.
                "RIVER_LOG_LEVEL": "warning",
            }
            if part == "engine":
                base = TINY_BASE
                environment |= {"RIVER_BASE_MODEL": base.name, "RIVER_MODEL_PATH": base.path}
            child = Child(part, part_argv(part), data / "logs" / f"{part}.log", environment)
            with on_cores(own_cores if part == "engine" else other_cores):
                child.start()
            children.append(child)
        gateway = children[-1]
        key = asyncio.run(_customer(postgres.url()))
        wanted = 2 if real_engine else 1
        gateway.wait_until(
            lambda: _models(ports["gateway"], key) == wanted, timeout_s=START_TIMEOUT_S
        )
        assert gateway.process is not None
        pin(gateway.process.pid, gateway_cores)
        yield Platform(
            gateway_port=ports["gateway"],
            gateway_process=gateway.process.pid,
            stub_url=stub_url,
            engine_port=ports["engine"],
            engine_token=token,
            postgres_url=postgres.url(),
            nats_url=nats.url(),
            api_key=key,
        )
    finally:
        for child in reversed(children):
            child.ask_to_stop()
        for child in reversed(children):
            child.stop()
        if stub is not None:
            assert stub.stdin is not None
            stub.stdin.close()
            stub.wait()
        nats.stop()
        postgres.stop()
        os.sched_setaffinity(0, own_cores)


def _start_stub(nats_url: str) -> tuple[subprocess.Popen[bytes], str]:
    stub = start_program(STUB_MODULE, StubSettings(nats_url=nats_url))
    assert stub.stdout is not None
    return stub, msgspec.json.decode(stub.stdout.readline(), type=Listening).url


async def _customer(postgres_url: str) -> str:
    """The key of a tenant like those that pay; see `CUSTOMER_HAS`."""
    connection = await asyncpg.connect(postgres_url)
    try:
        tenant = await create_tenant(connection, "bench", limits=AMPLE)
        key = await create_key(connection, tenant=tenant.tenant_id, limits=AMPLE)
        await set_billing(connection, tenant.tenant_id, "prepaid")
        await add_credit(
            connection,
            tenant_id=tenant.tenant_id,
            amount_nano_usd=FORTUNE_NANO_USD,
            reference="bench",
        )
        for kind in (UsageKind.PROMPT, UsageKind.CACHED_PROMPT, UsageKind.COMPLETION):
            await set_price(
                connection,
                model=MODEL,
                context_length=CONTEXT_LENGTH,
                kind=kind,
                nano_usd_per_unit=PRICE_NANO_USD,
            )
        await set_budget(connection, key_id=key.key_id, budget_nano_usd=FORTUNE_NANO_USD)
    finally:
        await connection.close()
    assert key.secret is not None
    return key.secret


def recorded_requests(platform: Platform, billable: int) -> int:
    """How many requests are billed by the time that all `billable` are, or that `RECORD_TIMEOUT_S` is over."""
    return asyncio.run(_recorded_requests(platform.postgres_url, billable))


async def _recorded_requests(postgres_url: str, billable: int) -> int:
    deadline = time.monotonic() + RECORD_TIMEOUT_S
    connection = await asyncpg.connect(postgres_url)
    try:
        while True:
            recorded = await connection.fetchval(_COUNT_REQUESTS)
            if recorded >= billable or time.monotonic() > deadline:
                return recorded
            await asyncio.sleep(RECORD_POLL_S)
    finally:
        await connection.close()


def _models(port: int, key: str) -> int:
    """How many models the gateway serves; 0 while it does not answer."""
    url = f"http://127.0.0.1:{port}/v1/models"
    try:
        answer = httpx.get(url, headers={"authorization": f"Bearer {key}"}, timeout=5.0)
    except httpx.TransportError:
        return 0
    return len(answer.json()["data"]) if answer.is_success else 0
