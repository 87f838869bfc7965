"""For how long stored completions are kept: a tenant's own time, off, and what has to go goes at once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner, Result
from support.gateway import Rig, error_of
from support.stand_ins import BASE

from river_client.cli import river as command

MESSAGES: Any = [{"role": "user", "content": "x"}]
MANY = 2345
_COPIES = """
insert into stored_completion
select concat(c.completion_id, '-', $2::integer, '-', n), c.tenant_id, c.created_at, now() + make_interval(secs => $1),
  c.model, c.base_model, c.policy_version, c.asked, c.answer, c.metadata, c.tokens, c.kind
from stored_completion c, generate_series(1, $2::integer) n
"""


async def _chat(rig: Rig) -> str:
    chat = rig.tenant.openai.chat.completions
    return (await chat.create(model=BASE, messages=MESSAGES, store=True)).id


async def _change(rig: Rig, kept_s: Any) -> Any:
    return await rig.admin.http.patch(
        f"/river/v1/tenants/{rig.tenant.tenant_id}/retention", json={"completions_kept_s": kept_s}
    )


async def _stored(rig: Rig) -> list[str]:
    return [one.id async for one in rig.tenant.openai.chat.completions.list()]


async def test_off_keeps_nothing(rig: Rig) -> None:
    """0 lets go what was kept, and `store: true` is answered and keeps nothing; the server's time comes back."""
    await _chat(rig)
    assert len(await _stored(rig)) == 1
    off = await _change(rig, 0)
    assert (off.status_code, off.json()["completions_kept_s"]) == (200, 0)
    assert await _stored(rig) == []
    await _chat(rig)
    assert await _stored(rig) == []
    assert (await _change(rig, None)).json().get("completions_kept_s") is None
    completion = await _chat(rig)
    assert await _stored(rig) == [completion]


async def test_a_shorter_time_counts_for_what_is_there(rig: Rig, postgres_url: str) -> None:
    """And a longer one does not bring back what was to go."""
    await _chat(rig)
    connection = await asyncpg.connect(postgres_url)
    try:
        left = "select extract(epoch from max(expires_at) - max(created_at)) from stored_completion"
        await _change(rig, 3600)
        assert float(await connection.fetchval(left)) == pytest.approx(3600.0, abs=1.0)
        await _change(rig, 7200)
        assert float(await connection.fetchval(left)) == pytest.approx(3600.0, abs=1.0)
    finally:
        await connection.close()


@pytest.mark.parametrize("kept_s", [-1, 10**9, "1"])
async def test_an_impossible_time_is_refused(rig: Rig, kept_s: Any) -> None:
    """By name; an unknown tenant is 404."""
    answer = await _change(rig, kept_s)
    assert answer.status_code == 422
    assert error_of(answer).param == "completions_kept_s"
    unknown = await rig.admin.http.patch(
        "/river/v1/tenants/nobody/retention", json={"completions_kept_s": 1}
    )
    assert unknown.status_code == 404


async def test_the_sweeper_takes_all_that_is_due(rig: Rig, postgres_url: str) -> None:
    """Thousands go in one round, with what was thought of them, and what is not due stays."""
    completion = await _chat(rig)
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(_COPIES, 3600.0, 1)
        async with connection.transaction():
            await connection.execute(_COPIES, -1.0, MANY)
            await connection.execute(
                "insert into feedback (completion_id, choice, tenant_id, reward)"
                " select completion_id, 0, tenant_id, 1 from stored_completion"
            )
        left = "select count(*) from stored_completion"
        async with asyncio.timeout(10):
            while await connection.fetchval(left) > 2:  # noqa: ASYNC110 - Postgres has no event to wait for
                await asyncio.sleep(0.05)
        assert await connection.fetchval("select count(*) from feedback") == 2
        # The copy of what the first client was answered.
        assert await _stored(rig) == [completion, completion]
    finally:
        await connection.close()


async def test_the_command(rig: Rig) -> None:
    """`river tenants completions` shows and changes it, in words and as JSON."""

    async def run(*arguments: str) -> Result:
        environment = {"RIVER_API_KEY": rig.admin.secret, "RIVER_BASE_URL": rig.url}
        words = ["tenants", "completions", "tenant", *arguments]
        return await asyncio.to_thread(CliRunner(env=environment).invoke, command, words)

    assert (await run()).output == "Completions are kept for the server's own time.\n"
    assert (await run("--kept", "36h")).output == "Completions are kept for 1 day, 12:00:00.\n"
    assert (await run("--kept", "off")).output == "Completions are not kept.\n"
    assert json.loads((await run("--json")).output)["completions_kept_s"] == 0
    wrong = await run("--kept", "soon")
    assert wrong.exit_code == 2
    assert "'soon' is no time" in wrong.output
    assert "server's own" in (await run("--kept", "default")).output
