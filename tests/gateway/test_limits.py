"""Limits at the gateway's door: held, told as OpenAI tells them, set by administrators, and shared between gateways."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from aiohttp import web
from click.testing import CliRunner
from support.gateway import Rig, Tenant, error_of, eventually, running_rig, served_gateway
from support.quotas import admitted, principal
from support.stand_ins import BASE, COMPLETION_TOKENS, PROMPT_TOKENS, StandInEngine

from river_client import wire
from river_client.cli import river
from river_client.wire import Limits
from river_gateway.bus import Bus
from river_gateway.limits import QUOTA_HOLD_S, QUOTA_TICK_S
from river_gateway.services import open_services
from river_gateway.tenancy.exchange import Exchange
from river_gateway.tenancy.quotas import Quotas

MESSAGES: Any = [{"role": "user", "content": "x"}]
DATUM = wire.Datum(input_ids=[1, 2, 3])


async def _limit(rig: Rig, **limits: int | None) -> wire.ApiKey:
    """Gives the tenant's key these limits."""
    answer = await rig.admin.http.patch(f"/river/v1/keys/{rig.tenant.key_id}/limits", json=limits)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=wire.ApiKey)


async def _limit_tenant(rig: Rig, **limits: int | None) -> wire.Tenant:
    answer = await rig.admin.http.patch("/river/v1/tenants/tenant/limits", json=limits)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=wire.Tenant)


async def _chat(tenant: Tenant, **options: Any) -> Any:
    return await tenant.openai.chat.completions.with_raw_response.create(
        model=BASE, messages=MESSAGES, **options
    )


# ---- At the door -----------------------------------------------------------------------------------------------------


async def test_requests_per_minute(rig: Rig) -> None:
    """The `openai` package raises RateLimitError with OpenAI's code, type, headers and time to wait; others go on."""
    await _limit(rig, requests_per_minute=2)
    first = await _chat(rig.tenant)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert "x-ratelimit-limit-tokens" not in first.headers
    await _chat(rig.tenant, stream=True)
    with pytest.raises(openai.RateLimitError) as refused:
        await _chat(rig.tenant)
    error = refused.value
    assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
    assert "2 requests per minute" in error.message
    assert 28 <= int(error.response.headers["retry-after"]) <= 30
    assert 28_000 <= int(error.response.headers["retry-after-ms"]) <= 30_000
    assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(rig.engines[0].requests) + len(rig.engines[1].requests) == 2
    assert "x-ratelimit-limit-requests" not in (await _chat(rig.stranger)).headers


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_per_minute_are_settled_by_fact(rig: Rig, stream: bool) -> None:
    """What was reserved counts while the request runs, afterwards what was used, streamed or not."""
    await _limit_tenant(rig, tokens_per_minute=6000)
    answer = await _chat(rig.tenant, max_tokens=1000, stream=stream)
    # Of a stream the headers come before its end.
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) <= 6000 - COMPLETION_TOKENS
    if stream:
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) <= 5000
        async for _ in answer.parse():
            pass
    with pytest.raises(openai.RateLimitError) as refused:
        await asyncio.gather(*(_chat(rig.tenant, max_tokens=3000) for _ in range(3)))
    assert refused.value.type == "tokens"
    await asyncio.sleep(0.1)
    after = await _chat(rig.tenant, max_tokens=1)
    used = 6000 - int(after.headers["x-ratelimit-remaining-tokens"])
    assert used <= 4 * (PROMPT_TOKENS + COMPLETION_TOKENS)


async def test_concurrent_requests(rig: Rig) -> None:
    """A request in progress occupies its slot until its end, also one whose client leaves."""
    await _limit(rig, concurrent_requests=1)
    for engine in rig.engines:
        engine.behaviour = "hang"
    running = asyncio.create_task(_chat(rig.tenant))
    await eventually(lambda: any(engine.requests for engine in rig.engines))
    with pytest.raises(openai.RateLimitError, match="1 concurrent requests"):
        await _chat(rig.tenant)
    running.cancel()
    for engine in rig.engines:
        engine.behaviour = "ok"
    async with asyncio.timeout(5):
        while True:
            try:
                await _chat(rig.tenant)
                break
            except openai.RateLimitError:
                await asyncio.sleep(0.02)


async def test_what_fails_costs_no_tokens(rig: Rig) -> None:
    """A request that the engine refuses gives back what it had reserved, and its slot."""
    await _limit(rig, tokens_per_minute=1000, concurrent_requests=1)
    for engine in rig.engines:
        engine.behaviour = "refuse"
    for _ in range(3):
        with pytest.raises(openai.BadRequestError):
            await _chat(rig.tenant, max_tokens=900)


async def test_samples_and_operations_count(rig: Rig) -> None:
    """Of the training API samples and operations are requests, and their tokens tokens; the error is River's."""
    run = await rig.tenant.new_run()
    await _limit(rig, requests_per_minute=3, tokens_per_minute=100)
    sampled = await rig.tenant.post(
        "/sample", wire.SampleRequest(model=BASE, prompt_token_ids=[[1, 2]], max_tokens=2)
    )
    assert sampled.status_code == 200
    assert sampled.headers["x-ratelimit-remaining-requests"] == "2"
    assert sampled.headers["x-ratelimit-remaining-tokens"] == "96"
    accepted = await rig.tenant.submit(run.run_id, 1, wire.Forward(data=[DATUM, DATUM]))
    assert accepted.status_code == 202
    assert accepted.headers["x-ratelimit-remaining-tokens"] == "90"
    big = await rig.tenant.submit(run.run_id, 2, wire.Forward(data=[DATUM] * 31))
    assert big.status_code == 429
    assert error_of(big).type == "rate_limited"
    assert "100 tokens per minute" in error_of(big).message
    assert int(big.headers["retry-after"]) >= 1
    saved = await rig.tenant.submit(run.run_id, 2, wire.SaveWeights(name="x"))
    assert saved.status_code == 202
    assert (await rig.tenant.submit(run.run_id, 3, wire.Forward(data=[DATUM]))).status_code == 429


# ---- Administration --------------------------------------------------------------------------------------------------


async def test_limits_are_set_by_administrators(rig: Rig) -> None:
    """Limits that are given change, null ends one, what is absent stays; a wrong one is named."""
    assert (await _limit(rig, requests_per_minute=5)).limits == Limits(requests_per_minute=5)
    changed = await _limit(rig, tokens_per_minute=10**9, concurrent_requests=2)
    everything = Limits(requests_per_minute=5, tokens_per_minute=10**9, concurrent_requests=2)
    assert changed.limits == everything
    assert (await _limit(rig)).limits == everything
    await _limit(rig, requests_per_minute=None, concurrent_requests=None)
    keys = msgspec.convert((await rig.admin.get("/keys")).json(), wire.Page).keys or []
    assert {key.key_id: key.limits for key in keys} == {
        rig.tenant.key_id: Limits(tokens_per_minute=10**9),
        rig.stranger.key_id: None,
        rig.admin.key_id: None,
    }
    for value in (0, -1, 2**31):
        path = f"/river/v1/keys/{rig.tenant.key_id}/limits"
        answer = await rig.admin.http.patch(path, json={"tokens_per_minute": value})
        assert answer.status_code == 422
        assert error_of(answer).param == "tokens_per_minute"
    for path in ("/keys/key_0/limits", "/tenants/ten_0/limits"):
        assert (await rig.admin.http.patch(f"/river/v1{path}", json={})).status_code == 404
    asked = wire.CreateKey(tenant="tenant", limits=Limits(requests_per_minute=0))
    answer = await rig.admin.post("/keys", asked)
    assert error_of(answer).param == "limits.requests_per_minute"


async def test_limits_are_set_by_command(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`river keys create`, `river keys limits` and `river tenants limits` make, change, end and show limits."""
    monkeypatch.setenv("RIVER_API_KEY", rig.admin.secret)
    monkeypatch.setenv("RIVER_BASE_URL", rig.url)

    async def run(*words: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, river, words)
        assert result.exit_code == 0, result.output
        return result.output.strip()

    made = await run(
        "keys",
        "create",
        "tenant",
        "--requests-per-minute",
        "60",
        "--tokens-per-minute",
        "9000",
        "--json",
    )
    key = msgspec.json.decode(made, type=wire.ApiKey)
    assert key.limits == Limits(requests_per_minute=60, tokens_per_minute=9000)
    changed = await run(
        "keys", "limits", key.key_id, "--requests-per-minute", "none", "--concurrent-requests", "3"
    )
    assert changed == "9000 tokens/min, 3 at once"
    shown = msgspec.json.decode(await run("keys", "limits", key.key_id, "--json"), type=wire.ApiKey)
    assert shown.limits == Limits(tokens_per_minute=9000, concurrent_requests=3)
    assert await run("tenants", "limits", "tenant") == "-"
    await run("tenants", "limits", "tenant", "--tokens-per-minute", "50000")
    assert "50000 tokens/min" in await run("tenants", "list")
    wrong = CliRunner().invoke(river, ["tenants", "limits", "x", "--tokens-per-minute", "0"])
    assert wrong.exit_code == 2


# ---- Several gateways ------------------------------------------------------------------------------------------------


async def test_two_gateways_share_a_limit(rig: Rig) -> None:
    """A key's requests count wherever they go."""
    async with open_services(rig.services.settings) as other, served_gateway(other) as url:
        await _limit(rig, requests_per_minute=6)
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=rig.tenant.secret, max_retries=0)
        await eventually(lambda: other.registered and other.engines.alive())
        count = 0
        async with client:
            for attempt in range(24):
                through = client if attempt % 2 else rig.tenant.openai
                try:
                    await through.chat.completions.create(model=BASE, messages=MESSAGES)
                    count += 1
                except openai.RateLimitError:
                    await asyncio.sleep(0.03)
        assert 6 <= count <= 7


@asynccontextmanager
async def _gateways(nats_url: str, count: int) -> AsyncGenerator[list[Quotas]]:
    """The limits of so many gateways, connected by NATS."""
    async with AsyncExitStack() as stack:
        made: list[Quotas] = []
        for _ in range(count):
            bus, quotas = Bus(), Quotas()
            await bus.connect(nats_url)
            stack.push_async_callback(bus.close)
            exchange = Exchange(bus, quotas)
            await exchange.join()
            task = asyncio.create_task(exchange.run())
            stack.push_async_callback(_end, task)
            made.append(quotas)
        yield made


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_three_gateways_share_a_rate_over_nats(nats_url: str) -> None:
    """Under skewed and shifting load, three connected gateways admit the limit: no more, and not much less."""
    limit = 6000
    who = principal(Limits(requests_per_minute=limit))
    loads = [(600, 5, 0), (5, 5, 600), (200, 200, 200), (0, 900, 30)]
    async with _gateways(nats_url, 3) as gateways:
        assert {quotas.replicas.count for quotas in gateways} == {3}
        started = time.monotonic()
        count = 0
        for load in loads:
            ends = time.monotonic() + 1.5
            last = time.monotonic()
            owed = [0.0] * len(load)
            while (now := time.monotonic()) < ends:
                for index, per_s in enumerate(load):
                    owed[index] += per_s * (now - last)
                    # The first load is a burst: all that there is.
                    asked = limit if load is loads[0] and per_s > 5 else int(owed[index])
                    owed[index] -= int(owed[index])
                    for _ in range(asked):
                        if not admitted(gateways[index], who):
                            break
                        count += 1
                last = now
                await asyncio.sleep(0.005)
        seconds = time.monotonic() - started
    allowed = limit * (1 + (seconds + QUOTA_HOLD_S + QUOTA_TICK_S) / 60)
    assert count <= math.floor(allowed) + 2
    assert count >= 0.93 * limit * (1 + seconds / 60)


async def test_three_gateways_share_slots_over_nats(nats_url: str) -> None:
    """Concurrent requests are counted together, and a slot freed at one gateway can be used at another."""
    who = principal(Limits(concurrent_requests=6))
    async with _gateways(nats_url, 3) as gateways:
        tickets = [await _admit_soon(gateways[index % 3], who) for index in range(6)]
        await asyncio.sleep(0.1)
        assert not any(admitted(quotas, who) for quotas in gateways)
        for ticket in tickets[::3]:
            ticket.settle(0)
        await _admit_soon(gateways[1], who)
        await _admit_soon(gateways[1], who)
        await asyncio.sleep(0.1)
        assert not any(admitted(quotas, who) for quotas in gateways)


async def _admit_soon(quotas: Quotas, who: Any) -> Any:
    return await eventually(lambda: admitted(quotas, who))


# ---- Neighbours ------------------------------------------------------------------------------------------------------

SERVICE_S = 0.1
REFUSED_WAIT_S = 0.3


class SmallEngine(StandInEngine):
    """Answers four requests at a time, each in `SERVICE_S`; others wait."""

    places: asyncio.Semaphore

    async def _openai(self, request: web.Request) -> web.StreamResponse:
        async with self.places:
            await asyncio.sleep(SERVICE_S)
            return await super()._openai(request)


async def _p99_s(rig: Rig, requests: int = 100) -> float:
    await rig.register(rig.engines[0].record())
    times: list[float] = []

    async def ask() -> None:
        for _ in range(requests // 2):
            started = time.perf_counter()
            await _chat(rig.stranger)
            times.append(time.perf_counter() - started)

    await asyncio.gather(ask(), ask())
    return sorted(times)[math.ceil(0.99 * len(times)) - 1]


@asynccontextmanager
async def _flood(rig: Rig, clients: int) -> AsyncGenerator[None]:
    """The tenant asks without end, and waits a little where it is refused."""

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            async with session.post(
                f"{rig.url}/v1/chat/completions",
                json={"model": BASE, "messages": MESSAGES},
                headers={"authorization": f"Bearer {rig.tenant.secret}"},
            ) as answer:
                await answer.read()
            if answer.status == 429:
                await asyncio.sleep(REFUSED_WAIT_S)

    async with aiohttp.ClientSession() as session:
        tasks = [asyncio.create_task(ask(session)) for _ in range(clients)]
        await asyncio.sleep(0.5)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.slow
async def test_a_flooding_tenant_does_not_slow_another(
    postgres_url: str, nats_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of concurrent requests on one tenant its flood leaves another's p99 within 2x, without one not."""
    SmallEngine.places = asyncio.Semaphore(4)
    monkeypatch.setattr("support.gateway.StandInEngine", SmallEngine)
    async with running_rig(postgres_url, nats_url, tmp_path, engines=1) as rig:
        alone_s = await _p99_s(rig)
        async with _flood(rig, clients=32):
            unlimited_s = await _p99_s(rig, requests=10)
        await _limit_tenant(rig, concurrent_requests=2)
        async with _flood(rig, clients=32):
            limited_s = await _p99_s(rig)
    assert limited_s <= 2 * alone_s < unlimited_s
