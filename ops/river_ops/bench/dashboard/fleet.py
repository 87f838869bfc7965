"""Engines, trainers and gateways that a busy platform has, as they tell of themselves over NATS."""

from __future__ import annotations

import math
import random
import time

import msgspec
import nats
from nats.js import JetStreamContext
from nats.js.api import KeyValueConfig, StorageType
from nats.js.errors import BucketNotFoundError
from nats.js.kv import KeyValue

from river_engine.protocol import (
    ENGINES_BUCKET,
    EngineHealth,
    EngineRecord,
    HeldAdapter,
    LoadTimes,
    Problem,
)
from river_gateway.health.shared import HEALTH_BUCKET, SLOTS_KEPT
from river_gateway.health.slots import SLOT_S, Failure, Series, Slot, bucket_of
from river_trainer.protocol import TRAINERS_BUCKET, TrainerHealth, TrainerRecord

ENGINE, TRAINER = "engine-0-0", "trainer-0"
_ENGINES, _TRAINERS, _GATEWAYS, _MODELS, _ADAPTERS = 24, 3, 4, 3, 16
_ALIVE_FOR_S = 3600.0
"""Nobody renews these records, so their heartbeats are of a time to come."""


async def register(nats_url: str) -> None:
    """Puts all of them where gateways look."""
    chance = random.Random(1)  # noqa: S311 - for pictures
    client = await nats.connect(nats_url)
    try:
        stream = client.jetstream()
        engines = await _bucket(stream, ENGINES_BUCKET)
        for number in range(_ENGINES):
            record = _engine(number, chance)
            await engines.put(record.engine_id, msgspec.msgpack.encode(record))
        trainers = await _bucket(stream, TRAINERS_BUCKET)
        for number in range(_TRAINERS):
            trainer = _trainer(number, chance)
            await trainers.put(trainer.trainer_id, msgspec.msgpack.encode(trainer))
        health = await _bucket(stream, HEALTH_BUCKET)
        newest = int(time.time() / SLOT_S)
        for gateway in range(_GATEWAYS):
            for number in range(newest - SLOTS_KEPT, newest + 1):
                slot = _slot(f"gw_{gateway}", number, chance)
                await health.put(f"{slot.gateway_id}.{number}", msgspec.msgpack.encode(slot))
    finally:
        await client.close()


async def _bucket(stream: JetStreamContext, name: str) -> KeyValue:
    try:
        return await stream.key_value(name)
    except BucketNotFoundError:
        return await stream.create_key_value(
            KeyValueConfig(bucket=name, storage=StorageType.MEMORY)
        )


def _engine(number: int, chance: random.Random) -> EngineRecord:
    now = time.time()
    adapters = [
        HeldAdapter(
            name=f"run_{chance.randrange(10**20):020d}@{chance.randrange(400)}",
            loaded_at=now - 60 * (_ADAPTERS - place) ** 2,
            used_at=now - 7 * (_ADAPTERS - place),
        )
        for place in range(_ADAPTERS)
    ]
    warning = f"adapter refused ({adapters[0].name}): rank 64 is greater than 32"
    health = EngineHealth(
        started_at=now - 86_400 * chance.random(),
        inside=chance.randrange(200),
        waiting=chance.randrange(60),
        batch=chance.randrange(256),
        batch_max=256,
        slots_used=4,
        kv_cache_used=chance.random(),
        prefix_hit_rate=chance.random(),
        tokens_per_s=4000 * chance.random(),
        adapters=adapters,
        load_times=LoadTimes(loads=256, fetch_median_ms=8.2, load_median_ms=21.4, load_p99_ms=96.0),
        problems=[Problem(at=now - 900, message=warning, count=4)] if number % 3 == 0 else [],
        ends=number % 2,
    )
    return EngineRecord(
        engine_id=f"engine-{number % _MODELS}-{number // _MODELS}",
        base_model=f"river/model-{number % _MODELS}",
        url=f"http://10.0.0.{number}:8100",
        context_length=32_768,
        vocab_size=150_000,
        max_loras=4,
        max_lora_rank=32,
        heartbeat_at=now + _ALIVE_FOR_S,
        resident=[adapter.name for adapter in adapters],
        running=health.inside + health.waiting,
        outstanding_tokens=chance.randrange(100_000),
        draining=number == _ENGINES - 1,
        health=health,
    )


def _trainer(number: int, chance: random.Random) -> TrainerRecord:
    now = time.time()
    health = TrainerHealth(
        started_at=now - 7200,
        runs_device=24,
        runs_memory=60,
        runs_disk=116,
        waiting=chance.randrange(400),
        waiting_tokens=chance.randrange(400_000),
        window_s=30.0,
        batches=60,
        steps=int(400 * chance.random()),
        tokens=chance.randrange(6_000_000),
        phase_s={"load": 1.1, "forward": 9.4, "backward": 15.2, "optimizer": 1.9, "publish": 6.5},
        unsaved_runs=17,
        snapshot_age_s=42.0,
        problems=[Problem(at=now - 300, message="the store does not answer: StoreError: timeout")],
    )
    return TrainerRecord(
        trainer_id=f"trainer-{number}",
        base_model=f"river/model-{number % _MODELS}",
        context_length=32_768,
        vocab_size=150_000,
        max_lora_rank=64,
        heartbeat_at=now + _ALIVE_FOR_S,
        runs=200,
        health=health,
    )


def _slot(gateway_id: str, number: int, chance: random.Random) -> Slot:
    """More at some times than at others, a few failures, and first tokens of some hundred milliseconds."""
    busy = 1.5 + math.sin(number / 20)
    series: dict[str, Series] = {}
    for model in range(_MODELS):
        count = int(busy * 60 * (1 + chance.random()) / (1 + model))
        failed = 0 if chance.randrange(10) else count // 80
        first = [bucket_of(0.08 * busy * chance.lognormvariate(0, 0.5)) for _ in range(count // 2)]
        whole = [bucket_of(1.2 * busy * chance.lognormvariate(0, 0.6)) for _ in range(count)]
        statuses = {200: count, 503: failed, 429: count // 40, 422: count // 50, 499: count // 90}
        series[f"river/model-{model}"] = Series(
            statuses={status: found for status, found in statuses.items() if found},
            first={bucket: first.count(bucket) for bucket in set(first)},
            whole={bucket: whole.count(bucket) for bucket in set(whole)},
        )
    failures = [
        Failure(
            at=number * SLOT_S + 3.0,
            name=name,
            route="/v1/chat/completions",
            status=503,
            message=f"no engine of {name!r} answers at the moment; try again",
            request_id=f"{number:08x}-0000-7000-8000-{chance.randrange(16**12):012x}",
        )
        for name, found in series.items()
        if 503 in found.statuses  # noqa: PLR2004 - unavailable
    ]
    return Slot(gateway_id=gateway_id, number=number, series=series, failures=failures)
