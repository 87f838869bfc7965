"""The engine's door: one ASGI application around vLLM's own.

* A token for everything but the health checks and the metrics.
* `POST /river/sample`, answered here, and `POST /river/usage`: what a request has used that was cut off.
* vLLM's OpenAI routes: a request that makes vLLM compute waits for its turn first, as one of the tenant in
  `x-river-tenant`. The adapter of `x-river-adapter` is held until its end, streaming included. The body's `model` is
  always replaced, by that adapter or by the base model: nobody reaches an adapter by guessing its name. Answers show
  the name of `x-river-model`.

vLLM finds adapters by name in `lora_requests`, and lists them on `/v1/models`; here each request sees its own and
nothing else, by a context variable.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from vllm.lora.request import LoRARequest

from river_engine.adapters import AdapterStore
from river_engine.costs import generates, is_many, turn_of_body
from river_engine.counting import many_prompts
from river_engine.errors import (
    EngineBusy,
    EngineRefusal,
    InvalidField,
    TooLarge,
    Unauthorized,
)
from river_engine.final_counts import FinalCounts
from river_engine.limits import BODY_MAX_BYTES, HEADER_MAX_BYTES, TENANT_MAX_CHARACTERS
from river_engine.protocol import (
    ADAPTER_HEADER,
    FINAL_USAGE_PATH,
    MODEL_HEADER,
    TENANT_HEADER,
    AdapterRef,
    EngineSample,
)
from river_engine.sampling import Sampler
from river_engine.stream_usage import ANNOTATED_PATHS, annotated
from river_engine.turns import Turnstile

T = TypeVar("T")
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
        turnstile: Turnstile,
        sampler: Sampler,
        *,
        token: str,
        base_model: str,
        context_length: int,
        alive: Callable[[], bool],
    ) -> None:
        self._inner = inner
        self._store = store
        self._turnstile = turnstile
        self._sampler = sampler
        self._credentials = f"Bearer {token}".encode()
        self._base_model = base_model
        self._context_length = context_length
        self._alive = alive
        self._final_counts = FinalCounts()
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
                status, body = self._health(ready=path == "/readyz")
                await _answer(send, status, body, "text/plain")
            elif path == "/metrics":
                await _answer(send, 200, generate_latest(), CONTENT_TYPE_LATEST)
            elif path == "/river/sample":
                await self._sample(scope, receive, send)
            elif path == FINAL_USAGE_PATH:
                await self._final_usage(receive, send)
            elif scope["method"] == "POST":
                await self._openai(headers, scope, receive, send)
            else:
                await self._inner(scope, receive, send)
        except EngineRefusal as error:
            await _refuse(send, error, msgspec.json.encode(error.body()), "application/json")

    def _health(self, *, ready: bool) -> tuple[int, bytes]:
        if not self._alive():
            return 503, b"engine dead\n"
        if ready and self._turnstile.draining:
            return 503, b"draining\n"
        return 200, b"ok\n"

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
            await _refuse(send, error, msgspec.msgpack.encode(error.body()), _MSGPACK)
            return
        await _answer(send, 200, msgspec.msgpack.encode(result), _MSGPACK)

    async def _final_usage(self, receive: Receive, send: Send) -> None:
        request_id = (await _read_body(receive)).decode("latin-1")
        usage = await self._final_counts.of(request_id)
        if usage is None:
            await _answer(send, 404, b"unknown, or not at its end", "text/plain")
            return
        await _answer(send, 200, msgspec.json.encode(usage), "application/json")

    async def _openai(
        self, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        reference = _adapter_reference(headers)
        public = headers.get(MODEL_HEADER.encode())
        body = await _read_body(receive)
        fields = _object_fields(body)
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        async with AsyncExitStack() as stack:
            # The first to be entered is the last to end: then vLLM has let go of the request.
            stack.enter_context(self._final_counts.kept(request_id))
            stack.enter_context(_set(_public_model, public.decode() if public else None))
            lora = await self._turn(headers, scope["path"], body, fields, reference, receive, stack)
            stack.enter_context(_set(_adapter, lora))
            model = self._base_model if lora is None else lora.lora_name
            if fields and (tenant := _tenant(headers)):
                # Nobody shall find out by the cached tokens of an answer what another tenant has asked.
                fields["cache_salt"] = msgspec.Raw(msgspec.json.encode(tenant))
            await self._pass_on(body, fields, model, scope, receive, send)

    async def _turn(
        self,
        headers: dict[bytes, bytes],
        path: str,
        body: bytes,
        fields: dict[str, msgspec.Raw],
        reference: AdapterRef | None,
        receive: Receive,
        stack: AsyncExitStack,
    ) -> LoRARequest | None:
        """Waits until vLLM may have the request, as long as its client does; `stack` keeps what it has got."""
        turn = turn_of_body(
            fields,
            len(body),
            tenant=_tenant(headers),
            version=None if reference is None else reference.name,
            context_length=self._context_length,
        )
        computes = generates(path)
        ready = reference is None or self._store.is_here(reference)
        if computes:
            stack.enter_context(self._turnstile.joined([turn], ready=ready))
        version = None
        if reference is not None:
            holding = stack.enter_async_context(self._store.hold(reference))
            # To watch the client costs more than all the rest of a request that need not wait.
            version = await (holding if ready else _unless_gone(holding, receive))
        if not computes:
            return None if version is None else version.request
        if not ready:
            self._turnstile.fetched([turn])
        if not turn.inside:
            await _unless_gone(self._turnstile.called(turn), receive)
        return await stack.enter_async_context(self._turnstile.inside(turn, version))

    async def _pass_on(
        self,
        body: bytes,
        fields: dict[str, msgspec.Raw],
        model: str,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Calls vLLM with `model` in the body; one that is not an object names no model on any of its routes."""
        if fields:
            body = msgspec.json.encode(fields | {"model": model})
            many_prompts.set(is_many(bytes(fields.get("prompt", b"null"))))
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


@contextlib.contextmanager
def _set(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _object_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a body; none if it is not an object, for which vLLM's own errors are the better ones."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.ValidationError, msgspec.DecodeError):
        return {}


def _tenant(headers: dict[bytes, bytes]) -> str:
    """Whose turn the request takes: all that come without a name are one tenant."""
    value = headers.get(TENANT_HEADER.encode(), b"")
    if len(value) > TENANT_MAX_CHARACTERS:
        raise TooLarge(f"{TENANT_HEADER} is over {TENANT_MAX_CHARACTERS} bytes")
    return value.decode("latin-1")


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


async def _unless_gone(work: Awaitable[T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client goes away first.

    Raises:
        EngineBusy: it did.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise EngineBusy("the client went away")
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _refuse(send: Send, error: EngineRefusal, body: bytes, content_type: str) -> None:
    retry = (
        [] if error.retry_after_s is None else [(b"retry-after", str(error.retry_after_s).encode())]
    )
    await _answer(send, error.status, body, content_type, retry)


async def _answer(
    send: Send,
    status: int,
    body: bytes,
    content_type: str,
    more_headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(body)).encode()),
        *more_headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
