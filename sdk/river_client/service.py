"""What every River process does at its start: read its settings, answer health checks.

Standard library and msgspec only.
It lives in the SDK because that is the one package all others may import.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec

SETTING_PREFIX = "RIVER_"
REQUEST_MAX_BYTES = 8192
REQUEST_TIMEOUT_S = 5.0

SettingsType = TypeVar("SettingsType", bound=msgspec.Struct)


class SettingsError(ValueError):
    """A `RIVER_*` variable is missing or wrong; the message is one line and names it."""


def read_settings(
    kind: type[SettingsType], environ: Mapping[str, str] | None = None
) -> SettingsType:
    """The settings struct `kind` from the environment: field `nats_url` is `RIVER_NATS_URL`.

    Raises:
        SettingsError: a variable is missing or has a value of the wrong type.
    """
    source = os.environ if environ is None else environ
    values: dict[str, str] = {}
    for name in kind.__struct_fields__:
        value = source.get(variable(name), "")
        if value:
            values[name] = value
    for field in msgspec.structs.fields(kind):
        if field.required and field.name not in values:
            raise SettingsError(f"{variable(field.name)} is not set")
        if field.name in values:
            try:
                msgspec.convert(values[field.name], type=field.type, strict=False)
            except msgspec.ValidationError as error:
                message = f"{variable(field.name)}={values[field.name]!r}: {error}"
                raise SettingsError(message) from error
    return msgspec.convert(values, type=kind, strict=False)


def variable(field_name: str) -> str:
    """The environment variable of a settings field."""
    return SETTING_PREFIX + field_name.upper()


@asynccontextmanager
async def health_server(
    port: int,
    *,
    ready: Callable[[], bool],
    metrics: Callable[[], bytes],
    host: str = "127.0.0.1",
) -> AsyncGenerator[int]:
    """Answers GET `/healthz`, `/readyz` and `/metrics` while the block runs; yields the port (0 asks for a free one).

    For processes that serve nothing else over HTTP.
    """

    def answer(path: str) -> tuple[str, bytes]:
        if path == "/healthz":
            return "200 OK", b"ok\n"
        if path == "/readyz":
            return ("200 OK", b"ready\n") if ready() else ("503 Service Unavailable", b"starting\n")
        if path == "/metrics":
            return "200 OK", metrics()
        return "404 Not Found", b"not found\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode("latin-1").partition("?")[0]
                status, body = answer(path)
                writer.write(
                    f"HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4\r\n"
                    f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (
            TimeoutError,
            OSError,
            IndexError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
        ):
            pass  # A broken or slow probe is the prober's affair.
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, port, limit=REQUEST_MAX_BYTES)
    async with server:
        yield server.sockets[0].getsockname()[1]
