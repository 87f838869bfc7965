"""The gateway of `tests/gateway`, spoken to in other dialects."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from support.gateway import Rig
from support.river_dialect import RiverDialect, dialect_of


@pytest_asyncio.fixture
async def river(rig: Rig) -> AsyncIterator[RiverDialect]:
    """A client of the River dialect with the tenant's key."""
    async with dialect_of(rig) as client:
        yield client
