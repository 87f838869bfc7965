"""The lease on a base model, on a real nats-server."""

# What is waited for happens in another task, and only NATS tells.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from nats.aio.client import Client
from nats.js.errors import KeyNotFoundError

from river_engine.protocol import subject_token
from river_trainer import journal
from river_trainer.errors import LeaseLostError
from river_trainer.lease import Lease

WAIT_S = 30.0


@pytest.fixture
async def client(nats_url: str) -> AsyncIterator[Client]:
    client = await journal.connect(nats_url)
    await journal.ensure_streams(client.jetstream())
    yield client
    await client.close()


async def test_the_next_in_line_waits_for_the_release(client: Client) -> None:
    """A second holder gets the lease once the first lets go, and another base's at once."""
    first, second = Lease(client, "lease/a", "one"), Lease(client, "lease/a", "two")
    await first.take()
    await Lease(client, "lease/other", "two").take()
    waiting = asyncio.create_task(second.take())
    await first.take()
    assert not waiting.done()
    await second.release()  # of what it does not have
    await first.release()
    async with asyncio.timeout(WAIT_S):
        await waiting
        with pytest.raises(LeaseLostError):
            await first.keep()
    await second.release()


async def test_a_lease_that_nobody_renews_fades(client: Client) -> None:
    """A killed holder blocks its successor for a while only."""
    await Lease(client, "lease/killed", "one").take()
    async with asyncio.timeout(WAIT_S):
        await Lease(client, "lease/killed", "two").take()


async def test_a_faded_lease_is_taken_again(client: Client) -> None:
    """A holder whose lease is gone, but to nobody, goes on."""
    lease = Lease(client, "lease/faded", "one")
    await lease.take()
    bucket = await journal.leases_bucket(client.jetstream())
    await bucket.purge(subject_token("lease/faded"))
    with pytest.raises(KeyNotFoundError):
        await bucket.get(subject_token("lease/faded"))
    keeping = asyncio.create_task(lease.keep())
    async with asyncio.timeout(WAIT_S):
        while not await _held(client, "lease/faded", b"one"):
            await asyncio.sleep(0.02)
    assert not keeping.done()
    keeping.cancel()


async def _held(client: Client, base_model: str, holder: bytes) -> bool:
    bucket = await journal.leases_bucket(client.jetstream())
    try:
        return (await bucket.get(subject_token(base_model))).value == holder
    except KeyNotFoundError:
        return False
