"""An engine that is killed, watched, and told of new adapters."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import nats
import pytest
from nats.js.errors import KeyNotFoundError, NotFoundError
from nats.js.kv import KeyValue

from river_billing.events import EVENTS_STREAM, TokensCounted, UsageKind, counts_subject
from river_billing.streams import decode, ensure_streams
from river_engine.adapters import AdapterStore
from river_engine.counting import tokens_total
from river_engine.protocol import (
    ENGINES_BUCKET,
    HEARTBEAT_INTERVAL_S,
    AdapterRef,
    EngineRecord,
    publish_subject,
)
from river_engine.registration import registered

from .conftest import BASE_MODEL, RunningEngine, running_engine
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
    """The record is there while the engine is, and taken away when it leaves; its last word says what it produced."""
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
        await ensure_streams(client.jetstream())
        tokens_total.labels(kind="completion").inc(100)  # from before
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
            tokens_total.labels(kind="completion").inc(7)
        assert bucket is not None
        assert await engine_record(bucket, "eng-brief") is None
        said = await client.jetstream().get_last_msg(EVENTS_STREAM, counts_subject("eng-brief"))
        (counted,) = decode(said.data or b"")
        assert isinstance(counted, TokensCounted)
        assert counted.final
        assert counted.tokens[UsageKind.COMPLETION] == 7
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


@dataclass
class Stream:
    """A completion read in a thread: its text so far, and whether it came to its end."""

    pieces: list[str] = field(default_factory=list[str])
    whole: bool = False

    def read(self, engine: RunningEngine, body: dict[str, object]) -> None:
        try:
            with engine.client.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    self.whole = line == "data: [DONE]" or self.whole
                    if line.startswith("data: {"):
                        self.pieces.append(line)
        except httpx.TransportError:
            assert not self.whole


LONG: dict[str, object] = {
    "prompt": [5, 6, 7],
    "max_tokens": 900,
    "ignore_eos": True,
    "stream": True,
}


async def test_an_engine_that_is_told_to_stop_ends_what_it_has_begun(
    tiny_moe: Path, nats_url: str, tmp_path: Path
) -> None:
    """It says so at once, refuses what is new, and leaves when its streams are through."""
    client = await nats.connect(nats_url)
    try:
        with running_engine(
            tiny_moe, nats_url, tmp_path, RIVER_ENGINE_ID="eng-drain", RIVER_DRAIN_S="60"
        ) as engine:
            streams = [Stream() for _ in range(8)]
            with ThreadPoolExecutor(len(streams)) as pool:
                for stream in streams:
                    pool.submit(stream.read, engine, LONG)
                await eventually(lambda: all(stream.pieces for stream in streams))
                engine.process.terminate()
                bucket = await client.jetstream().key_value(ENGINES_BUCKET)

                async def says_so() -> bool:
                    record = await engine_record(bucket, "eng-drain")
                    assert record is not None
                    if record.draining:
                        assert record.running == len(streams)
                        assert record.outstanding_tokens > 0
                    return record.draining

                asked_at = time.monotonic()
                await eventually(says_so)
                assert time.monotonic() - asked_at < HEARTBEAT_INTERVAL_S, (
                    "not only at the next heartbeat"
                )
                assert engine.client.get("/readyz").status_code == 503
                assert engine.client.get("/healthz").status_code == 200
                refusal = engine.client.post("/v1/completions", json={"prompt": "a"})
                assert (refusal.status_code, refusal.json()["type"]) == (503, "draining")
                assert refusal.headers["retry-after"]
                assert engine.refusal(prompts=["a"])[1].type == "draining"
                assert not any(stream.whole for stream in streams)
            assert all(stream.whole for stream in streams)
            assert all('"finish_reason":"length"' in stream.pieces[-1] for stream in streams)
            assert engine.process.wait(timeout=WITHIN_S) == 0
        assert await engine_record(bucket, "eng-drain") is None
    finally:
        await client.close()


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["bound", "second signal"])
def test_draining_comes_to_an_end(tiny_moe: Path, tmp_path: Path, *, again: bool) -> None:
    """After its bound, or when told a second time, what still runs is cut off."""
    drain_s = "60" if again else "0.3"
    with running_engine(tiny_moe, "", tmp_path, RIVER_DRAIN_S=drain_s) as engine:
        stream = Stream()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(stream.read, engine, LONG | {"n": 16})
            deadline = time.monotonic() + WITHIN_S
            while not stream.pieces:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            engine.process.terminate()
            if again:
                time.sleep(0.3)
                engine.process.terminate()
            assert engine.process.wait(timeout=WITHIN_S) == 0
        assert not stream.whole
