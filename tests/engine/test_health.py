"""What an engine says of how it is, and what it does when an admin tells it to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import nats
from nats.aio.client import Client
from nats.js.kv import KeyValue
from prometheus_client import CollectorRegistry, Counter, Gauge

from river_engine.adapters import AdapterStore
from river_engine.admission import Admission
from river_engine.health import Health
from river_engine.limits import RATE_WINDOW_S
from river_engine.load_times import RecentLoads
from river_engine.problems import RecentProblems
from river_engine.protocol import (
    ENGINES_BUCKET,
    PROBLEM_CHARACTERS_MAX,
    PROBLEMS_TOLD_MAX,
    AdapterRef,
    Control,
    Controlled,
    EngineRecord,
    control_subject,
)

from .conftest import RunningEngine, running_engine
from .machine import bounds
from .test_adapter_store import TARGETS, Vllm
from .test_lifecycle import LONG, Stream, children_of, engine_record, eventually


def test_rates_are_those_of_the_last_seconds(tmp_path: Path) -> None:
    """Counters become tokens per second and a share of hits over a window; gauges are told as they are."""
    registry = CollectorRegistry()
    names = ("model_name", "engine")
    queries, hits, generated = (
        Counter(f"vllm:{name}", name, names, registry=registry).labels("m", "0")
        for name in ("prefix_cache_queries", "prefix_cache_hits", "generation_tokens")
    )
    Gauge("vllm:kv_cache_usage_perc", "used", names, registry=registry).labels("m", "0").set(0.25)
    running = Gauge("vllm:num_requests_running", "now", names, registry=registry).labels("m", "0")
    store = AdapterStore(Vllm(), tmp_path, TARGETS, max_loras=1, resident_max=1, rank_max=8)
    now = 100.0
    health = Health(
        registry,
        Admission(bounds()),
        store,
        RecentProblems(),
        batch_max=16,
        ends=2,
        clock=lambda: now,
    )
    first = health.now()
    assert (first.tokens_per_s, first.prefix_hit_rate, first.kv_cache_used) == (0.0, None, 0.25)
    assert first.ends == 2
    for _ in range(10):
        now += 2.0
        queries.inc(100)
        hits.inc(75)
        generated.inc(40)
        health.now()
    told = health.now()
    running.set(7)
    assert told.tokens_per_s == 20.0
    assert told.prefix_hit_rate == 0.75
    now += 10 * RATE_WINDOW_S
    told = health.now()
    assert told.tokens_per_s < 1.0
    now += RATE_WINDOW_S
    told = health.now()
    assert (told.tokens_per_s, told.batch, told.batch_max) == (0.0, 7, 16)
    assert told.prefix_hit_rate == 0.75, "the last that is known"


def test_a_server_without_vllm_counters_is_still_described(tmp_path: Path) -> None:
    """Where vLLM has counted nothing, what is not known is None and the rest is there."""
    store = AdapterStore(Vllm(), tmp_path, TARGETS, max_loras=1, resident_max=1, rank_max=8)
    problems = RecentProblems()
    told = Health(
        CollectorRegistry(), Admission(bounds()), store, problems, batch_max=1, ends=0
    ).now()
    assert told.kv_cache_used is None
    assert told.load_times is None


def test_load_times_are_those_of_the_last_ones() -> None:
    """The median and the 99th percentile are of what has been noted, in milliseconds."""
    loads = RecentLoads()
    assert loads.told() is None
    loads.fetched(0.5)
    for number in range(100):
        loads.loaded((number + 1) / 1000)
    told = loads.told()
    assert told is not None
    assert (told.loads, told.fetch_median_ms) == (100, 500.0)
    assert (round(told.load_median_ms, 6), round(told.load_p99_ms, 6)) == (50.5, 99.0)


def test_problems_are_few_and_short() -> None:
    """Warnings with what they are about and why; one again and again counts up; older ones and long ones are cut."""
    problems = RecentProblems()
    logger = logging.getLogger("river.test-problems")
    logger.addHandler(problems)
    logger.setLevel(logging.INFO)
    logger.info("all is well")
    for _ in range(3):
        logger.warning("adapter refused", extra={"adapter": "run_1@2", "reason": "rank 99"})
    logger.error("cannot write", exc_info=OSError("no room"))
    first, second = problems.told()
    assert (first.message, first.count) == ("adapter refused (run_1@2): rank 99", 3)
    assert second.message == "cannot write: OSError: no room"
    for number in range(3 * PROBLEMS_TOLD_MAX):
        logger.error("%d %s", number, "x" * 10_000)
    told = problems.told()
    assert len(told) == PROBLEMS_TOLD_MAX
    assert {len(problem.message) for problem in told} == {PROBLEM_CHARACTERS_MAX}


async def _told(client: Client, engine_id: str, content: bytes) -> Controlled:
    answer = await client.request(control_subject(engine_id), content, timeout=5)
    return msgspec.msgpack.decode(answer.data, type=Controlled)


async def test_an_engine_drains_goes_on_and_starts_again(
    tiny_moe: Path, nats_url: str, tmp_path: Path, make_adapter: Callable[..., AdapterRef]
) -> None:
    """Told to over NATS it takes nothing new and opens again; told to start again it ends its streams first."""
    client = await nats.connect(nats_url)
    ref = make_adapter(seed=60)
    try:
        with running_engine(tiny_moe, nats_url, tmp_path, RIVER_ENGINE_ID="eng-told") as engine:
            bucket = await client.jetstream().key_value(ENGINES_BUCKET)

            async def record() -> EngineRecord:
                found = await engine_record(bucket, "eng-told")
                assert found is not None
                return found

            await eventually(lambda: engine_record(bucket, "eng-told"))
            assert (await _told(client, "eng-told", b"nonsense")).refused is not None
            engine.sample(prompts=["1+1="], adapter=ref, max_tokens=4)

            async def busy() -> bool:
                health = (await record()).health
                return bool(health.adapters) and health.load_times is not None

            await eventually(busy)
            health = (await record()).health
            assert [adapter.name for adapter in health.adapters] == [ref.name]
            assert abs(health.adapters[0].used_at - time.time()) < 30
            assert health.kv_cache_used is not None
            assert health.batch_max > 0

            told = await _told(client, "eng-told", _encoded("drain"))
            assert told == Controlled(draining=True)
            assert engine.refusal(prompts=["a"])[1].type == "draining"
            assert (await record()).draining
            assert await _told(client, "eng-told", _encoded("undrain")) == Controlled(
                draining=False
            )
            assert engine.sample(prompts=["a"], max_tokens=1).groups

            await _starts_again(client, engine)
            await eventually(lambda: _resident(bucket, ref.name))
            assert (await record()).health.ends == 1
            assert (await record()).health.problems == []
    finally:
        await client.close()


async def _starts_again(client: Client, engine: RunningEngine) -> None:
    (server,) = children_of(engine.process.pid)
    streams = [Stream() for _ in range(4)]
    with ThreadPoolExecutor(len(streams)) as pool:
        for stream in streams:
            pool.submit(stream.read, engine, LONG)
        await eventually(lambda: all(stream.pieces for stream in streams))
        assert await _told(client, "eng-told", _encoded("restart")) == Controlled(draining=True)
        refused = await _told(client, "eng-told", _encoded("undrain"))
        assert refused.refused is not None
        assert engine.refusal(prompts=["a"])[1].type == "draining"
    assert all(stream.whole for stream in streams)
    await eventually(lambda: children_of(engine.process.pid) not in ([], [server]))
    await asyncio.to_thread(engine.wait_ready)


async def _resident(bucket: KeyValue, name: str) -> bool:
    found = await engine_record(bucket, "eng-told")
    return found is not None and name in found.resident


def _encoded(action: str) -> bytes:
    return msgspec.msgpack.encode(Control(action=action))  # type: ignore[arg-type]
