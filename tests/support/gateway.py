"""A gateway with what it talks to: real Postgres and NATS, a stand-in engine and trainer.

The whole stack is tested in `tests/e2e`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import asyncpg
import httpx
import msgspec
import nats
import openai
import uvicorn
from aiohttp import web
from nats.aio.client import Client
from nats.js.api import KeyValueConfig
from nats.js.errors import NotFoundError
from support.stand_ins import BASE, PATIENCE_S, TOKEN, StandInEngine, StandInTrainer

from river_billing import streams
from river_billing.events import EVENTS_STREAM, UsageEvent
from river_client import wire
from river_engine.obeying import obey
from river_engine.protocol import ENGINES_BUCKET, EngineRecord, control_subject
from river_gateway.app import create_app
from river_gateway.http_protocol import GatewayProtocol
from river_gateway.services import Services, open_services
from river_gateway.settings import Settings
from river_gateway.tenancy.accounts import create_key, create_tenant
from river_trainer import journal
from river_trainer.protocol import (
    RESULTS_STREAM,
    TRAIN_STREAM,
    TrainerRecord,
    trainer_control_subject,
)

_TLS = ssl.create_default_context()
"""Never used, but each client makes one of its own otherwise, which takes longer than most requests here."""
_JOIN_S = 0.02
"""How long a gateway waits for what others know of limits: here they are near."""


def error_of(answer: httpx.Response) -> wire.ErrorBody:
    """What an answer says is wrong."""
    return msgspec.json.decode(answer.content, type=wire.ErrorEnvelope).error


async def eventually(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """The first true value of `condition`, within `patience_s`."""
    async with asyncio.timeout(patience_s):
        while not (value := condition()):  # noqa: ASYNC110 - the other side has no event to wait for
            await asyncio.sleep(0.01)
        return value


@dataclass
class Tenant:
    """A tenant with a key, and clients that use it."""

    tenant_id: str
    key_id: str
    secret: str
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI

    async def post(self, route: str, body: Any, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return await self.http.post(f"/river/v1{route}", content=content, **options)

    async def get(self, route: str, /, **params: Any) -> httpx.Response:
        return await self.http.get(f"/river/v1{route}", params=params)

    async def new_run(self, **changes: Any) -> wire.Run:
        """A run that the trainer has made."""
        session = await self.post("/sessions", wire.CreateSession(tags={"who": "test"}))
        assert session.status_code == 201, session.text
        asked = wire.CreateRun(session_id=session.json()["session_id"], base_model=BASE)
        answer = await self.post("/runs", msgspec.structs.replace(asked, **changes))
        assert answer.status_code == 201, answer.text
        run = msgspec.json.decode(answer.content, type=wire.Run)
        assert (await self.result(f"{run.run_id}-0")).status == "done"
        return run

    async def submit(self, run_id: str, seq: int, operation: wire.AnyOperation) -> httpx.Response:
        submitted = wire.SubmitOperation(seq=seq, operation=operation)
        return await self.post(f"/runs/{run_id}/operations", submitted)

    async def result(self, operation: str, timeout_s: float = PATIENCE_S) -> wire.OperationResult:
        answer = await self.get(f"/operations/{operation}", timeout_s=timeout_s)
        assert answer.status_code == 200, answer.text
        return msgspec.json.decode(answer.content, type=wire.OperationResult)

    async def save(self, run_id: str, seq: int, name: str, **changes: Any) -> wire.Checkpoint:
        """A saved checkpoint."""
        accepted = await self.submit(run_id, seq, wire.SaveWeights(name=name, **changes))
        assert accepted.status_code == 202, accepted.text
        result = await self.result(f"{run_id}-{seq}")
        assert result.checkpoint is not None
        return result.checkpoint


@dataclass
class Rig:
    """The gateway, its neighbours, and two tenants of which the second is a stranger."""

    services: Services
    url: str
    nats: Client
    engines: list[StandInEngine]
    trainer: StandInTrainer
    tenant: Tenant
    stranger: Tenant
    admin: Tenant
    store: Path

    async def register(self, record: EngineRecord) -> None:
        """Makes an engine's record known to the gateway."""
        bucket = await self.nats.jetstream().key_value(ENGINES_BUCKET)
        await bucket.put(record.engine_id, msgspec.msgpack.encode(record))
        await eventually(lambda: record in self.services.engines.alive())

    async def register_trainer(self, record: TrainerRecord) -> None:
        """Makes a trainer's record known to the gateway."""
        bucket = await journal.trainers_bucket(self.nats.jetstream())
        await bucket.put(record.trainer_id, msgspec.msgpack.encode(record))
        await eventually(lambda: record in self.services.trainers.alive())

    async def usage(self, count: int) -> list[UsageEvent]:
        """The `count` usage events recorded so far, waiting for the last of them."""
        jetstream = self.nats.jetstream()
        events: list[UsageEvent] = []
        async with asyncio.timeout(PATIENCE_S):
            seen = 0
            while len(events) < count:
                state = (await jetstream.stream_info(EVENTS_STREAM)).state
                for sequence in range(max(state.first_seq, seen + 1), state.last_seq + 1):
                    message = await jetstream.get_msg(EVENTS_STREAM, sequence)
                    found = streams.decode(message.data or b"")
                    events += [event for event in found if isinstance(event, UsageEvent)]
                    assert len(found) <= count
                    seen = sequence
                await asyncio.sleep(0.01)
        assert len(events) == count
        return events


@asynccontextmanager
async def running_rig(
    postgres_url: str,
    nats_url: str,
    directory: Path,
    *,
    engines: int = 2,
    store_url: str | None = None,
    **settings_more: Any,
) -> AsyncGenerator[Rig]:
    """Everything running, with clean streams and all registered; the store is `directory` or elsewhere."""
    store_url = store_url or directory.as_uri()
    client = await nats.connect(nats_url)
    settings = Settings(
        nats_url=nats_url,
        postgres_url=postgres_url,
        engine_token=TOKEN,
        store_url=store_url,
        sweep_interval_s=0.2,
        sweep_grace_s=0.0,
        usage_spool_dir=str(directory / "usage-spool"),
        **settings_more,
    )
    stand_ins = [StandInEngine(f"eng_{number}") for number in range(engines)]
    try:
        await _clean(client)
        trainer = StandInTrainer(client, store_url)
        trainer.subscription = await client.subscribe("train.>", cb=trainer.take)
        await obey(client, trainer_control_subject("trn_1"), trainer.obey)
        for stand_in in stand_ins:
            await obey(client, control_subject(stand_in.engine_id), stand_in.obey)
        async with (
            served(stand_ins),
            _opened(settings) as services,
            served_gateway(services) as url,
            tenants(postgres_url, url) as (tenant, stranger, admin),
        ):
            rig = Rig(services, url, client, stand_ins, trainer, tenant, stranger, admin, directory)
            bucket = await journal.trainers_bucket(client.jetstream())
            await bucket.put("trn_1", msgspec.msgpack.encode(trainer.record()))
            for engine in stand_ins:
                await rig.register(engine.record())
            await eventually(services.trainers.alive)
            yield rig
    finally:
        await client.close()


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncGenerator[Services]:
    with patch("river_gateway.tenancy.exchange.QUOTA_JOIN_S", _JOIN_S):
        async with open_services(settings) as services:
            yield services


async def _clean(client: Client) -> None:
    """Empty streams and buckets: the server is shared by all tests of the gateway."""
    jetstream = client.jetstream()
    names = [TRAIN_STREAM, RESULTS_STREAM, EVENTS_STREAM, "OBJ_bodies"]
    names += [f"KV_{bucket}" for bucket in (ENGINES_BUCKET, "trainers", "live")]
    for name in names:
        with suppress(NotFoundError):
            await jetstream.delete_stream(name)
    await journal.ensure_streams(jetstream)
    await streams.ensure_streams(jetstream)
    await jetstream.create_key_value(KeyValueConfig(bucket=ENGINES_BUCKET))


@asynccontextmanager
async def served(engines: list[StandInEngine]) -> AsyncGenerator[None]:
    """The engines, listening."""
    runners: list[web.AppRunner] = []
    try:
        for engine in engines:
            runner = web.AppRunner(
                engine.application(), handler_cancellation=True, shutdown_timeout=0.1
            )
            runners.append(runner)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


@asynccontextmanager
async def served_gateway(services: Services) -> AsyncGenerator[str]:
    """The gateway's application on a port of its own; yields its URL."""
    config = uvicorn.Config(
        create_app(services),
        port=0,
        http=GatewayProtocol,
        lifespan="off",
        ws="none",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    try:
        await eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        services.stopping.set()
        server.should_exit = True
        await serving


@asynccontextmanager
async def tenants(postgres_url: str, url: str) -> AsyncGenerator[list[Tenant]]:
    """A tenant, a stranger and an administrator."""
    connection = await asyncpg.connect(postgres_url)
    made: list[Tenant] = []
    try:
        for name in ("tenant", "stranger", "admin"):
            tenant = await create_tenant(connection, name)
            scopes = ["admin"] if name == "admin" else ["infer", "train"]
            key = await create_key(connection, tenant=tenant.tenant_id, scopes=scopes)
            assert key.secret is not None
            http = httpx.AsyncClient(
                base_url=url,
                headers={"authorization": f"Bearer {key.secret}"},
                timeout=2 * PATIENCE_S,
                verify=_TLS,
            )
            client = openai.AsyncOpenAI(
                base_url=f"{url}/v1",
                api_key=key.secret,
                max_retries=0,
                http_client=openai.DefaultAsyncHttpxClient(verify=_TLS),
            )
            made.append(Tenant(tenant.tenant_id, key.key_id, key.secret, http, client))
        yield made
    finally:
        for tenant in made:
            await tenant.http.aclose()
            await tenant.openai.close()
        await connection.close()
