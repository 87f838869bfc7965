"""Aliases: shares, pins, the way back, and that neither Postgres nor NATS is asked for every completion."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from support.gateway import Rig, Tenant, eventually, served_gateway
from support.stand_ins import BASE, TOKEN

from river_client import wire
from river_gateway.inference.models import choose_target
from river_gateway.services import open_services
from river_gateway.settings import Settings

MESSAGES = [{"role": "user", "content": "x"}]
VERSION = "x-river-policy-version"
_OF_NAMES = ("from alias", "from run r", "and name = $3", "and step = $2", "live")
"""What stands in statements about aliases, runs and checkpoints; the last is the bucket of live versions."""


async def _put(who: Tenant, body: dict[str, Any], name: str = "prod") -> httpx.Response:
    return await who.http.put(f"/river/v1/aliases/{name}", json=body)


async def _chat(
    who: Tenant, model: str = "prod", pin: str | None = None, **fields: Any
) -> httpx.Response:
    return await who.http.post(
        "/v1/chat/completions",
        json={"model": model, "messages": MESSAGES} | fields,
        headers={VERSION: pin} if pin else {},
    )


async def _version(who: Tenant, **options: Any) -> str:
    answer = await _chat(who, **options)
    assert answer.status_code == 200, answer.text
    return answer.headers[VERSION]


async def _step(who: Tenant, run_id: str, seq: int) -> None:
    step = wire.TrainStep(data=[wire.Datum(input_ids=[1, 2])], adam=wire.AdamParams(lr=1e-3))
    assert (await who.submit(run_id, seq, step)).status_code == 202
    assert (await who.result(f"{run_id}-{seq}")).status == "done"


async def test_rollback_goes_back_version_by_version(rig: Rig) -> None:
    """Each rollback takes the alias to what it was before, and the next request is answered by that."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "final", mode="inference")
    await _step(rig.tenant, run.run_id, 2)
    answers = {
        BASE: BASE,
        saved.path: f"{run.run_id}@0",
        f"river://{run.run_id}": f"{run.run_id}@1",
    }
    for number, (target, version) in enumerate(answers.items(), start=1):
        put = await _put(rig.tenant, {"target": target})
        assert put.json()["version"] == number
        assert await _version(rig.tenant) == version
    url = "/river/v1/aliases/prod"
    for target in (saved.path, BASE):
        back = await rig.tenant.http.post(f"{url}/rollback")
        assert back.json()["target"] == target
        assert await _version(rig.tenant) == answers[target]
    assert (await rig.tenant.http.post(f"{url}/rollback")).status_code == 409
    history = (await rig.tenant.http.get(f"{url}/history")).json()["aliases"]
    assert [entry["version"] for entry in history] == [3, 2, 1]
    assert (await _put(rig.tenant, {"target": saved.path})).json()["version"] == 4
    assert (await rig.tenant.http.post(f"{url}/rollback")).json()["target"] == BASE


async def test_a_repeated_write_counts_once(rig: Rig) -> None:
    """The same target again makes no version; the same rollback again goes back once; a stale one is refused."""
    run = await rig.tenant.new_run()
    for target in (BASE, f"river://{run.run_id}", f"river://{run.run_id}"):
        put = await _put(rig.tenant, {"target": target})
    assert put.json()["version"] == 2
    url = "/river/v1/aliases/prod/rollback"
    for _ in range(2):
        back = await rig.tenant.http.post(url, params={"version": 2})
        assert back.json()["target"] == BASE
    await _put(rig.tenant, {"target": f"river://{run.run_id}"})
    assert (await rig.tenant.http.post(url, params={"version": 2})).status_code == 409
    assert (await rig.tenant.http.post(url, params={"version": 9})).status_code == 409


async def test_what_is_gone_cannot_be_gone_back_to(rig: Rig) -> None:
    """A rollback to a deleted checkpoint is refused by name, and changes nothing."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "final")
    await _put(rig.tenant, {"target": saved.path})
    await _put(rig.tenant, {"target": BASE})
    await rig.tenant.http.delete("/river/v1/checkpoints", params={"path": saved.path})
    back = await rig.tenant.http.post("/river/v1/aliases/prod/rollback")
    assert back.status_code == 409
    assert saved.path in back.text
    assert await _version(rig.tenant) == BASE


async def test_shares(rig: Rig) -> None:
    """Requests are shared by weight; those of one user or cache key are all answered by one version."""
    run = await rig.tenant.new_run()
    live = f"river://{run.run_id}"
    targets = [{"target": BASE, "weight": 3}, {"target": live, "weight": 1}]
    assert (await _put(rig.tenant, {"targets": targets})).status_code == 200
    counts = Counter([await _version(rig.tenant) for _ in range(120)])
    assert 60 <= counts[BASE] <= 113
    assert counts[BASE] + counts[f"{run.run_id}@0"] == 120
    of_user = [
        {await _version(rig.tenant, user=f"user-{number}") for _ in range(3)}
        for number in range(24)
    ]
    assert all(len(versions) == 1 for versions in of_user)
    assert len(set.union(*of_user)) == 2
    fields = {"user": "a", "prompt_cache_key": "k"}
    assert len({await _version(rig.tenant, **fields) for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("targets", "param"),
    [
        ([], "targets"),
        ([{"target": BASE, "weight": 0}], "targets[0].weight"),
        ([{"target": BASE}, {"target": BASE}], "targets[1].target"),
        ([{"target": BASE}, {"target": "river://run_0"}], "targets[1].target"),
        ([{"target": BASE, "weight": 1.5}], "targets[0].weight"),
        ([{"target": BASE}] * 17, "targets"),
    ],
    ids=["none", "weight", "twice", "unknown", "fraction", "many"],
)
async def test_wrong_shares(rig: Rig, targets: list[dict[str, Any]], param: str) -> None:
    """A refusal names the target at fault."""
    answer = await _put(rig.tenant, {"targets": targets})
    assert answer.status_code in (404, 422)
    assert answer.json()["error"]["param"] == param


async def test_pins(rig: Rig) -> None:
    """A request may insist on any kept version that the name serves or has served, and gets that or an error."""
    run = await rig.tenant.new_run()
    other = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "final")
    for seq in (2, 3):
        await _step(rig.tenant, run.run_id, seq)
    live = f"river://{run.run_id}"
    await _put(rig.tenant, {"target": live})
    await _put(rig.tenant, {"target": BASE})
    for pin, version in (
        (saved.path, f"{run.run_id}@0"),
        (f"{run.run_id}@1", f"{run.run_id}@1"),
        (f"{run.run_id}@2", f"{run.run_id}@2"),
        (BASE, BASE),
    ):
        assert await _version(rig.tenant, pin=pin) == version
    assert await _version(rig.tenant, model=live, pin=f"{run.run_id}@1") == f"{run.run_id}@1"
    for model, pin, status in (
        ("prod", f"{run.run_id}@9", 404),
        ("prod", f"{live}/weights/none", 404),
        ("prod", f"{other.run_id}@0", 400),
        ("prod", "run_0@0", 400),
        ("prod", "nonsense", 400),
        (BASE, f"{run.run_id}@1", 400),
        (saved.path, f"{other.run_id}@0", 400),
    ):
        assert (await _chat(rig.tenant, model=model, pin=pin)).status_code == status, pin
    assert (await _chat(rig.stranger, pin=f"{run.run_id}@1")).status_code == 404


async def test_completions_ask_neither_postgres_nor_nats(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once known, an alias, its checkpoint and a live version cost no round trip."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "final")
    targets = [{"target": saved.path}, {"target": f"river://{run.run_id}"}]
    await _put(rig.tenant, {"targets": targets})
    models = ("prod", saved.path, f"river://{run.run_id}")
    for model in (*models, "prod"):
        await asyncio.gather(*(_version(rig.tenant, model=model, user=str(n)) for n in range(8)))
    asked: list[str] = []
    pool, bus = rig.services.pool, rig.services.bus
    for owner, names in ((pool, ("fetch", "fetchrow", "fetchval", "execute")), (bus, ("get",))):
        for name in names:
            original = getattr(type(owner), name)

            async def counted(*args: Any, _original: Any = original, **options: Any) -> Any:
                # Those who sweep and renew ask as well.
                if any(part in str(args[1]) for part in _OF_NAMES):
                    asked.append(str(args[1]))
                return await _original(*args, **options)

            monkeypatch.setattr(type(owner), name, counted, raising=True)
    for model in models:
        await asyncio.gather(*(_version(rig.tenant, model=model, user=str(n)) for n in range(8)))
    assert asked == []


@pytest_asyncio.fixture
async def second(rig: Rig, postgres_url: str, nats_url: str, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of another gateway over the same Postgres and NATS."""
    settings = Settings(
        nats_url=nats_url, postgres_url=postgres_url, engine_token=TOKEN, data_dir=str(tmp_path)
    )
    async with open_services(settings) as services, served_gateway(services) as url:
        await eventually(lambda: len(services.engines.alive()) == len(rig.engines))
        yield url


async def test_other_gateways_see_a_write_at_once(rig: Rig, second: str) -> None:
    """What one gateway writes, another answers with within a moment, though it remembers the old."""
    run = await rig.tenant.new_run()
    headers = {"authorization": f"Bearer {rig.tenant.secret}"}
    body = {"model": "prod", "messages": MESSAGES}
    async with httpx.AsyncClient(base_url=second, headers=headers) as elsewhere:
        for target, version in ((BASE, BASE), (f"river://{run.run_id}", f"{run.run_id}@0")) * 3:
            await _put(rig.tenant, {"target": target})
            await asyncio.sleep(0.05)
            answer = await elsewhere.post("/v1/chat/completions", json=body)
            assert answer.headers[VERSION] == version
        await _step(rig.tenant, run.run_id, 1)
        answer = await elsewhere.post("/v1/chat/completions", json=body)
        assert answer.headers[VERSION] == f"{run.run_id}@1"
        await rig.tenant.http.delete("/river/v1/aliases/prod")
        await asyncio.sleep(0.05)
        assert (await elsewhere.post("/v1/chat/completions", json=body)).status_code == 404


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.binary(max_size=12))
def test_a_choice_is_one_of_the_targets_and_stays(weights: list[int], stick: bytes) -> None:
    """Whatever the weights, the choice for a key is a target and always the same."""
    targets = [wire.AliasTarget(target=f"t{n}", weight=w) for n, w in enumerate(weights)]
    chosen = {choose_target(targets, "prod", stick) for _ in range(3)}
    assert len(chosen) == 1
    assert chosen <= {entry.target for entry in targets}


def test_a_growing_canary_moves_only_to_itself() -> None:
    """When the first target's weight grows, whoever changes goes to it: nobody is moved between the others."""
    before = [
        wire.AliasTarget(target="canary", weight=5),
        wire.AliasTarget(target="old", weight=95),
    ]
    after = [
        wire.AliasTarget(target="canary", weight=20),
        wire.AliasTarget(target="old", weight=80),
    ]
    keys = [str(number).encode() for number in range(2000)]
    moved = [
        (choose_target(before, "prod", key), choose_target(after, "prod", key)) for key in keys
    ]
    counts = Counter(moved)
    assert ("canary", "old") not in counts
    assert 200 <= counts["old", "canary"] <= 400
