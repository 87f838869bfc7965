"""The engine's door: one ASGI application around vLLM's own.

* A token for everything but the health checks and the metrics.
* `POST /river/sample`, answered here.
* vLLM's OpenAI routes: the adapter of `x-river-adapter` is held while the request runs, streaming included. The
  body's `model` is always replaced, by that adapter or by the base model: nobody reaches an adapter by guessing its
  name. Answers show the name of `x-river-model`.

vLLM finds adapters by name in `lora_requests`, and lists them on `/v1/models`; here each request sees its own and
nothing else, by a context variable.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from vllm.lora.request import LoRARequest

from river_engine.adapters import AdapterStore
from river_engine.counting import many_prompts
from river_engine.errors import (
    EngineBusy,
    EngineRefusal,
    InvalidField,
    TooLarge,
    Unauthorized,
)
from river_engine.limits import BODY_MAX_BYTES, HEADER_MAX_BYTES
from river_engine.protocol import ADAPTER_HEADER, MODEL_HEADER, AdapterRef, EngineSample
from river_engine.sampling import Sampler
from river_engine.stream_usage import ANNOTATED_PATHS, annotated

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health", "/metrics"})
_MSGPACK = "application/msgpack"
_adapter: ContextVar[LoRARequest | None] = ContextVar("adapter", default=None)
_public_model: ContextVar[str | None] = ContextVar("public_model", default=None)


class OwnAdapter(Mapping[str, LoRARequest]):
    """vLLM's `lora_requests`, as seen by the current request."""

    def __getitem__(self, name: str) -> LoRARequest:
        lora = _adapter.get()
        if lora is None or lora.lora_name != name:
            raise KeyError(name)
        return lora

    def __iter__(self) -> Iterator[str]:
        lora = _adapter.get()
        return iter(() if lora is None else (lora.lora_name,))

    def __len__(self) -> int:
        return 0 if _adapter.get() is None else 1


def show_own_adapter(models: Any, base_model: str) -> None:
    """Turns vLLM's `OpenAIServingModels` to what the current request may see."""

    def model_name(lora_request: LoRARequest | None = None) -> str:
        return _public_model.get() or (lora_request.lora_name if lora_request else base_model)

    models.lora_requests = OwnAdapter()
    models.model_name = model_name
    models.show_available_models = models.registry.show_available_models


class EngineDoor:
    """The ASGI application; `inner` is vLLM's, `alive` says whether its core still runs."""

    def __init__(
        self,
        inner: App,
        store: AdapterStore,
        sampler: Sampler,
        *,
        token: str,
        base_model: str,
        alive: Callable[[], bool],
    ) -> None:
        self._inner = inner
        self._store = store
        self._sampler = sampler
        self._credentials = f"Bearer {token}".encode()
        self._base_model = base_model
        self._alive = alive
        self._sample_decoder = msgspec.msgpack.Decoder(EngineSample)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        path: str = scope["path"]
        try:
            if path not in _OPEN_PATHS:
                self._authorize(headers)
            if path in ("/healthz", "/readyz"):
                status, body = (200, b"ok\n") if self._alive() else (503, b"engine dead\n")
                await _answer(send, status, body, "text/plain")
            elif path == "/metrics":
                await _answer(send, 200, generate_latest(), CONTENT_TYPE_LATEST)
            elif path == "/river/sample":
                await self._sample(scope, receive, send)
            elif scope["method"] == "POST":
                await self._openai(headers, scope, receive, send)
            else:
                await self._inner(scope, receive, send)
        except EngineRefusal as error:
            await _answer(send, error.status, msgspec.json.encode(error.body()), "application/json")

    def _authorize(self, headers: dict[bytes, bytes]) -> None:
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._credentials):
            raise Unauthorized("the engine's token is missing or wrong")

    async def _sample(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] != "POST":
                raise InvalidField("only POST")
            body = await _read_body(receive)
            try:
                request = self._sample_decoder.decode(body)
            except (msgspec.ValidationError, msgspec.DecodeError) as error:
                raise InvalidField(str(error)) from error
            result = await _unless_gone(self._sampler.sample(request), receive)
        except EngineRefusal as error:
            await _answer(send, error.status, msgspec.msgpack.encode(error.body()), _MSGPACK)
            return
        if result is not None:
            await _answer(send, 200, msgspec.msgpack.encode(result), _MSGPACK)

    async def _openai(
        self, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        reference = _adapter_reference(headers)
        public = headers.get(MODEL_HEADER.encode())
        body = await _read_body(receive)
        public_token = _public_model.set(public.decode() if public else None)
        try:
            if reference is None:
                await self._pass_on(body, self._base_model, scope, receive, send)
                return
            async with self._store.hold(reference) as lora:
                adapter_token = _adapter.set(lora)
                try:
                    await self._pass_on(body, lora.lora_name, scope, receive, send)
                finally:
                    _adapter.reset(adapter_token)
        finally:
            _public_model.reset(public_token)

    async def _pass_on(
        self, body: bytes, model: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Calls vLLM with `model` in the body."""
        # A body that is not an object names no model on any route of vLLM, whose own errors are the better ones.
        with contextlib.suppress(msgspec.ValidationError, msgspec.DecodeError):
            fields: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            fields["model"] = model
            body = msgspec.json.encode(fields)
            many_prompts.set(_is_many(bytes(fields.get("prompt", b"null"))))
        length = str(len(body)).encode()
        scope["headers"] = [
            (name, value) for name, value in scope["headers"] if name != b"content-length"
        ] + [(b"content-length", length)]
        unread = True

        async def receive_replaced() -> MutableMapping[str, Any]:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        if scope["path"] in ANNOTATED_PATHS:
            send = annotated(send)
        await self._inner(scope, receive_replaced, send)


def _adapter_reference(headers: dict[bytes, bytes]) -> AdapterRef | None:
    value = headers.get(ADAPTER_HEADER.encode())
    if value is None:
        return None
    if len(value) > HEADER_MAX_BYTES:
        raise TooLarge(f"{ADAPTER_HEADER} is over {HEADER_MAX_BYTES} bytes")
    try:
        return msgspec.json.decode(value, type=AdapterRef)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InvalidField(str(error), param=ADAPTER_HEADER) from error


def _is_many(prompt: bytes) -> bool:
    """Whether the `prompt` of a completion is several: a list of more than one string or list of tokens."""
    if not prompt.startswith(b"["):
        return False
    items = msgspec.json.decode(prompt, type=list[msgspec.Raw])
    return len(items) > 1 and bytes(items[0])[:1] in (b'"', b"[")


async def _read_body(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise EngineBusy("the client went away")
        chunk: bytes = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if size > BODY_MAX_BYTES:
            raise TooLarge(f"the body is over {BODY_MAX_BYTES} bytes")
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _unless_gone(work: Awaitable[Any], receive: Receive) -> Any:
    """The result of `work`; None, and `work` cancelled, when the client goes away first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _answer(send: Send, status: int, body: bytes, content_type: str) -> None:
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
