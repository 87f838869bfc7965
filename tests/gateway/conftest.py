"""A running gateway for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.gateway import Rig, running_rig

from river_ops.embedded.nats import EmbeddedNats


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the gateway's own: its tests empty streams that other tests fill."""
    server = EmbeddedNats(tmp_path_factory.mktemp("gateway-nats"), durable=False)
    server.start()
    try:
        yield server.url()
    finally:
        server.stop()


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[EmbeddedNats]:
    """A nats-server that a test may stop and start."""
    server = EmbeddedNats(tmp_path / "nats", durable=False)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest_asyncio.fixture
async def rig(postgres_url: str, nats_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    """The gateway with two engines, a trainer and two tenants."""
    async with running_rig(postgres_url, nats_url, tmp_path) as running:
        yield running
