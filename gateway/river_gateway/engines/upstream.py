"""Asking an engine: choosing one, and others before the first byte if it does not answer or takes long."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from river_engine.protocol import (
    ADAPTER_HEADER,
    ADAPTER_LOADING,
    FINAL_USAGE_PATH,
    MODEL_HEADER,
    TENANT_HEADER,
    EngineError,
    StreamUsage,
)
from river_gateway.engines.fleet import Fleet
from river_gateway.engines.fleet_metrics import FleetMetrics
from river_gateway.engines.hedging import first_answer
from river_gateway.engines.http_client import (
    EngineClient,
    EngineLostError,
    EngineUnreachableError,
)
from river_gateway.engines.refusals import refused_by_engine
from river_gateway.engines.routing import Question
from river_gateway.errors import (
    PrunedError,
    RateLimitedError,
    StillLoadingError,
    UnavailableError,
    UnloadableError,
)
from river_gateway.limits import (
    HEDGES_SHARE_MAX,
    RETRY_AFTER_MAX_S,
    RETRY_AFTER_S,
    UPSTREAM_ATTEMPTS,
    UPSTREAM_CONCURRENT_MAX,
    UPSTREAM_FINAL_USAGE_S,
    UPSTREAM_FIRST_BYTE_S,
    UPSTREAM_LOSSES_MAX,
)

if TYPE_CHECKING:
    from river_engine.protocol import EngineRecord
    from river_gateway.engines.fleet import Visit
    from river_gateway.engines.http_client import EngineAnswer, Header
    from river_gateway.engines.registry import Engines
    from river_gateway.inference.models import Target
    from river_gateway.telemetry import Telemetry

logger = logging.getLogger("river.gateway")

_TENANT, _ADAPTER, _MODEL = TENANT_HEADER.encode(), ADAPTER_HEADER.encode(), MODEL_HEADER.encode()

# By the type of an engine's own refusals; vLLM's own 404, of a model, has another.
_ADAPTER_REFUSALS = {"not_found": PrunedError, "invalid_adapter": UnloadableError}

ResultType = TypeVar("ResultType")


@dataclass(slots=True)
class Opened:
    """An engine's answer whose head has been read. `close` it, or the engine goes on working."""

    answer: EngineAnswer
    engine: EngineRecord
    _visit: Visit

    async def read(self) -> bytes:
        """The whole answer; the request is over then.

        Raises:
            UnavailableError: the engine breaks off.
        """
        try:
            return await self.answer.read()
        except EngineLostError:
            raise UnavailableError("the engine was lost in the middle of the answer") from None
        finally:
            self.close()

    def close(self) -> None:
        """Ends the request: the connection of an answer not read to its end is cut, which cancels the engine's work."""
        self.answer.close()
        self._visit.close()


@dataclass(slots=True)
class _Tries:
    """What has been tried for one request: engines to leave out, and why they did not answer."""

    excluded: set[str] = field(default_factory=set[str])
    losses: int = 0
    retry_after_s: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request as engines get it, and what has come of it."""

    question: Question
    path: str
    headers: list[Header]
    body: bytes
    tokens: int
    tries: _Tries = field(default_factory=_Tries)


class Upstream:
    """The engines as HTTP servers.

    A request for which that is allowed goes to a second engine as well when the first has not begun to answer after
    `hedge_after_s`; never if that is 0.
    """

    def __init__(
        self, engines: Engines, telemetry: Telemetry, *, token: str, hedge_after_s: float = 0.0
    ) -> None:
        self.fleet = Fleet(engines)
        telemetry.registry.register(FleetMetrics(self.fleet))
        self._telemetry = telemetry
        self._client = EngineClient(engines.lost_of)
        self._hedge_after_s = hedge_after_s
        self._hedges = 0
        self.authorize(token)

    def authorize(self, token: str) -> None:
        """Requests bring this token from now on."""
        self._authorization = (b"authorization", f"Bearer {token}".encode())

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.close()

    async def open(
        self,
        path: str,
        body: bytes,
        *,
        target: Target,
        tenant_id: str,
        request_id: str,
        content_type: str,
        model_name: str | None = None,
        affinity: bytes = b"",
        tokens: int = 0,
        may_hedge: bool = False,
    ) -> Opened:
        """Posts to an engine of the target's base model and returns its answer once that is a success and has begun.

        Requests with the same `affinity` may share cached blocks; `tokens` is about how much work this one is. Engines
        that cannot be reached, are full, or take nothing new are replaced by others. One that breaks off may have been
        killed by the request, so that is tried again a few times only. One that `may_hedge` may be asked twice.

        Raises:
            EngineRefusedError: the engine found fault with the request.
            RateLimitedError: all engines are full, or too many requests are outstanding here.
            StillLoadingError: the engine has not loaded the target's adapter in time.
            UnloadableError: the engine cannot load the target's adapter.
            UnavailableError: no engine answers.
        """
        if self.fleet.visits >= UPSTREAM_CONCURRENT_MAX:
            raise RateLimitedError("too many requests are in progress", retry_after_s=RETRY_AFTER_S)
        headers = [
            self._authorization,
            (b"content-type", content_type.encode()),
            (b"x-request-id", request_id.encode()),
            (_TENANT, tenant_id.encode()),
        ]
        if target.adapter is not None:
            headers.append((_ADAPTER, msgspec.json.encode(target.adapter)))
        if model_name is not None:
            headers.append((_MODEL, model_name.encode()))
        question = Question(
            target.base_model, target.adapter.name if target.adapter else None, affinity
        )
        asked = _Asked(question, path, headers, body, tokens)
        if not (may_hedge and self._hedge_after_s):
            return await self._ask(asked)
        return await first_answer(
            self._ask(asked),
            lambda: self._ask_second(asked),
            after_s=self._hedge_after_s,
            discard=Opened.close,
        )

    async def final_usage(self, engine: EngineRecord, request_id: str) -> StreamUsage | None:
        """What a request to an engine had used when it ended, which was cut off; None if the engine cannot say."""
        headers = [self._authorization, (b"content-type", b"text/plain")]
        try:
            async with asyncio.timeout(UPSTREAM_FINAL_USAGE_S):
                answer = await self._client.post(
                    engine.url, FINAL_USAGE_PATH, headers, request_id.encode()
                )
                try:
                    body = await answer.read()
                finally:
                    answer.close()
            if answer.status == HTTPStatus.OK:
                return msgspec.json.decode(body, type=StreamUsage)
        except (EngineLostError, TimeoutError, msgspec.DecodeError) as error:
            logger.warning("engine %s does not say what was used: %s", engine.engine_id, error)
        return None

    async def _ask(self, asked: _Asked) -> Opened:
        """The answer of the first engine that gives one."""
        question, tries = asked.question, asked.tries
        while len(tries.excluded) < UPSTREAM_ATTEMPTS and tries.losses < UPSTREAM_LOSSES_MAX:
            engine = self.fleet.choose(question, tries.excluded)
            if engine is None:
                break
            if tries.excluded:
                self._telemetry.retries.inc()
            tries.excluded.add(engine.engine_id)
            opened = await self._attempt(engine, asked)
            if opened is not None:
                return opened
        if tries.retry_after_s:
            raise RateLimitedError("all engines are busy", retry_after_s=min(tries.retry_after_s))
        raise UnavailableError(
            f"no engine of {question.base_model!r} answers at the moment; try again"
        )

    async def _ask_second(self, asked: _Asked) -> Opened | None:
        """The answer of one engine more, if there is one that could give it and not too many are asked so already."""
        if self._hedges >= max(1, HEDGES_SHARE_MAX * self.fleet.visits):
            return None
        engine = self.fleet.choose_second(asked.question, asked.tries.excluded)
        if engine is None:
            return None
        asked.tries.excluded.add(engine.engine_id)
        self._telemetry.hedges.inc()
        self._hedges += 1
        try:
            return await self._attempt(engine, asked)
        finally:
            self._hedges -= 1

    async def _attempt(self, engine: EngineRecord, asked: _Asked) -> Opened | None:
        """One engine's successful answer, or None when another should be asked."""
        engine_id, adapter = engine.engine_id, asked.question.adapter
        visit = self.fleet.visit(engine_id, asked.tokens)
        answer: EngineAnswer | None = None
        opened: Opened | None = None
        try:
            answer = await self._client.post(engine.url, asked.path, asked.headers, asked.body)
            if answer.status == HTTPStatus.OK:
                await answer.begun(UPSTREAM_FIRST_BYTE_S)
                self.fleet.succeeded(engine_id)
                opened = Opened(answer, engine, visit)
            else:
                await self._learn(answer, engine_id, asked)
        except EngineLostError as error:
            logger.warning("engine %s is lost: %s", engine_id, error)
            self.fleet.failed(engine_id, adapter)
            asked.tries.losses += not isinstance(error, EngineUnreachableError)
        finally:
            if opened is None:
                if answer is not None:
                    answer.close()
                visit.close()
        return opened

    async def _learn(self, answer: EngineAnswer, engine_id: str, asked: _Asked) -> None:
        """What an answer that is no success means: returns if another engine should be asked, else raises."""
        status = answer.status
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            refusal = _parse_refusal(await answer.read())
            if refusal.type == ADAPTER_LOADING:
                # Another engine would have to begin it anew.
                self.fleet.succeeded(engine_id)
                raise StillLoadingError(refusal.message, retry_after_s=_retry_after_s(answer))
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self.fleet.failed(engine_id, asked.question.adapter)
        else:
            self.fleet.succeeded(engine_id)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            logger.warning("engine %s takes no requests", engine_id)
        elif status == HTTPStatus.TOO_MANY_REQUESTS:
            asked.tries.retry_after_s.append(_retry_after_s(answer))
        else:
            await _raise_refusal(answer)


def _retry_after_s(answer: EngineAnswer) -> float:
    """What a full engine says of when to come back."""
    try:
        seconds = float(answer.headers.get(b"retry-after", b""))
    except ValueError:
        return RETRY_AFTER_S
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_S)


async def _raise_refusal(answer: EngineAnswer) -> None:
    """Turns an engine's error answer into ours. What is not the request's fault never shows the engine's words."""
    body = await answer.read()
    refusal = _parse_refusal(body)
    status = answer.status
    logger.info("engine answered %d", status)
    own_fault = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    if own_fault or not HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
        raise UnavailableError("the engine failed; try again")
    if refusal.type in _ADAPTER_REFUSALS:
        logger.error("an engine cannot load an adapter: %s", refusal.message)
        raise _ADAPTER_REFUSALS[refusal.type]
    raise refused_by_engine(status, refusal)


def _parse_refusal(body: bytes) -> EngineError:
    """The error of an engine, in vLLM's shape (JSON) or in that of our own routes (msgpack)."""
    fallback = EngineError(type="invalid_request", message="the engine refused the request")
    try:
        if body[:1] == b"{":
            parsed = msgspec.json.decode(body, type=dict[str, Any])
        else:
            parsed = msgspec.msgpack.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return fallback
    inner = parsed.get("error", parsed)
    if not isinstance(inner, dict):
        return fallback
    fields = cast("dict[str, Any]", inner)
    param = fields.get("param")
    return EngineError(
        type=str(fields.get("type") or fallback.type),
        message=str(fields.get("message") or fallback.message),
        param=param if isinstance(param, str) else None,
    )
