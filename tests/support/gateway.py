"""A gateway with what it talks to: an engine and a trainer that speak the real protocols but compute nothing.

They stand where foreign processes would, at the wire; the whole stack is tested in `tests/e2e`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

from river_billing import streams
from river_billing.events import EVENTS_STREAM, CheckpointSaved, UsageEvent
from river_client import wire
from river_engine.protocol import (
    ADAPTER_HEADER,
    ENGINES_BUCKET,
    MODEL_HEADER,
    AdapterRef,
    EngineError,
    EngineRecord,
    EngineSample,
    EngineSampleGroup,
    EngineSampleResult,
    EngineSequence,
)
from river_gateway.app import create_app
from river_gateway.auth import create_key, create_tenant
from river_gateway.services import Services, open_services
from river_gateway.settings import Settings
from river_trainer import journal
from river_trainer.protocol import (
    RESULTS_STREAM,
    TRAIN_STREAM,
    CreateRun,
    Forward,
    ForwardBackward,
    LiveVersion,
    SaveWeights,
    TaskError,
    TrainerRecord,
    TrainMessage,
    TrainResult,
    TrainStep,
    operation_id,
    policy_version,
)

BASE = "river/test-base"
CONTEXT_LENGTH = 64
VOCAB_SIZE = 512
TOKEN = "engine-secret"
PROMPT_TOKENS, CACHED_TOKENS, COMPLETION_TOKENS = 7, 2, 4
PATIENCE_S = 10.0


async def eventually(condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`, within `PATIENCE_S`."""
    async with asyncio.timeout(PATIENCE_S):
        while not (value := condition()):  # noqa: ASYNC110 - the other side has no event to wait for
            await asyncio.sleep(0.01)
        return value


# ---- Engine ----------------------------------------------------------------------------------------------------------


@dataclass
class StandInEngine:
    """Answers with fixed text and counts. `behaviour`: ok, refuse, busy, unready, break (mid-answer), hang.

    The adapters that `unloadable` names are refused with a type of error, after something has been done.
    """

    engine_id: str
    url: str = ""
    behaviour: str = "ok"
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    samples: list[EngineSample] = field(default_factory=list)
    cancelled: int = 0
    unloadable: dict[str, tuple[str, Callable[[], Awaitable[None]]]] = field(default_factory=dict)
    may_break: asyncio.Event = field(default_factory=asyncio.Event)

    def record(self, **changes: Any) -> EngineRecord:
        plain = EngineRecord(
            engine_id=self.engine_id,
            base_model=BASE,
            url=self.url,
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            max_loras=4,
            max_lora_rank=16,
            heartbeat_at=time.time(),
        )
        return msgspec.structs.replace(plain, **changes)

    def application(self) -> web.Application:
        application = web.Application(client_max_size=2**26)
        application.router.add_post("/v1/chat/completions", self._openai)
        application.router.add_post("/v1/completions", self._openai)
        application.router.add_post("/river/sample", self._sample)
        return application

    async def _openai(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        body = await request.json()
        self.requests.append((dict(request.headers), body))
        adapter = msgspec.json.decode(
            request.headers.get(ADAPTER_HEADER, "null"), type=AdapterRef | None
        )
        unloadable = await self._unloadable(adapter)
        if unloadable is not None:
            return web.Response(body=msgspec.json.encode(unloadable), status=404)
        refusal = self._refusal()
        if refusal is not None:
            status, message = refusal
            error = {"message": message, "type": "BadRequestError", "param": "temperature"}
            return web.json_response({"error": {**error, "code": status}}, status=status)
        try:
            if body.get("stream"):
                return await self._stream(request, body)
            if self.behaviour == "hang":
                await asyncio.sleep(PATIENCE_S)
            return web.json_response(self._whole(request))
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise

    async def _unloadable(self, adapter: AdapterRef | None) -> EngineError | None:
        if adapter is None or adapter.name not in self.unloadable:
            return None
        type_name, meanwhile = self.unloadable[adapter.name]
        await meanwhile()
        return EngineError(type=type_name, message=f"no adapter at {adapter.location}")

    def _refusal(self) -> tuple[int, str] | None:
        return {
            "refuse": (400, "temperature must be non-negative"),
            "busy": (429, "too many"),
            "unready": (503, "starting"),
            "fail": (500, "secret trace"),
        }.get(self.behaviour)

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert body["stream_options"]["include_usage"]
        assert body["stream_options"]["continuous_usage_stats"]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for index in range(COMPLETION_TOKENS):
            chunk = self._chunk(request, f"w{index} ", index + 1)
            await response.write(b"data: " + msgspec.json.encode(chunk) + b"\n\n")
            if index == 1 and self.behaviour == "hang":
                await asyncio.sleep(PATIENCE_S)
            if index == 1 and self.behaviour == "break":
                await self.may_break.wait()
                assert request.transport is not None
                request.transport.close()
                return response
        usage = _usage(COMPLETION_TOKENS, cached=CACHED_TOKENS)
        last = self._chunk(request, "", COMPLETION_TOKENS) | {"choices": [], "usage": usage}
        await response.write(b"data: " + msgspec.json.encode(last) + b"\n\ndata: [DONE]\n\n")
        return response

    def _chunk(self, request: web.Request, text: str, produced: int) -> dict[str, Any]:
        chat = "chat" in request.path
        content = {"delta": {"content": text}} if chat else {"text": text}
        return {
            "id": f"cmpl-{request.headers['x-request-id']}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1,
            "model": request.headers[MODEL_HEADER],
            "choices": [{"index": 0, "finish_reason": None, "logprobs": None, **content}],
            "usage": _usage(produced),
        }

    def _whole(self, request: web.Request) -> dict[str, Any]:
        chat = "chat" in request.path
        content = {"message": {"role": "assistant", "content": "w0 "}} if chat else {"text": "w0 "}
        usage = _usage(COMPLETION_TOKENS, cached=CACHED_TOKENS)
        return {
            "id": f"cmpl-{request.headers['x-request-id']}",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": request.headers[MODEL_HEADER],
            "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, **content}],
            "usage": usage,
        }

    async def _sample(self, request: web.Request) -> web.Response:
        asked = msgspec.msgpack.decode(await request.read(), type=EngineSample)
        self.samples.append(asked)
        unloadable = await self._unloadable(asked.adapter)
        if unloadable is not None:
            return web.Response(body=msgspec.msgpack.encode(unloadable), status=404)
        if self.behaviour == "refuse":
            error = EngineError(
                type="invalid_request", message="prompts[0]: too long", param="prompts[0]"
            )
            return web.Response(body=msgspec.msgpack.encode(error), status=422)
        sequence = EngineSequence(
            text="w0 w1",
            tokens=[3, 4],
            logprobs=[-0.5, -0.25],
            stop_reason="length",
            top_logprobs=[[(3, -0.5)], [(4, -0.25)]] if asked.logprobs else None,
        )
        prompts = asked.prompt_token_ids or [[1] * len(prompt) for prompt in asked.prompts or ()]
        groups = [
            EngineSampleGroup(
                prompt_token_ids=prompt,
                samples=[sequence] * asked.num_samples,
                cached_prompt_tokens=1,
            )
            for prompt in prompts
        ]
        return web.Response(body=msgspec.msgpack.encode(EngineSampleResult(groups=groups)))


def _usage(produced: int, *, cached: int | None = None) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": produced,
        "total_tokens": PROMPT_TOKENS + produced,
    }
    return usage if cached is None else usage | {"prompt_tokens_details": {"cached_tokens": cached}}


# ---- Trainer ---------------------------------------------------------------------------------------------------------


class StandInTrainer:
    """Takes each new operation as soon as it is stored and answers it, in memory."""

    def __init__(self, client: Client, store: Path) -> None:
        self._client = client
        self._store = store
        self.messages: list[TrainMessage] = []
        self.steps: dict[str, int] = {}
        self.answering = True
        self.subscription: Any = None

    @staticmethod
    def record(**changes: Any) -> TrainerRecord:
        plain = TrainerRecord(
            trainer_id="trn_1",
            base_model=BASE,
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            max_lora_rank=32,
            heartbeat_at=time.time(),
        )
        return msgspec.structs.replace(plain, **changes)

    async def take(self, message: Any) -> None:
        body = await journal.read_body(self._client.jetstream(), message.data, message.headers)
        decoded = journal.decode_message(body)
        self.messages.append(decoded)
        if self.answering:
            await self.answer(decoded)

    async def answer(self, message: TrainMessage, *, error: TaskError | None = None) -> None:
        """Executes one operation and publishes its result."""
        jetstream = self._client.jetstream()
        task = message.task
        if isinstance(task, CreateRun):
            self.steps[message.run_id] = 0
        if isinstance(task, TrainStep):
            self.steps[message.run_id] += 1
        step = self.steps[message.run_id]
        if isinstance(task, CreateRun | TrainStep):
            adapter = AdapterRef(name=policy_version(message.run_id, step), location="file:///x")
            live = LiveVersion(run_id=message.run_id, step=step, adapter=adapter)
            await (await journal.live_bucket(jetstream)).put(message.run_id, journal.encode(live))
        logprobs = None
        if isinstance(task, Forward | ForwardBackward | TrainStep):
            logprobs = [b"\0\0\0\0" * (len(sequence.input_ids) // 4) for sequence in task.data]
        result = TrainResult(
            operation_id=operation_id(message.run_id, message.seq),
            run_id=message.run_id,
            seq=message.seq,
            step=step,
            metrics={"loss_sum": 1.5},
            logprobs=logprobs,
            training_tokens=3,
            checkpoint=self._save(message, task, step) if isinstance(task, SaveWeights) else None,
            error=error,
        )
        await journal.publish_result(jetstream, result)

    def _save(self, message: TrainMessage, task: SaveWeights, step: int) -> CheckpointSaved:
        directory = self._store / task.checkpoint_id
        directory.mkdir()
        (directory / "adapter_model.safetensors").write_bytes(bytes(range(100)))
        (directory / "adapter_config.json").write_text("{}")
        return CheckpointSaved(
            checkpoint_id=task.checkpoint_id,
            run_id=message.run_id,
            tenant_id=message.tenant_id,
            base_model=message.base_model,
            name=task.name,
            mode=task.mode,
            step=step,
            location=directory.as_uri(),
            size_bytes=102,
            created_at=time.time(),
        )


# ---- All of it -------------------------------------------------------------------------------------------------------


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

    async def usage(self, count: int) -> list[UsageEvent]:
        """The `count` usage events recorded so far, waiting for the last of them."""
        jetstream = self.nats.jetstream()
        events: list[UsageEvent] = []
        async with asyncio.timeout(PATIENCE_S):
            while (await jetstream.stream_info(EVENTS_STREAM)).state.messages < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        state = (await jetstream.stream_info(EVENTS_STREAM)).state
        for sequence in range(state.first_seq, state.last_seq + 1):
            message = await jetstream.get_msg(EVENTS_STREAM, sequence)
            event = streams.decode(message.data or b"")
            assert isinstance(event, UsageEvent)
            events.append(event)
        assert len(events) == count
        return events


@asynccontextmanager
async def running_rig(
    postgres_url: str, nats_url: str, directory: Path, *, engines: int = 2
) -> AsyncGenerator[Rig]:
    """Everything running, with clean streams and all registered."""
    client = await nats.connect(nats_url)
    settings = Settings(
        nats_url=nats_url,
        postgres_url=postgres_url,
        engine_token=TOKEN,
        store_url=directory.as_uri(),
    )
    stand_ins = [StandInEngine(f"eng_{number}") for number in range(engines)]
    try:
        await _clean(client)
        trainer = StandInTrainer(client, directory)
        trainer.subscription = await client.subscribe("train.>", cb=trainer.take)
        async with (
            served(stand_ins),
            open_services(settings) as services,
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
            )
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key.secret, max_retries=0)
            made.append(Tenant(tenant.tenant_id, key.key_id, key.secret, http, client))
        yield made
    finally:
        for tenant in made:
            await tenant.http.aclose()
            await tenant.openai.close()
        await connection.close()
