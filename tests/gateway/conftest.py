"""A running gateway for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from support.gateway import Rig, running_rig


@pytest_asyncio.fixture
async def rig(postgres_url: str, nats_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    """The gateway with two engines, a trainer and two tenants."""
    async with running_rig(postgres_url, nats_url, tmp_path) as running:
        yield running
