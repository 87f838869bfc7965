"""A database with prices, for the tests of billing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest_asyncio
from support.billing import database

from river_billing.prices import seed_prices


@pytest_asyncio.fixture
async def connection(postgres_url: str) -> AsyncGenerator[Any]:
    """A connection to a fresh database that has the price card."""
    async with database(postgres_url) as opened:
        await seed_prices(opened)
        yield opened
