"""The gateway as a process, and the gateway when its servers go away."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
from support.gateway import Rig, eventually, running_rig
from support.stand_ins import BASE, PATIENCE_S

from river_ops.children import free_port
from river_ops.embedded.nats import EmbeddedNats

START_PATIENCE_S = 60.0


async def test_it_starts_alone_and_stops_when_told(
    postgres_url: str, nats_url: str, tmp_path: Path
) -> None:
    """Without engines or trainers it is alive, says what it lacks, and SIGTERM ends it cleanly."""
    port = free_port()
    environment = {
        **os.environ,
        "RIVER_NATS_URL": nats_url,
        "RIVER_POSTGRES_URL": postgres_url,
        "RIVER_ENGINE_TOKEN": "x",
        "RIVER_DATA_DIR": str(tmp_path),
        "RIVER_PORT": str(port),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "river_gateway.main", env=environment
    )
    try:
        async with (
            asyncio.timeout(START_PATIENCE_S),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        ):
            while True:
                try:
                    alive = await client.get("/healthz")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
            assert alive.text == "ok\n"
            process.send_signal(signal.SIGHUP)
            assert (await client.get("/healthz")).text == "ok\n"
            ready = await client.get("/readyz")
            assert ready.status_code in (200, 503)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_wrong_setting_is_one_line() -> None:
    """A missing setting is named in one line."""
    environment = {name: value for name, value in os.environ.items() if "RIVER_" not in name}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "river_gateway.main", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await asyncio.wait_for(process.communicate(), START_PATIENCE_S)
    assert process.returncode == 1
    assert stderr.decode().strip() == "RIVER_NATS_URL is not set"


async def test_inference_outlives_nats(
    postgres_url: str, own_nats: EmbeddedNats, tmp_path: Path
) -> None:
    """While NATS is away the base model answers, training is 503, and the bill arrives when NATS is back."""
    async with running_rig(postgres_url, own_nats.url(), tmp_path) as rig:
        run = await rig.tenant.new_run()
        own_nats.stop()
        await eventually(lambda: not rig.services.bus.connected)
        for record in [engine.record() for engine in rig.engines]:
            assert record.engine_id in {known.engine_id for known in rig.services.engines.alive()}
        await _complete(rig)
        assert rig.services.meter.waiting == 1
        answer = await rig.tenant.post(
            f"/runs/{run.run_id}/operations",
            {"seq": 1, "operation": {"kind": "forward", "data": [{"input_ids": [1, 2]}]}},
        )
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        own_nats.start()
        await eventually(lambda: rig.services.meter.waiting == 0)
        await _complete(rig)
        assert len({event.event_id for event in await rig.usage(2)}) == 2


async def test_a_known_key_outlives_postgres(rig: Rig) -> None:
    """A key seen before works on while Postgres is away, past its time in the cache; an unknown one is 503."""
    await _complete(rig)
    rig.services.keys.distrust()
    await rig.services.pool.close()
    await _complete(rig)
    answer = await rig.tenant.http.get("/v1/models", headers={"authorization": "Bearer rv-other"})
    assert answer.status_code == 503


async def _complete(rig: Rig) -> None:
    messages: Any = [{"role": "user", "content": "x"}]
    answer = await rig.tenant.openai.chat.completions.create(model=BASE, messages=messages)
    assert answer.choices
