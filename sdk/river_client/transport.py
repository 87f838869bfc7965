"""HTTP to the gateway: encoding, retries, and errors as exceptions.

A request that may have been lost is sent again, unchanged, so what it makes has an identity: a run, a session and an
operation are made once however often they are asked for. Samples and chat are drawn, and billed, anew.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from river_client import exceptions, limits, wire
from river_client.settings import Login, resolve_login

if TYPE_CHECKING:
    import httpx

MSGPACK = "application/msgpack"
JSON = "application/json"
IDEMPOTENCY_HEADER = "idempotency-key"

Answer = TypeVar("Answer")

_RETRIED = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class EarlyAnswer(Generic[Answer]):
    """An accepted request whose body is to come; None in its place if it gets lost on the way."""

    location: str
    body: asyncio.Task[Answer | None]


class Transport:
    """The connections to one gateway; belongs to the event loop that first uses it.

    Pickled, it is the gateway's address and no key: where it is unpickled, the key comes from there (`resolve_login`).
    """

    def __init__(self, login: Login, *, retry_for_s: float) -> None:
        self.login = login
        self._retry_for_s = retry_for_s
        self._opened: httpx.AsyncClient | None = None
        self._reached = False  # whether the server ever answered
        self._early: set[asyncio.Task[Any]] = set()

    def __reduce__(self) -> tuple[Callable[[str, float], Transport], tuple[str, float]]:
        return reopened_transport, (self.login.base_url, self._retry_for_s)

    async def call(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        *,
        body: msgspec.Struct | bytes | None = None,
        params: Mapping[str, str] | None = None,
        timeout_s: float = limits.REQUEST_TIMEOUT_S,
    ) -> Answer:
        """One request to `/river/v1` and its decoded answer. A body of bytes is msgpack already.

        Raises:
            RiverError: see its tree.
        """
        content = msgspec.msgpack.encode(body) if isinstance(body, msgspec.Struct) else body
        response = await self.send(
            method,
            wire.API_PREFIX + path,
            content=content,
            headers={"content-type": MSGPACK, "accept": MSGPACK},
            params=params,
            timeout_s=timeout_s,
        )
        return _decoded(response, answer, f"{method} {path}")

    async def call_early(
        self, method: str, path: str, answer: type[Answer], *, body: bytes, wait_s: float
    ) -> Answer | EarlyAnswer[Answer]:
        """`call`, but the server is asked to wait up to `wait_s` with the body, once it has accepted the request.

        It is not while `EARLY_ANSWERS_MAX` bodies are to come, since each holds a connection; nor does every server do
        it. Then this is `call`.
        """
        headers = {"content-type": MSGPACK, "accept": MSGPACK}
        if len(self._early) < limits.EARLY_ANSWERS_MAX:
            headers["prefer"] = f"wait={wait_s:.0f}"
        response = await self.send(
            method,
            wire.API_PREFIX + path,
            content=body,
            headers=headers,
            timeout_s=limits.REQUEST_TIMEOUT_S + wait_s,
            early=True,
        )
        location = response.headers.get("location")
        if location is None:
            await self._read_early(response)
            return _decoded(response, answer, f"{method} {path}")
        reading = asyncio.create_task(self._rest_of(response, answer, f"{method} {path}"))
        self._early.add(reading)
        reading.add_done_callback(self._early.discard)
        return EarlyAnswer(location, reading)

    async def _rest_of(
        self, response: httpx.Response, answer: type[Answer], what: str
    ) -> Answer | None:
        try:
            await self._read_early(response)
            return _decoded(response, answer, what)
        except exceptions.RiverError:
            return None

    async def _read_early(self, response: httpx.Response) -> None:
        try:
            await response.aread()
        except _transport_error() as error:
            problem = _connection_error(self.login.base_url, error)
            problem.may_be_done = True
            raise problem from error
        finally:
            await response.aclose()

    async def upload(
        self,
        path: str,
        answer: type[Answer],
        *,
        files: Mapping[str, Path],
        params: Mapping[str, str],
    ) -> Answer:
        """Posts files as the fields of a form to `/river/v1`, as a stream; raises as `call` does, and OSError."""
        with ExitStack() as opened:
            fields = {
                field: (file.name, opened.enter_context(file.open("rb")))
                for field, file in files.items()
            }
            response = await self.send(
                "POST",
                wire.API_PREFIX + path,
                files=fields,
                headers={"accept": MSGPACK},
                params=params,
                timeout_s=limits.UPLOAD_TIMEOUT_S,
            )
        return _decoded(response, answer, f"POST {path}")

    async def tell(
        self,
        method: str,
        path: str,
        *,
        body: msgspec.Struct | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        """One request to `/river/v1` whose answer has nothing to say; raises as `call` does."""
        await self.send(
            method,
            wire.API_PREFIX + path,
            content=msgspec.msgpack.encode(body) if body is not None else None,
            headers={"content-type": MSGPACK, "accept": MSGPACK},
            params=params,
        )

    async def send(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        content: bytes | None = None,
        files: Mapping[str, tuple[str, IO[bytes]]] | None = None,
        params: Mapping[str, str] | None = None,
        timeout_s: float = limits.REQUEST_TIMEOUT_S,
        early: bool = False,
    ) -> httpx.Response:
        """The answer to one request, however many attempts it takes within the limits; raises as `call` does.

        `files` are sent as a form, each under its field with its name, and read as they are sent.
        If `early`, the body of a success is still to be read.
        """
        http = self._http()
        request = http.build_request(
            method,
            path,
            content=content,
            files=files,
            params=params,
            headers={IDEMPOTENCY_HEADER: str(uuid.uuid4()), **headers},
            timeout=_timeout(timeout_s),
        )
        started = time.monotonic()
        problem = exceptions.RiverError("no attempt was made")
        may_be_done = False
        for attempt in range(limits.ATTEMPTS_MAX):
            try:
                response = await http.send(request, stream=early)
                if not response.is_success:
                    await response.aread()
            except _transport_error() as error:
                problem = _connection_error(self.login.base_url, error)
                retry_for_s = self._retry_for_s
                if not self._reached:
                    retry_for_s = min(retry_for_s, limits.FIRST_CONTACT_PERIOD_S)
            else:
                self._reached = True
                if response.is_success:
                    return response
                problem = error_of(response)
                if response.status_code not in _RETRIED:
                    problem.may_be_done = may_be_done
                    raise problem
                retry_for_s = self._retry_for_s
            may_be_done = problem.may_be_done = True
            wait_s = _pause_s(attempt, problem)
            if time.monotonic() + wait_s - started > retry_for_s:
                break
            await asyncio.sleep(wait_s)
        raise problem

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        content: bytes | None = None,
        params: Mapping[str, str] | None = None,
        timeout_s: float = limits.REQUEST_TIMEOUT_S,
    ) -> AsyncGenerator[httpx.Response]:
        """An answer that is read piece by piece, without retries.

        Raises:
            RiverError: as `call` does, and ConnectionError for a stream that breaks.
        """
        http = self._http()
        try:
            async with http.stream(
                method,
                path,
                content=content,
                params=params,
                headers=dict(headers),
                timeout=_timeout(timeout_s),
            ) as response:
                self._reached = True
                if not response.is_success:
                    await response.aread()
                    raise error_of(response)
                yield response
        except _transport_error() as error:
            raise _connection_error(self.login.base_url, error) from error

    async def close(self) -> None:
        """Closes the connections."""
        for reading in self._early:
            reading.cancel()
        await asyncio.gather(*self._early, return_exceptions=True)
        if self._opened is not None:
            await self._opened.aclose()
            self._opened = None

    def _http(self) -> httpx.AsyncClient:
        if self._opened is None:
            import httpx  # noqa: PLC0415 - importing the SDK stays cheap

            self._opened = httpx.AsyncClient(
                base_url=self.login.base_url,
                headers={"authorization": f"Bearer {self.login.api_key}"},
                limits=httpx.Limits(max_connections=limits.CONNECTIONS_MAX),
            )
        return self._opened


def _decoded(response: httpx.Response, answer: type[Answer], what: str) -> Answer:
    try:
        return msgspec.msgpack.decode(response.content, type=answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"the answer to {what} is not what this SDK understands: {error}"
        problem = exceptions.ServerError(message, status=response.status_code)
        problem.may_be_done = True
        raise problem from error


# ---- Errors ------------------------------------------------------------------------------------------------------

_BY_STATUS: dict[int, type[exceptions.RiverError]] = {
    HTTPStatus.UNAUTHORIZED: exceptions.AuthenticationError,
    HTTPStatus.PAYMENT_REQUIRED: exceptions.OutOfCreditError,
    HTTPStatus.FORBIDDEN: exceptions.PermissionDeniedError,
    HTTPStatus.NOT_FOUND: exceptions.NotFoundError,
    HTTPStatus.TOO_MANY_REQUESTS: exceptions.RateLimitError,
}


def error_of(response: httpx.Response) -> exceptions.RiverError:
    """The exception for an answer that is an error, in River's shape, OpenAI's, or no shape at all."""
    status = response.status_code
    body = _error_body(response)
    details: dict[str, Any] = {
        "status": status,
        "type": body.type,
        "param": body.param,
        "request_id": body.request_id or response.headers.get("x-request-id"),
        "retry_after": _retry_after_s(response),
    }
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return exceptions.ServerError(body.message, **details)
    return _BY_STATUS.get(status, exceptions.InvalidRequestError)(body.message, **details)


class _LooseBody(msgspec.Struct):
    """An error as River and OpenAI write it."""

    message: str = ""
    type: str | None = None
    param: str | None = None
    request_id: str | None = None


class _LooseEnvelope(msgspec.Struct):
    error: _LooseBody


def _error_body(response: httpx.Response) -> _LooseBody:
    is_msgpack = "msgpack" in response.headers.get("content-type", "")
    decode = msgspec.msgpack.decode if is_msgpack else msgspec.json.decode
    try:
        return decode(response.content, type=_LooseEnvelope).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = response.content[: limits.ERROR_TEXT_MAX_CHARS].decode(errors="replace").strip()
        return _LooseBody(message=f"HTTP {response.status_code}: {text or response.reason_phrase}")


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _connection_error(base_url: str, error: Exception) -> exceptions.ConnectionError:
    reason = str(error) or type(error).__name__
    return exceptions.ConnectionError(f"cannot reach {base_url}: {reason}")


def _pause_s(attempt: int, problem: exceptions.RiverError) -> float:
    """How long to wait before the next attempt: twice as long each time, spread, and at least what the server asks."""
    backoff_s = min(limits.BACKOFF_MIN_S * 2**attempt, limits.BACKOFF_MAX_S)
    return max(problem.retry_after or 0.0, backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - nothing secret


def _transport_error() -> type[Exception]:
    import httpx  # noqa: PLC0415 - importing the SDK stays cheap

    return httpx.TransportError


def _timeout(timeout_s: float) -> httpx.Timeout:
    import httpx  # noqa: PLC0415 - importing the SDK stays cheap

    return httpx.Timeout(timeout_s, connect=limits.CONNECT_TIMEOUT_S)


def reopened_transport(base_url: str, retry_for_s: float) -> Transport:
    """New connections to a gateway, with the key that this process has for it.

    Raises:
        AuthenticationError: there is none.
    """
    return Transport(resolve_login(None, base_url), retry_for_s=retry_for_s)
