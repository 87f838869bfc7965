"""Settings from the environment, and the health endpoints of processes without another server."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import msgspec
import pytest

from river_client.service import SettingsError, health_server, read_settings


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    nats_url: str
    port: int = 7
    ratio: float | None = None


def test_settings_come_by_name_with_their_types() -> None:
    """Each field is the variable of its name; an empty variable counts as none."""
    read = read_settings(
        Settings, {"RIVER_NATS_URL": "nats://x", "RIVER_RATIO": "0.5", "RIVER_PORT": ""}
    )
    assert read == Settings(nats_url="nats://x", port=7, ratio=0.5)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "RIVER_NATS_URL is not set"),
        ({"RIVER_NATS_URL": "x", "RIVER_PORT": "many"}, "RIVER_PORT='many'"),
    ],
    ids=["missing", "wrong type"],
)
def test_a_wrong_setting_is_named(environment: dict[str, str], message: str) -> None:
    """The error is one line with the variable in it."""
    with pytest.raises(SettingsError, match=message) as refused:
        read_settings(Settings, environment)
    assert "\n" not in str(refused.value)


async def test_health_endpoints_answer() -> None:
    """Alive at once, ready when the process says so, metrics as they are rendered, 404 for the rest."""
    ready = False
    async with (
        health_server(0, ready=lambda: ready, metrics=lambda: b"tokens 1\n") as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        ready = True
        assert (await client.get("/readyz?verbose")).status_code == 200
        assert (await client.get("/metrics")).text == "tokens 1\n"
        assert (await client.get("/etc/passwd")).status_code == 404


async def test_a_broken_probe_harms_nobody() -> None:
    """Bytes that are no request close that connection and nothing else."""
    async with health_server(0, ready=lambda: True, metrics=bytes) as port:
        for sent in (b"\r\n\r\n", b"x" * 20_000, b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            writer.write_eof()
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/healthz")).status_code == 200
