"""Engines and trainers as admins see them, through the API, the dashboard and the command, and what they are told."""

from __future__ import annotations

import asyncio
import time

import msgspec
from click.testing import CliRunner
from support.dashboard import signed_in
from support.gateway import Rig, error_of
from support.stand_ins import BASE

from river_client.cli import river
from river_client.machine_wire import Machines, MachineTold
from river_engine.protocol import (
    EngineHealth,
    EngineRecord,
    HeldAdapter,
    LoadTimes,
    Problem,
)
from river_gateway.health.slots import SLOT_S, Failure, Series, Slot
from river_trainer.protocol import TrainerHealth, TrainerRecord

NASTY = "cannot load <script>alert(1)</script>"


def _health() -> EngineHealth:
    now = time.time()
    return EngineHealth(
        started_at=now - 7200,
        inside=3,
        waiting=2,
        batch=4,
        batch_max=16,
        kv_cache_used=0.5,
        prefix_hit_rate=0.25,
        tokens_per_s=123.0,
        adapters=[
            HeldAdapter(name="run_a@1", loaded_at=now - 300, used_at=now - 120),
            HeldAdapter(name="run_b@7", loaded_at=now - 60, used_at=now - 2),
        ],
        load_times=LoadTimes(loads=9, fetch_median_ms=12.0, load_median_ms=34.0, load_p99_ms=56.0),
        problems=[
            Problem(at=now - 50, message="an older one"),
            Problem(at=now - 5, message=NASTY, count=3),
        ],
        ends=2,
    )


async def _registered(rig: Rig) -> EngineRecord:
    """An engine with much to tell, and a trainer."""
    record = rig.engines[0].record(
        engine_id="eng_told", resident=["run_a@1", "run_b@7"], health=_health()
    )
    await rig.register(record)
    health = TrainerHealth(
        runs_memory=3,
        waiting=5,
        waiting_tokens=500,
        window_s=30.0,
        batches=10,
        steps=60,
        tokens=3000,
        phase_s={"load": 1.0, "forward": 4.0, "backward": 4.0, "optimizer": 1.0, "publish": 2.0},
        unsaved_runs=1,
        snapshot_age_s=65.0,
    )
    await rig.register_trainer(rig.trainer.record(trainer_id="trn_told", runs=3, health=health))
    return record


async def test_admins_see_how_machines_are(rig: Rig) -> None:
    """What their records say, in words of the API; who left an engine alone; newest problems and adapters first."""
    await _registered(rig)
    for gateway in ("gw_a", "gw_b"):
        number = int(time.time() / SLOT_S) - 3
        rig.services.health.hear(Slot(gateway_id=gateway, number=number, failing=["eng_0"]))
    answer = await rig.admin.get("/engines")
    engines = {
        engine.engine_id: engine
        for engine in msgspec.json.decode(answer.content, type=Machines).engines
    }
    told = engines["eng_told"]
    assert (told.state, told.batch, told.batch_max, told.waiting) == ("serving", 4, 16, 2)
    assert [adapter.name for adapter in told.adapters] == ["run_b@7", "run_a@1"]
    assert 100 < told.adapters[1].unused_s < 200
    assert [problem.message for problem in told.problems] == [NASTY, "an older one"]
    assert (told.loads, told.load_p99_ms, told.restarts) == (9, 56.0, 2)
    assert (engines["eng_0"].state, engines["eng_0"].left_alone_by) == ("left alone", 2)
    assert engines["eng_1"].kv_cache_used is None, "an older engine says nothing of it"
    answer = await rig.admin.get("/trainers")
    trainers = msgspec.json.decode(answer.content, type=Machines).trainers
    told_of = {trainer.trainer_id: trainer for trainer in trainers}["trn_told"]
    assert (told_of.state, told_of.steps_per_s, told_of.tokens_per_s) == ("training", 2.0, 100.0)
    assert told_of.phase_s["forward"] == 4.0


def test_records_of_older_machines_are_read() -> None:
    """A record without what has been added since is complete, and a later one's further fields do no harm."""
    plain = {
        "base_model": "m",
        "context_length": 8,
        "vocab_size": 8,
        "max_lora_rank": 8,
        "heartbeat_at": 1.0,
        "added_later": {"a": 1},
    }
    engine = plain | {"engine_id": "e", "url": "u", "max_loras": 1}
    record = msgspec.msgpack.decode(msgspec.msgpack.encode(engine), type=EngineRecord)
    assert record.health == EngineHealth()
    trainer = msgspec.msgpack.encode(plain | {"trainer_id": "t"})
    assert msgspec.msgpack.decode(trainer, type=TrainerRecord).health == TrainerHealth()


async def test_machines_do_as_they_are_told(rig: Rig) -> None:
    """Each action reaches the one that is named; what it refuses is a conflict, and its silence no success."""
    for action in ("drain", "undrain", "restart"):
        answer = await rig.admin.post(f"/engines/eng_1/{action}", b"")
        told = msgspec.json.decode(answer.content, type=MachineTold)
        assert told == MachineTold(machine_id="eng_1", action=action, draining=action != "undrain")
    assert rig.engines[1].controls == ["drain", "undrain", "restart"]
    assert rig.engines[0].controls == []
    assert (await rig.admin.post("/trainers/trn_1/restart", b"")).status_code == 200
    again = await rig.admin.post("/trainers/trn_1/drain", b"")
    assert again.status_code == 409
    assert "about to leave" in error_of(again).message
    for path in ("/engines/eng_9/drain", "/trainers/eng_0/drain", "/engines/eng_0/explode"):
        assert (await rig.admin.post(path, b"")).status_code == 404, path
    await _registered(rig)
    silent = await rig.admin.post("/engines/eng_told/drain", b"")
    assert silent.status_code == 503
    assert "does not answer" in error_of(silent).message
    for path in ("/engines/eng_0/drain", "/trainers/trn_1/restart"):
        assert (await rig.tenant.post(path, b"")).status_code == 403
    assert rig.engines[0].controls == []


async def test_pages_of_machines_are_for_admins(rig: Rig) -> None:
    """A list, and a page for each with all of it; whatever text they tell is text; tenants are refused."""
    await _registered(rig)
    paths = ("/machines", "/machines/engines/eng_told", "/machines/trainers/trn_told", "/health")
    async with signed_in(rig, rig.tenant) as window:
        for path in paths:
            assert (await window.client.get(f"/admin{path}")).status_code == 403, path
            live = await window.client.get(f"/admin{path}/live")
            assert live.status_code == 403, path
        refused = await window.send("/machines/engines/eng_0", action="drain")
        assert refused.status_code == 403
    async with signed_in(rig, rig.admin) as window:
        listed = await window.page("/machines")
        assert "eng_told" in listed
        assert "trn_told" in listed
        engine = await window.page("/machines/engines/eng_told")
        for text in ("run_b@7", "50 %", "25 %", "34 ms", "56 ms", "an older one", "&lt;script&gt;"):
            assert text in engine, text
        assert "<script>alert" not in engine
        trainer = await window.page("/machines/trainers/trn_told")
        for text in ("2 <small>/ s", "33 %", "400 ms", "1 min old"):
            assert text in trainer, text
        for path in ("/machines/engines/eng_9", "/machines/trainers/trn_9"):
            assert (await window.client.get(f"/admin{path}")).status_code == 404


async def test_a_restart_has_to_be_typed(rig: Rig) -> None:
    """Without the id nothing is restarted; draining and going on take a click."""
    async with signed_in(rig, rig.admin) as window:
        for fields in (
            {"action": "restart"},
            {"action": "restart", "confirmation": "eng_1"},
            {"action": "explode"},
            {},
        ):
            answer = await window.send("/machines/engines/eng_0", **fields)
            assert answer.status_code == 422, fields
        assert rig.engines[0].controls == []
        for fields in (
            {"action": "drain"},
            {"action": "undrain"},
            {"action": "restart", "confirmation": "eng_0"},
        ):
            answer = await window.send("/machines/engines/eng_0", **fields)
            assert answer.status_code == 303, fields
        assert rig.engines[0].controls == ["drain", "undrain", "restart"]
        answer = await window.send("/machines/trainers/trn_1", action="drain")
        assert answer.headers["location"] == "/admin/machines/trainers/trn_1"
        assert rig.trainer.controls == ["drain"]


async def test_only_admins_see_what_all_tenants_do(rig: Rig) -> None:
    """Rates of the whole fleet are on an admin's overview and health page, and on nobody else's."""
    number = int(time.time() / SLOT_S) - 3
    failure = Failure(
        at=time.time() - 40,
        name="some/model",
        route="/v1/chat/completions",
        status=503,
        message="no engine answers",
        request_id="req-1",
    )
    for each in range(number, number + 5):
        rig.services.health.hear(
            Slot(
                gateway_id="gw_other",
                number=each,
                series={"some/model": Series(statuses={200: 3, 503: 1, 429: 4}, first={40: 4})},
                failures=[failure] if each == number else [],
            )
        )
    async with signed_in(rig, rig.admin) as window:
        page = await window.page("/health")
        for text in ("some/model", "no engine answers", ">503 ", "req-1"):
            assert text in page, text
        overview = await window.page("")
        assert 'href="/admin/health"' in overview
        assert "12 %" in overview, "one of eight"
        # As one tenant sees it.
        narrowed = await window.page(f"?tenant={rig.tenant.tenant_id}")
        assert 'href="/admin/health"' not in narrowed
    async with signed_in(rig, rig.tenant) as window:
        overview = await window.page("")
        assert "/admin/health" not in overview
        assert "First token" not in overview


async def test_the_command_lists_and_tells(rig: Rig) -> None:
    """`river engines` and `river trainers` show what there is and pass on what is asked."""
    await _registered(rig)
    environment = {"RIVER_BASE_URL": rig.url, "RIVER_API_KEY": rig.admin.secret}

    async def run(*arguments: str) -> str:
        done = await asyncio.to_thread(CliRunner().invoke, river, arguments, env=environment)
        assert done.exit_code == 0, done.output
        return done.output

    listed = await run("engines", "list")
    assert f"eng_told  {BASE}  serving  4/16" in listed
    assert "50 %" in listed
    assert msgspec.json.decode(await run("engines", "list", "--json"))
    assert "forward 33 %" in await run("trainers", "list")
    assert "takes nothing new" in await run("engines", "drain", "eng_1")
    assert "starts again" in await run("trainers", "restart", "trn_1")
    assert rig.engines[1].controls == ["drain"]
    assert rig.trainer.controls == ["restart"]
