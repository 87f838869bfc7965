"""Usage over time by HTTP, by the SDK and by the command: one's own for a tenant, anybody's for an administrator."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from datetime import UTC, datetime

import msgspec
import pytest
from click.testing import CliRunner
from support.billing import OCCURRED_AT, make_event
from support.gateway import Rig, Tenant, error_of

import river_client as river
from river_billing.prices import seed_prices
from river_billing.recorder import record_events
from river_client.cli import river as command
from river_client.usage_wire import UsageSeries

DAY = {"since": "2026-11-23T00:00:00Z", "until": "2026-11-24T00:00:00Z"}


async def use(rig: Rig) -> None:
    """Three hours of the tenant's, one of the stranger's."""
    async with rig.services.pool.acquire() as connection:
        await seed_prices(connection)
        events = [
            msgspec.structs.replace(
                make_event(
                    hour,
                    tenant_id=rig.tenant.tenant_id,
                    key_id=rig.tenant.key_id,
                    prompt=1000 * (hour + 1),
                    occurred_at=OCCURRED_AT + 3600 * hour,
                ),
                user="=ann",
            )
            for hour in range(3)
        ]
        await record_events(
            connection, [*events, make_event(9, tenant_id=rig.stranger.tenant_id, prompt=7)]
        )


async def rows(who: Tenant, **params: str) -> list[tuple[str, str, int]]:
    answer = await who.get("/usage/series", **{**DAY, **params})
    assert answer.status_code == 200, answer.text
    series = msgspec.json.decode(answer.content, type=UsageSeries)
    return [(row.tenant, row.period[11:13], row.quantity) for row in series.rows]


async def test_a_tenant_reads_its_own(rig: Rig) -> None:
    """A tenant has its own rows and may not ask for others'; an administrator may, by id, name or all."""
    await use(rig)
    own = [
        (rig.tenant.tenant_id, hour, (n + 1) * 1000) for n, hour in enumerate(["12", "13", "14"])
    ]
    foreign = (rig.stranger.tenant_id, "12", 7)
    assert await rows(rig.tenant, every="hour") == own
    assert await rows(rig.tenant) == [(rig.tenant.tenant_id, "00", 6000)]
    assert await rows(rig.stranger, every="hour") == [foreign]
    assert await rows(rig.admin, every="hour", tenant="stranger") == [foreign]
    everybody = await rows(
        rig.admin, every="hour", tenant="*", group="model,kind,tier,key,user,run"
    )
    assert sorted(everybody) == sorted([*own, foreign])
    for tenant in ("*", rig.stranger.tenant_id, "unknown"):
        refused = await rig.tenant.get("/usage/series", tenant=tenant)
        assert refused.status_code == 403
    assert (await rig.admin.get("/usage/series", tenant="unknown")).status_code == 404


async def test_csv_by_accept_and_by_format(rig: Rig) -> None:
    """CSV comes as an attachment, asked for by Accept or by `format`."""
    await use(rig)
    by_accept = await rig.tenant.http.get(
        "/river/v1/usage/series", params={**DAY, "group": "user"}, headers={"accept": "text/csv"}
    )
    by_format = await rig.tenant.get("/usage/series", **DAY, group="user", format="csv")
    assert by_accept.text == by_format.text
    assert by_accept.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in by_accept.headers["content-disposition"]
    header, row = csv.reader(io.StringIO(by_accept.text))
    assert header[:5] == ["period", "tenant", "kind", "user", "quantity"]
    assert row[3:5] == ["'=ann", "6000"]


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"every": "week"}, "every"),
        ({"group": "model,color"}, "group[1]"),
        ({"since": "yesterday"}, "since"),
        ({"since": "2026-11-23T00:30:00Z", "every": "hour"}, "since"),
        ({"until": "2026-11-22T00:00:00Z"}, "until"),
        ({"since": "2020-01-01T00:00:00Z"}, "since"),
        ({"limit": "0"}, "limit"),
        ({"limit": "10001"}, "limit"),
        ({"after": "x"}, "after"),
    ],
    ids=str,
)
async def test_bad_questions_name_their_field(rig: Rig, params: dict[str, str], param: str) -> None:
    """What cannot be answered is a 422 that says which parameter is wrong, as CSV too."""
    answer = await rig.tenant.get("/usage/series", **{**DAY, **params})
    assert (answer.status_code, error_of(answer).param) == (422, param)
    assert error_of(answer).message.startswith(param)


async def test_the_sdk_and_the_command(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK reads all pages, and the command prints rows as a table, JSON and CSV."""
    await use(rig)
    monkeypatch.setattr("river_client.limits.USAGE_PAGE_ROWS", 2)
    since, until = datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 11, 24, tzinfo=UTC)
    async with river.AsyncClient(rig.tenant.secret, rig.url) as client:
        read = [
            row.quantity
            async for row in client.usage_rows(
                every="hour", group=("key",), since=since, until=until
            )
        ]
    assert read == [1000, 2000, 3000]
    monkeypatch.setenv("RIVER_BASE_URL", rig.url)
    monkeypatch.setenv("RIVER_API_KEY", rig.tenant.secret)

    async def run(*words: str) -> str:
        done = await asyncio.to_thread(
            CliRunner().invoke,
            command,
            [
                "usage",
                "--since",
                "2026-11-23T00:00+0000",
                "--until",
                "2026-11-24T00:00+0000",
                *words,
            ],
        )
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    printed = json.loads(await run("--by", "hour", "--group", "user", "--json"))
    assert [(row["user"], row["quantity"]) for row in printed] == [
        ("=ann", 1000),
        ("=ann", 2000),
        ("=ann", 3000),
    ]
    table = (await run("--by", "day", "--group", "")).splitlines()
    assert table[0].split() == ["PERIOD", "TENANT", "KIND", "QUANTITY", "USD"]
    assert table[1].split()[-2:] == ["6,000", "0.00006"]
    assert (await run("--csv")).splitlines()[0].startswith("period,tenant,kind,model,tier,quantity")
    assert (await run("--csv", "--by", "hour")).count("\n") == 4
    assert CliRunner().invoke(command, ["usage", "--group", "color"]).exit_code == 2
