"""An engine and a trainer that speak the real protocols but compute nothing.

They stand where foreign processes would, at the wire.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from aiohttp import web
from nats.aio.client import Client
from support import stand_in_answers
from support.stand_in_answers import CACHED_TOKENS, COMPLETION_TOKENS, PROMPT_TOKENS

from river_billing.events import CheckpointSaved
from river_engine.protocol import (
    ADAPTER_HEADER,
    ADAPTER_LOADING,
    FINAL_USAGE_PATH,
    MODEL_HEADER,
    AdapterRef,
    Control,
    Controlled,
    EngineError,
    EngineRecord,
    EngineSample,
    EngineSampleGroup,
    EngineSampleResult,
    EngineSequence,
    ExpertRouting,
    StreamUsage,
    TokenTable,
    TopLogprobs,
)
from river_trainer import journal
from river_trainer.encryption import encrypted
from river_trainer.protocol import (
    CreateRun,
    Forward,
    ForwardBackward,
    LiveVersion,
    Refused,
    SaveWeights,
    TaskError,
    TrainerRecord,
    TrainMessage,
    TrainResult,
    TrainStep,
    operation_id,
    policy_version,
)
from river_trainer.store import FileSets

BASE = "river/test-base"
CONTEXT_LENGTH = 64
VOCAB_SIZE = 512
TOKEN = "engine-secret"
PATIENCE_S = 10.0
ROUTING = ExpertRouting(
    dtype="uint8", shape=(3, 2, 2), data=bytes([0, 7, 1, 2, 3, 0, 6, 5, 0, 0, 0, 0])
)
"""Of a prompt of one token and the two that the engine answers."""

# ---- Engine ----------------------------------------------------------------------------------------------------------


@dataclass
class StandInEngine:
    """Answers with fixed text and counts. `behaviour`: ok, refuse, busy, unready, break (mid-answer), hang, mute.

    One that is mute says nothing after the head of a stream, and does not even come to the head of a whole answer.

    The adapters that `unloadable` names are refused with a type of error, after something has been done.
    """

    engine_id: str
    url: str = ""
    behaviour: str = "ok"
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    samples: list[EngineSample] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    cancelled: int = 0
    unloadable: dict[str, tuple[str, Callable[[], Awaitable[None]]]] = field(default_factory=dict)
    may_break: asyncio.Event = field(default_factory=asyncio.Event)
    final_usage: StreamUsage | None = (
        None  # what any request has used when it is over; none: nobody knows
    )

    def obey(self, asked: Control) -> Controlled:
        """Does nothing but keep in mind what it was told."""
        self.controls.append(asked.action)
        return Controlled(draining=asked.action != "undrain")

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
        for path in stand_in_answers.PATHS:
            application.router.add_post(path, self._openai)
        application.router.add_post("/river/sample", self._sample)
        application.router.add_post(FINAL_USAGE_PATH, self._final_usage)
        return application

    async def _final_usage(self, request: web.Request) -> web.Response:
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        asked = {
            value
            for headers, _ in self.requests
            for name, value in headers.items()
            if name.lower() == "x-request-id"
        }
        if self.final_usage is None or await request.text() not in asked:
            return web.Response(status=404)
        return web.Response(body=msgspec.json.encode(self.final_usage))

    async def _openai(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        body = await request.json()
        self.requests.append((dict(request.headers), body))
        adapter = msgspec.json.decode(
            request.headers.get(ADAPTER_HEADER, "null"), type=AdapterRef | None
        )
        unloadable = await self._unloadable(adapter)
        if unloadable is not None:
            return web.Response(
                body=msgspec.json.encode(unloadable),
                status=503 if unloadable.type == ADAPTER_LOADING else 404,
                headers={"retry-after": "5"},
            )
        refusal = self._refusal()
        if refusal is not None:
            status, message = refusal
            error = {"message": message, "type": "BadRequestError", "param": "temperature"}
            return web.json_response({"error": {**error, "code": status}}, status=status)
        try:
            if body.get("stream"):
                typed = request.path in stand_in_answers.PATHS
                stream = self._stream_typed if typed else self._stream
                return await stream(request, body)
            if self.behaviour in ("hang", "mute"):
                await asyncio.sleep(PATIENCE_S)
            whole = self._whole(request)
            _tell_tokens(whole, body, [10], first=True)
            return web.json_response(whole)
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

    async def _stream_typed(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        events = stand_in_answers.stream_events(
            request.path, request.headers[MODEL_HEADER], cut_off=body.get("max_output_tokens") == 1
        )
        paused = False
        for produced, event in events:
            if produced > 2 and not paused and self.behaviour in ("hang", "break"):
                paused = True
                if self.behaviour == "hang":
                    await asyncio.sleep(PATIENCE_S)
                await self.may_break.wait()
                assert request.transport is not None
                request.transport.close()
                return response
            await response.write(event)
        return response

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert body["stream_options"]["include_usage"]
        assert body["stream_options"]["continuous_usage_stats"]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if self.behaviour == "mute":
            await asyncio.sleep(PATIENCE_S)
        for index in range(COMPLETION_TOKENS):
            chunk = self._chunk(request, f"w{index} ", index + 1)
            _tell_tokens(chunk, body, [10 + index], first=index == 0)
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
        if request.path in stand_in_answers.PATHS:
            return stand_in_answers.whole_answer(request.path, request.headers[MODEL_HEADER])
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
        if self.behaviour == "mute":
            await asyncio.sleep(PATIENCE_S)
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
            expert_routing=ROUTING if asked.return_expert_routing else None,
        )
        prompts = asked.prompt_token_ids or [[1] * len(prompt) for prompt in asked.prompts or ()]
        targets = asked.prompt_targets or [None] * len(prompts)
        groups = [
            EngineSampleGroup(
                prompt_token_ids=prompt,
                samples=[sequence] * asked.num_samples,
                cached_prompt_tokens=1,
                prompt_top_logprobs=_top(len(prompt), asked.prompt_top_logprobs or 0),
                prompt_target_logprobs=_scores(table) if table else None,
            )
            for prompt, table in zip(prompts, targets, strict=True)
        ]
        return web.Response(body=msgspec.msgpack.encode(EngineSampleResult(groups=groups)))


def _top(tokens: int, width: int) -> TopLogprobs | None:
    """So many tokens, none of them scored."""
    ids, logprobs = np.full((tokens, width), -1, "<i4"), np.full((tokens, width), -np.inf, "<f4")
    top = TopLogprobs(width=width, token_ids=ids.tobytes(), logprobs=logprobs.tobytes())
    return top if width else None


def _scores(table: TokenTable) -> bytes:
    """Each token's number as its log-probability."""
    return np.frombuffer(table.token_ids, "<i4").astype("<f4").tobytes()


def _tell_tokens(
    answer: dict[str, Any], body: dict[str, Any], tokens: list[int], *, first: bool
) -> None:
    """What vLLM adds where token ids and log-probabilities are asked for; the choice is copied for each of `n`."""
    prompt = list(range(1, PROMPT_TOKENS + 1))
    for choice in answer.get("choices", ()):
        chat = "text" not in choice
        if chat and body.get("logprobs") is True:
            entries = [
                {"token": f"t{token}", "logprob": -token / 100, "bytes": None, "top_logprobs": []}
                for token in tokens
            ]
            choice["logprobs"] = {"content": entries}
        if not chat and body.get("logprobs") is not None:
            choice["logprobs"] = {
                "text_offset": [0] * len(tokens),
                "token_logprobs": [-token / 100 for token in tokens],
                "tokens": [f"t{token}" for token in tokens],
                "top_logprobs": [{f"t{token}": -token / 100} for token in tokens],
            }
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
            if not chat:
                choice["prompt_token_ids"] = prompt if first else None
            elif first:
                answer["prompt_token_ids"] = prompt
    if body.get("n", 1) > 1 and "choices" in answer:
        answer["choices"] = [answer["choices"][0] | {"index": index} for index in range(body["n"])]


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

    def __init__(self, client: Client, store_url: str) -> None:
        self._client = client
        self._store_url = store_url
        self.messages: list[TrainMessage] = []
        self.steps: dict[str, int] = {}
        self.answering = True
        self.controls: list[str] = []
        self.subscription: Any = None

    def obey(self, asked: Control) -> Controlled:
        """Does nothing but keep in mind what it was told; leaves as soon as it has been told to."""
        if "restart" in self.controls:
            return Controlled(draining=True, refused="the trainer is about to leave")
        self.controls.append(asked.action)
        return Controlled(draining=asked.action != "undrain")

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
            adapter = AdapterRef(
                name=policy_version(message.run_id, step), location=f"file:///x/{step}"
            )
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
            error=task.error if isinstance(task, Refused) else error,
        )
        await journal.publish_result(jetstream, result)

    def _save(self, message: TrainMessage, task: SaveWeights, step: int) -> CheckpointSaved:
        files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(100))}
        store = FileSets(self._store_url)
        folder = f"checkpoints/{task.checkpoint_id}"
        if task.age_recipients:
            files = encrypted(files, task.age_recipients)
        store.write(folder, files, {})
        return CheckpointSaved(
            checkpoint_id=task.checkpoint_id,
            run_id=message.run_id,
            tenant_id=message.tenant_id,
            base_model=message.base_model,
            name=task.name,
            mode=task.mode,
            step=step,
            location=store.location(folder),
            size_bytes=102,
            created_at=time.time(),
            expires_at=None if task.ttl_s is None else time.time() + task.ttl_s,
            user_metadata=task.user_metadata,
        )
