"""An engine that is killed, watched, and told of new adapters."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import nats
import pytest
from nats.js.errors import KeyNotFoundError, NotFoundError
from nats.js.kv import KeyValue

from river_engine.adapters import AdapterStore
from river_engine.protocol import ENGINES_BUCKET, AdapterRef, EngineRecord, publish_subject
from river_engine.registration import registered

from .conftest import BASE_MODEL, RunningEngine
from .test_adapter_store import TARGETS, Vllm

WITHIN_S = 15.0


async def eventually(condition: Callable[[], object]) -> None:
    """Returns when `condition` (a function, possibly of a coroutine) is true."""
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        value = condition()
        if await value if asyncio.iscoroutine(value) else value:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not so within {WITHIN_S} s")


async def engine_record(bucket: KeyValue, engine_id: str) -> EngineRecord | None:
    try:
        entry = await bucket.get(engine_id)
    except KeyNotFoundError:
        return None
    return msgspec.msgpack.decode(entry.value or b"", type=EngineRecord)


def children_of(process_id: int) -> list[int]:
    path = Path(f"/proc/{process_id}/task/{process_id}/children")
    return [int(child) for child in path.read_text().split()]


async def test_the_engine_is_registered_and_preloads(
    engine: RunningEngine, nats_url: str, make_adapter: Callable[..., AdapterRef]
) -> None:
    """Its record says where and what it is, and an announced adapter is soon among the resident ones."""
    client = await nats.connect(nats_url)
    try:
        bucket = await client.jetstream().key_value(ENGINES_BUCKET)
        await eventually(lambda: engine_record(bucket, engine.engine_id))
        record = await engine_record(bucket, engine.engine_id)
        assert record is not None
        assert (record.url, record.base_model) == (engine.url, BASE_MODEL)
        assert (record.max_loras, record.context_length, record.vocab_size) == (3, 1024, 512)

        ref = make_adapter(seed=40)
        await client.publish(publish_subject(BASE_MODEL), msgspec.msgpack.encode(ref))

        async def resident() -> bool:
            current = await engine_record(bucket, engine.engine_id)
            return current is not None and ref.name in current.resident

        await eventually(resident)
    finally:
        await client.close()


async def test_registration_comes_and_goes(nats_url: str, tmp_path: Path) -> None:
    """The record is there while the engine is, and taken away when it leaves."""
    record = EngineRecord(
        engine_id="eng-brief",
        base_model="brief",
        url="http://127.0.0.1:1",
        context_length=1,
        vocab_size=1,
        max_loras=1,
        max_lora_rank=8,
        heartbeat_at=time.time(),
    )
    store = AdapterStore(Vllm(), tmp_path, TARGETS, max_loras=1, resident_max=1, rank_max=8)
    client = await nats.connect(nats_url)
    try:
        async with registered(nats_url, lambda: record, store):
            bucket = None

            async def there() -> bool:
                nonlocal bucket
                try:
                    bucket = await client.jetstream().key_value(ENGINES_BUCKET)
                except NotFoundError:
                    return False
                return await engine_record(bucket, "eng-brief") == record

            await eventually(there)
        assert bucket is not None
        assert await engine_record(bucket, "eng-brief") is None
    finally:
        await client.close()


async def test_an_engine_serves_without_nats(tmp_path: Path) -> None:
    """With nobody listening, registering neither fails nor holds anything up."""
    store = AdapterStore(Vllm(), tmp_path, TARGETS, max_loras=1, resident_max=1, rank_max=8)
    async with asyncio.timeout(WITHIN_S):
        async with registered(
            "nats://127.0.0.1:1", lambda: pytest.fail("no record was due"), store
        ):
            await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["server", "core"])
def test_a_killed_engine_comes_back_with_its_adapters(
    engine: RunningEngine, make_adapter: Callable[..., AdapterRef], victim: str
) -> None:
    """Whether the server or vLLM's core dies: all of it goes, a new one answers as the old one did."""
    ref = make_adapter(seed=50)
    fields = {"prompts": ["1+1="], "adapter": ref, "max_tokens": 6, "temperature": 0.0}
    before = engine.sample(**fields)
    (server,) = children_of(engine.process.pid)
    cores = children_of(server)
    assert cores
    os.kill(server if victim == "server" else cores[0], signal.SIGKILL)
    gone = time.monotonic() + WITHIN_S
    while any(Path(f"/proc/{process_id}").exists() for process_id in (server, *cores)):
        assert time.monotonic() < gone
        time.sleep(0.05)
    with pytest.raises(httpx.TransportError):
        engine.client.get("/readyz")

    engine.wait_ready()

    after = engine.sample(**fields)
    assert after.groups[0].samples[0].tokens == before.groups[0].samples[0].tokens
    assert children_of(engine.process.pid) != [server]
