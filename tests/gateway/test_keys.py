"""Keys: remembered for a while, forgotten on every gateway as soon as they change, and asked for once at a time."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import msgspec
import pytest
import pytest_asyncio
from click.testing import CliRunner
from support.gateway import Rig, error_of, eventually, running_rig

from river_client import wire
from river_client.cli import river
from river_gateway.database import Pool, Row, open_pool
from river_gateway.errors import UnauthenticatedError, UnavailableError
from river_gateway.limits import KEY_CACHE_ENTRIES_MAX
from river_gateway.tenancy.accounts import create_key, create_tenant, revoke_key
from river_gateway.tenancy.auth import KeyCache
from river_gateway.tenancy.messages import AccountChanged
from river_ops.children import free_port
from river_ops.embedded.nats import EmbeddedNats

START_PATIENCE_S = 60.0


class Counting:
    """A database that counts what it is asked, and answers only as long as it is `there`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.asked = 0
        self.there = True
        self.reads_only = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def fetchrow(self, query: str, *args: Any) -> Row | None:
        self.asked += 1
        await self.may_answer.wait()
        if not self.there:
            raise ConnectionError
        return await self._pool.fetchrow(query, *args)

    async def fetch(self, query: str, *args: Any) -> Sequence[Row]:
        return await self._pool.fetch(query, *args)

    async def fetchval(self, query: str, *args: Any) -> Any:
        return await self._pool.fetchval(query, *args)

    async def execute(self, query: str, *args: Any) -> str:
        if self.reads_only:
            raise asyncpg.ReadOnlySQLTransactionError("it is another one that does")
        return await self._pool.execute(query, *args)


@pytest_asyncio.fixture
async def database(postgres_url: str) -> AsyncIterator[Counting]:
    """An empty database."""
    pool = await open_pool(postgres_url)
    try:
        yield Counting(pool)
    finally:
        await pool.close()


async def _new_key(database: Counting) -> tuple[str, wire.ApiKey]:
    """The `Authorization` header of a new key, and the key."""
    tenant = await create_tenant(database, "tenant", wire.Limits(tokens_per_minute=9))
    key = await create_key(
        database, tenant=tenant.tenant_id, limits=wire.Limits(concurrent_requests=2)
    )
    return f"Bearer {key.secret}", key


async def test_a_key_is_found_without_asking_twice(database: Counting) -> None:
    """The first request asks Postgres; what is known then comes at once, with the limits of key and tenant."""
    keys = KeyCache(database)
    header, key = await _new_key(database)
    database.asked = 0
    assert keys.find_cached(header) is None
    found = await keys.authenticate(header)
    assert keys.find_cached(header) is found
    assert keys.find_cached(None, key.secret) is found
    assert await keys.authenticate(f"bearer  {key.secret} ") is found
    assert database.asked == 1
    assert (found.key_id, found.tenant_id) == (key.key_id, key.tenant)
    assert found.limits == wire.Limits(concurrent_requests=2)
    assert found.tenant_limits == wire.Limits(tokens_per_minute=9)


async def test_both_prefixes_are_one_key(database: Counting) -> None:
    """Written as `tml-…`, for Tinker's SDK, a key is the one it is as `rv-…`: known already, and ended with it."""
    keys = KeyCache(database)
    header, key = await _new_key(database)
    assert key.secret is not None
    assert key.secret.startswith("rv-")
    as_tinker_s = "tml-" + key.secret.removeprefix("rv-")
    found = await keys.authenticate(f"Bearer {as_tinker_s}")
    database.asked = 0
    assert keys.find_cached(header) is found
    assert keys.find_cached(None, as_tinker_s) is found
    for other in (f"tml-{key.secret}", "tml-" + as_tinker_s, as_tinker_s.removeprefix("tml-")):
        with pytest.raises(UnauthenticatedError):
            await keys.authenticate(f"Bearer {other}")
    await revoke_key(database, key.key_id)
    keys.forget(AccountChanged(key_id=key.key_id))
    with pytest.raises(UnauthenticatedError):
        await keys.authenticate(None, as_tinker_s)


async def test_many_at_once_ask_once(database: Counting) -> None:
    """Requests with one unknown key wait for one answer, also when the first of them gives up."""
    keys = KeyCache(database)
    header, key = await _new_key(database)
    database.asked = 0
    database.may_answer.clear()
    requests = [asyncio.create_task(keys.authenticate(header)) for _ in range(50)]
    await asyncio.sleep(0.01)
    assert database.asked == 1
    requests[0].cancel()
    requests[7].cancel()
    await asyncio.sleep(0.01)
    database.may_answer.set()
    answers = await asyncio.gather(*requests, return_exceptions=True)
    assert database.asked == 2
    assert [index for index, answer in enumerate(answers) if isinstance(answer, BaseException)] == [
        0,
        7,
    ]
    assert all(answer.key_id == key.key_id for answer in answers[1:7])  # type: ignore[union-attr]


async def test_no_is_remembered_too(database: Counting) -> None:
    """An unknown key is asked for once, and as many of them as anybody likes to try take bounded memory."""
    keys = KeyCache(database)
    for _ in range(3):
        with pytest.raises(UnauthenticatedError):
            await keys.authenticate("Bearer rv-unknown")
    assert database.asked == 1
    for header in (None, "", "Bearer", "Bearer x-1", "Basic rv-x", "Bearer rv-" + 300 * "x"):
        with pytest.raises(UnauthenticatedError):
            keys.find_cached(header)
    keys._entries.update(
        {
            str(number).encode(): keys._entries[next(iter(keys._entries))]
            for number in range(KEY_CACHE_ENTRIES_MAX)
        }
    )
    with pytest.raises(UnauthenticatedError):
        await keys.authenticate("Bearer rv-another")
    assert len(keys._entries) <= KEY_CACHE_ENTRIES_MAX + 1


@pytest.mark.parametrize("of", ["key", "tenant"])
async def test_what_has_changed_is_asked_for_again(database: Counting, of: str) -> None:
    """A change of a key or its tenant drops it, and an answer that was under way while it came is not kept."""
    keys = KeyCache(database)
    header, key = await _new_key(database)
    change = (
        AccountChanged(key_id=key.key_id) if of == "key" else AccountChanged(tenant_id=key.tenant)
    )
    await keys.authenticate(header)
    keys.forget(AccountChanged(key_id="key_other"))
    assert keys.find_cached(header)
    keys.forget(change)
    assert keys.find_cached(header) is None
    database.may_answer.clear()
    request = asyncio.create_task(keys.authenticate(header))
    await asyncio.sleep(0.01)
    keys.forget(change)
    database.may_answer.set()
    await request
    assert keys.find_cached(header) is None


async def test_an_old_answer_stands_in_while_postgres_is_away(database: Counting) -> None:
    """What was known lately goes on counting while Postgres is away, which is then asked now and then only."""
    keys = KeyCache(database)
    header, _ = await _new_key(database)
    await keys.authenticate(header)
    keys.distrust()
    assert keys.find_cached(header) is None
    database.there = False
    database.asked = 0
    for _ in range(20):
        assert await keys.authenticate(header)
    assert database.asked == 1
    with pytest.raises(UnavailableError):
        await keys.authenticate("Bearer rv-unknown")


async def test_a_postgres_that_takes_no_writes_still_knows_keys(database: Counting) -> None:
    """While another Postgres takes over, a key's use cannot be noted; it is let in all the same."""
    keys = KeyCache(database)
    header, key = await _new_key(database)
    database.reads_only = True
    assert (await keys.authenticate(header)).key_id == key.key_id


async def test_anthropic_s_header_is_a_key_too(rig: Rig) -> None:
    """`x-api-key` does as well as `Authorization`, on every kind of route."""
    async with httpx.AsyncClient(
        base_url=rig.url, headers={"x-api-key": rig.tenant.secret}
    ) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/river/v1/runs")).status_code == 200
        body = {"model": "river/test-base", "messages": [{"role": "user", "content": "x"}]}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        wrong = await client.get("/v1/models", headers={"x-api-key": "rv-wrong"})
        assert wrong.status_code == 401


async def test_the_command_writes_keys_as_tinker_wants_them(rig: Rig) -> None:
    """`river keys create --tinker` shows a secret as `tml-…`, which opens the gateway as it is and as `rv-…`."""
    environment = {"RIVER_BASE_URL": rig.url, "RIVER_API_KEY": rig.admin.secret}
    asked = ["keys", "create", rig.tenant.tenant_id, "--tinker"]
    done = await asyncio.to_thread(CliRunner().invoke, river, asked, env=environment)
    assert done.exit_code == 0, done.output
    prefix, _, random = done.output.strip().partition("-")
    assert prefix == "tml"
    async with httpx.AsyncClient(base_url=rig.url) as client:
        for secret in (f"tml-{random}", f"rv-{random}"):
            headers = {"authorization": f"Bearer {secret}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200


# ---- Changed and rotated ---------------------------------------------------------------------------------------------


async def _opens(rig: Rig, secret: str) -> bool:
    """Whether a secret is a key's at the moment."""
    headers = {"authorization": f"Bearer {secret}"}
    async with httpx.AsyncClient(base_url=rig.url, headers=headers) as client:
        status = (await client.get("/v1/models")).status_code
    assert status in (200, 401)
    return status == 200


async def _rotate(rig: Rig, grace_s: int, **headers: str) -> wire.ApiKey:
    """Rotates the tenant's key."""
    answer = await rig.admin.post(
        f"/keys/{rig.tenant.key_id}/rotate", wire.RotateKey(grace_s=grace_s), headers=headers
    )
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=wire.ApiKey)


async def test_a_rotated_key_goes_on_until_its_grace_is_over(rig: Rig) -> None:
    """Both secrets are one key with one set of limits until the old one ends; with none it ends at once."""
    first = rig.tenant.secret
    assert await _opens(rig, first)
    key = await _rotate(rig, 1)
    assert key.secret is not None
    assert key.secret.startswith(key.prefix)
    assert key.previous_until is not None
    assert await _opens(rig, first)
    assert await _opens(rig, key.secret)
    old, new = [
        await rig.services.keys.authenticate(f"Bearer {secret}") for secret in (first, key.secret)
    ]
    assert old.key_id == new.key_id == rig.tenant.key_id
    await asyncio.sleep(1.1)
    assert not await _opens(rig, first)
    assert await _opens(rig, key.secret)
    at_once = await _rotate(rig, 0)
    assert at_once.previous_until is None
    assert not await _opens(rig, key.secret)
    assert await _opens(rig, at_once.secret or "")


async def test_a_rotation_that_is_sent_again_is_one(rig: Rig) -> None:
    """When the answer was lost the old secret still goes on for its grace, and the secret nobody saw does not."""
    first = rig.tenant.secret
    lost = await _rotate(rig, 60, **{"idempotency-key": "one"})
    seen = await _rotate(rig, 60, **{"idempotency-key": "one"})
    assert seen.previous_until == lost.previous_until
    assert not await _opens(rig, lost.secret or "")
    assert await _opens(rig, seen.secret or "")
    assert await _opens(rig, first)
    other = await _rotate(rig, 60, **{"idempotency-key": "two"})
    assert await _opens(rig, other.secret or "")
    assert await _opens(rig, seen.secret or "")
    assert not await _opens(rig, first)


async def test_a_revoked_key_ends_with_both_secrets(rig: Rig) -> None:
    """Neither the new nor the old one opens anything, and there is nothing left to rotate."""
    key = await _rotate(rig, 60)
    path = f"/river/v1/keys/{rig.tenant.key_id}"
    assert (await rig.admin.http.delete(path)).status_code == 204
    assert not await _opens(rig, rig.tenant.secret)
    assert not await _opens(rig, key.secret or "")
    assert (await rig.admin.http.post(f"{path}/rotate", json={})).status_code == 404
    for grace_s in (-1, 7 * 86_400 + 1):
        refused = await rig.admin.http.post(f"{path}/rotate", json={"grace_s": grace_s})
        assert (refused.status_code, error_of(refused).param) == (422, "grace_s")


async def test_a_key_is_changed_with_the_next_request(rig: Rig) -> None:
    """Scopes and expiry count at once; what is not given stays, and what is wrong changes nothing."""
    path = f"/river/v1/keys/{rig.tenant.key_id}"
    changed = await rig.admin.http.patch(path, json={"scopes": ["infer"], "name": "app"})
    assert (changed.json()["scopes"], changed.json()["name"]) == (["infer"], "app")
    assert (await rig.tenant.get("/learning")).status_code == 403
    assert await _opens(rig, rig.tenant.secret)
    for body, param in (
        ({"scopes": ["infer", "root"]}, "scopes[1]"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"name": ""}, "name"),
    ):
        refused = await rig.admin.http.patch(path, json=body)
        assert (refused.status_code, error_of(refused).param) == (422, param)
    await rig.admin.http.patch(path, json={"expires_at": "2020-01-01T00:00:00Z"})
    assert not await _opens(rig, rig.tenant.secret)
    again = await rig.admin.http.patch(path, json={"expires_at": None})
    assert again.json().get("expires_at") is None
    assert (again.json()["scopes"], again.json()["name"]) == (["infer"], "app")
    assert await _opens(rig, rig.tenant.secret)


async def test_when_a_key_was_last_used_is_known(rig: Rig) -> None:
    """A key that nobody has used has no time, one that was has it, and a refused one leaves it as it was."""

    async def last_used() -> str | None:
        keys = (await rig.admin.get("/keys", tenant="tenant")).json()["keys"]
        return keys[0].get("last_used_at")

    assert await last_used() is None
    assert await _opens(rig, rig.tenant.secret)
    used_at = await last_used()
    assert used_at is not None
    await rig.services.pool.execute(
        "update api_key set last_used_at = now() - interval '1 hour' where key_id = $1",
        rig.tenant.key_id,
    )
    await rig.admin.http.delete(f"/river/v1/keys/{rig.tenant.key_id}")
    assert not await _opens(rig, rig.tenant.secret)
    assert (await last_used() or "") < used_at


async def test_the_command_changes_and_rotates(rig: Rig) -> None:
    """`river keys change` and `river keys rotate`, whose secret then opens the gateway."""
    environment = {"RIVER_BASE_URL": rig.url, "RIVER_API_KEY": rig.admin.secret}

    async def invoke(*arguments: str, code: int = 0) -> str:
        done = await asyncio.to_thread(CliRunner().invoke, river, arguments, env=environment)
        assert done.exit_code == code, done.output
        return done.output.strip()

    key_id = rig.tenant.key_id
    said = await invoke("keys", "change", key_id, "--scope", "infer", "--never-expires")
    assert said == "default: infer, never ends."
    secret = await invoke("keys", "rotate", key_id, "--grace", "1h", "--tinker")
    assert secret.startswith("tml-")
    assert await _opens(rig, secret)
    assert await _opens(rig, rig.tenant.secret)
    await invoke("keys", "rotate", key_id, "--grace", "soon", code=2)


# ---- Between gateways ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _another_gateway(rig: Rig) -> AsyncGenerator[httpx.AsyncClient]:
    """A gateway in a process of its own, asked with the tenant's key."""
    port = free_port()
    settings = rig.services.settings
    environment = {
        **os.environ,
        "RIVER_NATS_URL": settings.nats_url,
        "RIVER_POSTGRES_URL": settings.postgres_url,
        "RIVER_ENGINE_TOKEN": settings.engine_token,
        "RIVER_USAGE_SPOOL_DIR": str(settings.usage_spool),
        "RIVER_PORT": str(port),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "river_gateway.main", env=environment
    )
    headers = {"authorization": f"Bearer {rig.tenant.secret}"}
    try:
        async with (
            asyncio.timeout(START_PATIENCE_S),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as client,
        ):
            while True:
                try:
                    await client.get("/healthz")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def test_changes_reach_another_process_within_a_second(rig: Rig) -> None:
    """On a gateway in another process new limits count, and a revoked key is refused, less than a second later."""
    async with _another_gateway(rig) as client:
        assert (await client.get("/v1/models")).status_code == 200
        path = f"/river/v1/keys/{rig.tenant.key_id}"
        sample = {"model": "nothing", "messages": []}
        await rig.admin.http.patch(f"{path}/limits", json={"requests_per_minute": 1})
        changed_at = time.monotonic()
        statuses: list[int] = []
        while 429 not in statuses:
            statuses.append((await client.post("/v1/chat/completions", json=sample)).status_code)
        assert time.monotonic() - changed_at < 1.0
        assert (await client.get("/v1/models")).status_code == 200
        await rig.admin.http.delete(path)
        revoked_at = time.monotonic()
        while (await client.get("/v1/models")).status_code != 401:
            assert time.monotonic() - revoked_at < 1.0
        assert time.monotonic() - revoked_at < 1.0


async def test_nothing_is_trusted_after_nats_was_away(
    postgres_url: str, own_nats: EmbeddedNats, tmp_path: Path
) -> None:
    """What changed while a gateway could not hear of it counts as soon as NATS is back; limits go on meanwhile."""
    async with running_rig(postgres_url, own_nats.url(), tmp_path) as rig:
        assert (await rig.tenant.http.get("/v1/models")).status_code == 200
        own_nats.stop()
        await eventually(lambda: rig.services.quotas.replicas.cut_off)
        await rig.services.pool.execute("update api_key set revoked_at = now()")
        assert (await rig.tenant.http.get("/v1/models")).status_code == 200
        own_nats.start()
        await eventually(lambda: rig.services.bus.connected)
        await eventually(lambda: not rig.services.quotas.replicas.cut_off)
        assert (await rig.tenant.http.get("/v1/models")).status_code == 401


async def test_a_postgres_out_of_reach_is_away() -> None:
    """A name that does not resolve is no error of the request's: it is told to come again."""
    pool = await open_pool("postgresql://nobody@no-such-host.invalid/river")
    with pytest.raises(UnavailableError):
        await KeyCache(pool).authenticate("Bearer rv-some-key")
    await pool.close()
