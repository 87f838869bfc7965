"""A stub gateway and clients of it; and the real gateway, where what matters is how the two agree."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.gateway import Rig, running_rig
from support.stub_gateway import KEY, StubGateway

import river_client as river
from river_ops.embedded.nats import EmbeddedNats


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither variables nor a stored login of whoever runs the tests."""
    monkeypatch.delenv("RIVER_API_KEY", raising=False)
    monkeypatch.delenv("RIVER_BASE_URL", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def gateway() -> Iterator[StubGateway]:
    """A running stub gateway."""
    stub = StubGateway()
    stub.start()
    yield stub
    stub.stop()


@pytest.fixture
def client(gateway: StubGateway) -> Iterator[river.Client]:
    """A client of the stub gateway."""
    with river.Client(api_key=KEY, base_url=gateway.base_url) as opened:
        yield opened


@pytest.fixture
def model(client: river.Client) -> Iterator[river.Model]:
    """A model in a session."""
    with client.session(purpose="test") as session:
        yield session.create_model("base", lora=river.LoraConfig(rank=4))


@pytest_asyncio.fixture
async def rig(postgres_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    """The real gateway with stand-in engines and a stand-in trainer, on servers of its own."""
    server = EmbeddedNats(tmp_path / "nats", durable=False)
    server.start()
    try:
        async with running_rig(postgres_url, server.url(), tmp_path) as running:
            yield running
    finally:
        server.stop()


@pytest_asyncio.fixture
async def river_client(rig: Rig) -> AsyncIterator[river.AsyncClient]:
    """A client of the real gateway."""
    async with river.AsyncClient(
        api_key=rig.tenant.secret, base_url=rig.url, retry_for_s=2.0
    ) as opened:
        yield opened
