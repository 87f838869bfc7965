"""Usage while NATS is away: on disk in order, through kill -9, and never more of it than there is room for."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import sys
import zlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gateway import Rig, eventually, running_rig
from support.stand_ins import BASE, TOKEN

from river_billing.events import UsageEvent, UsageKind
from river_gateway.inference import spool as module
from river_gateway.inference.spool import DAMAGED_SUFFIX, SUFFIX, Spool
from river_ops.children import free_port
from river_ops.embedded.nats import EmbeddedNats

START_PATIENCE_S = 60.0
BODY = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}


def event(number: int) -> UsageEvent:
    """The same for the same number."""
    return UsageEvent(
        event_id=f"00000000-0000-7000-8000-{number:012d}",
        occurred_at=1.8e9,
        tenant_id="ten_a",
        key_id="key_a",
        base_model=BASE,
        context_length=1,
        quantities={UsageKind.PROMPT: number + 1},
    )


def opened(directory: Path, size_max_bytes: int = 10**6) -> Spool:
    """A spool of that folder."""
    spool = Spool(directory, size_max_bytes=size_max_bytes)
    spool.open()
    return spool


def drained(spool: Spool, at_once: int = 7) -> Iterator[UsageEvent]:
    """All of it, in its order."""
    while events := spool.head(at_once):
        yield from events
        spool.advance(len(events))


def test_it_is_delivered_in_order_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many segments, with events that come meanwhile; at the end the folder is empty."""
    monkeypatch.setattr(module, "USAGE_SEGMENT_BYTES", 500)
    spool = opened(tmp_path)
    for number in range(30):
        spool.append([event(2 * number), event(2 * number + 1)])
    assert spool.waiting == 60
    assert len(list(tmp_path.iterdir())) > 5
    assert spool.head(2) == spool.head(2) == [event(0), event(1)]
    spool.advance(1)
    found = []
    for number, one in enumerate(drained(spool)):
        if number == 10:
            spool.append([event(60)])
        found.append(one)
    assert found == [event(number) for number in range(1, 61)]
    assert (spool.waiting, list(tmp_path.iterdir())) == (0, [])
    spool.append([event(99)])
    assert list(drained(spool)) == [event(99)]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 1000), batches=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_what_was_confirmed_survives_a_kill(
    tmp_path_factory: pytest.TempPathFactory, cut: int, batches: list[int]
) -> None:
    """A writer that is killed leaves any beginning of its last record; all before it is read."""
    directory = tmp_path_factory.mktemp("spool")
    spool = opened(directory)
    numbers = iter(range(100))
    for size in batches:
        spool.append([event(next(numbers)) for _ in range(size)])
    whole = spool.waiting
    (path,) = directory.iterdir()
    confirmed_bytes = path.stat().st_size
    spool.append([event(next(numbers))])
    torn_bytes = path.stat().st_size - confirmed_bytes
    spool.close()
    os.truncate(path, confirmed_bytes + cut % torn_bytes)
    again = opened(directory)
    assert list(drained(again)) == [event(number) for number in range(whole)]
    assert list(directory.iterdir()) == []
    again.close()


def test_a_damaged_segment_is_kept(tmp_path: Path) -> None:
    """What comes before the damage is delivered, and the file is left to people."""
    spool = opened(tmp_path)
    spool.append([event(number) for number in range(10)])
    spool.close()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = opened(tmp_path)
    found = list(drained(again))
    assert 0 < len(found) < 10
    assert found == [event(number) for number in range(len(found))]
    (left,) = tmp_path.iterdir()
    assert left.suffix == DAMAGED_SUFFIX
    assert left.read_bytes() == data
    assert list(drained(opened(tmp_path))) == []


def test_a_record_of_another_release_is_kept(tmp_path: Path) -> None:
    """What is before it is delivered, the file stays under another name, and the gateway starts."""
    spool = opened(tmp_path)
    spool.append([event(0)])
    spool.close()
    (segment,) = tmp_path.glob(f"*{SUFFIX}")
    payload = msgspec.msgpack.encode({"event_id": "x", "kind": "of another release"})
    header = struct.pack("<II", len(payload), zlib.crc32(payload))
    segment.write_bytes(segment.read_bytes() + header + payload)
    spool = opened(tmp_path)
    assert list(drained(spool)) == [event(0)]
    assert [path.suffix for path in tmp_path.iterdir()] == [DAMAGED_SUFFIX]
    spool.close()


def test_gateways_share_a_folder(tmp_path: Path) -> None:
    """Nobody takes what another works on, and what one has left the next who looks delivers, before its own."""
    first, second = opened(tmp_path), opened(tmp_path)
    first.append([event(1), event(2)])
    second.append([event(3)])
    assert second.adopt() == first.adopt() == 0
    first.advance(1)
    first.close()
    assert second.adopt() == 2
    assert list(drained(second)) == [event(1), event(2), event(3)]
    assert list(tmp_path.glob(f"*{SUFFIX}")) == []


def test_it_is_full_until_it_is_delivered(tmp_path: Path) -> None:
    """What was admitted before is written all the same."""
    spool = opened(tmp_path, size_max_bytes=300)
    assert not spool.full
    while not spool.full:
        spool.append([event(spool.waiting)])
    count = spool.waiting
    spool.append([event(count)])
    spool.close()
    again = opened(tmp_path, size_max_bytes=300)
    assert again.full
    assert len(list(drained(again))) == count + 1
    assert not again.full


async def test_a_full_spool_refuses_requests(
    postgres_url: str, own_nats: EmbeddedNats, tmp_path: Path
) -> None:
    """503 with Retry-After before any work is done, and everything that was answered is billed, in its order."""
    async with running_rig(
        postgres_url, own_nats.url(), tmp_path, usage_spool_max_bytes=700
    ) as rig:
        assert (await complete(rig.tenant.http)).is_success  # the key is known from here on
        own_nats.stop()
        await eventually(lambda: not rig.services.bus.connected)
        answered = 1
        while (answer := await complete(rig.tenant.http)).is_success:
            answered += 1
            assert rig.services.meter.waiting == answered - 1
        assert 2 < answered < 10
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        own_nats.start()
        await eventually(lambda: rig.services.meter.waiting == 0)
        assert (await complete(rig.tenant.http)).is_success
        events = await rig.usage(answered + 1)
        assert [one.event_id for one in events] == sorted({one.event_id for one in events})


async def test_a_disk_that_fails_refuses_requests(
    postgres_url: str, own_nats: EmbeddedNats, tmp_path: Path
) -> None:
    """What was answered stays in memory; no more is admitted until it has gone somewhere."""
    async with running_rig(postgres_url, own_nats.url(), tmp_path) as rig:
        assert (await complete(rig.tenant.http)).is_success
        own_nats.stop()
        await eventually(lambda: not rig.services.bus.connected)
        shutil.rmtree(tmp_path / "usage-spool")
        assert (await complete(rig.tenant.http)).is_success
        assert rig.services.meter.waiting == 1
        refused = await complete(rig.tenant.http)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        # The disk works again while NATS is still away: what waits is written down, and requests are answered.
        (tmp_path / "usage-spool").mkdir()
        await eventually(lambda: not rig.services.meter._disk_fails)
        assert (await complete(rig.tenant.http)).is_success
        own_nats.start()
        await eventually(lambda: rig.services.meter.waiting == 0)
        await rig.usage(3)


async def test_a_killed_gateway_loses_no_usage(
    postgres_url: str, own_nats: EmbeddedNats, tmp_path: Path
) -> None:
    """NATS goes, requests are answered, the gateway is killed; started again it bills each of them."""
    async with running_rig(postgres_url, own_nats.url(), tmp_path) as rig:
        environment = {
            **os.environ,
            "RIVER_NATS_URL": own_nats.url(),
            "RIVER_POSTGRES_URL": postgres_url,
            "RIVER_ENGINE_TOKEN": TOKEN,
            "RIVER_USAGE_SPOOL_DIR": str(tmp_path / "spool of a process"),
        }
        async with gateway(rig, environment) as (process, client):
            identities = {(await complete(client)).headers["x-request-id"]}
            own_nats.stop()
            await eventually(lambda: not rig.services.bus.connected)
            for _ in range(5):
                answer = await complete(client)
                assert answer.is_success, answer.text
                identities.add(answer.headers["x-request-id"])
            process.kill()
            await process.wait()
        own_nats.start()
        await eventually(lambda: rig.services.bus.connected)
        async with gateway(rig, environment) as (_, client):
            events = await rig.usage(6)
            assert {one.event_id for one in events} == identities
            assert (await complete(client)).is_success
            await rig.usage(7)
            assert list((tmp_path / "spool of a process").iterdir()) == []


async def complete(client: httpx.AsyncClient) -> httpx.Response:
    """An answer of the base model, or a refusal."""
    return await client.post("/v1/chat/completions", json=BODY)


@asynccontextmanager
async def gateway(
    rig: Rig, environment: dict[str, str]
) -> AsyncGenerator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    """A gateway process that knows the rig's engines, and a client of it."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "river_gateway.main", env={**environment, "RIVER_PORT": str(port)}
    )
    headers = {"authorization": f"Bearer {rig.tenant.secret}"}
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30.0
        ) as client:

            async def serves() -> Any:
                try:
                    return len((await client.get("/v1/models")).json()["data"]) > 0
                except (httpx.TransportError, KeyError):
                    return False

            async with asyncio.timeout(START_PATIENCE_S):
                while not await serves():  # noqa: ASYNC110 - polls a process
                    await asyncio.sleep(0.1)
            yield process, client
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
