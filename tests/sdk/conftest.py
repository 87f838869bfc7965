"""A stub gateway and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stub_gateway import KEY, StubGateway

import river_client as river


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
