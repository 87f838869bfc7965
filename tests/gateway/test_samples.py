"""Samples that clients log with their runs: kept, bounded, paged, and shown as the text they are."""

from __future__ import annotations

import re
from typing import Any

import httpx
import msgspec
import pytest
from support.dashboard import signed_in
from support.gateway import Rig, Tenant, error_of

from river_client.samples_wire import (
    LoggedCompletion,
    LoggedGroup,
    LogSamples,
    SamplesLogged,
    SamplesPage,
)
from river_gateway.limits import (
    LOGGED_COMPLETIONS_MAX,
    LOGGED_GROUPS_MAX,
    LOGGED_PAGE_MAX,
    LOGGED_TEXT_MAX_CHARS,
)
from river_gateway.training import samples


def group(prompt: str, *texts: str, rewards: list[float | None] | None = None) -> LoggedGroup:
    """A prompt with completions and their rewards."""
    given = rewards or [None] * len(texts)
    pairs = zip(texts, given, strict=True)
    completions = [LoggedCompletion(text=text, reward=reward) for text, reward in pairs]
    return LoggedGroup(prompt=prompt, completions=completions)


async def log(
    tenant: Tenant, run_id: str, *groups: LoggedGroup, step: int | None = None, **options: Any
) -> SamplesLogged:
    """Logs them; the answer."""
    body = LogSamples(groups=list(groups), step=step)
    answer = await tenant.post(f"/runs/{run_id}/samples", body, **options)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=SamplesLogged)


async def read(tenant: Tenant, run_id: str, **params: Any) -> SamplesPage:
    """A page of them."""
    answer = await tenant.get(f"/runs/{run_id}/samples", **params)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=SamplesPage)


async def test_samples_come_back_newest_first(rig: Rig) -> None:
    """By step, by reward, and page by page, every prompt once."""
    run_id = (await rig.tenant.new_run()).run_id
    for step in range(3):
        first = group(f"a{step}", "x", "y", rewards=[0.0, float(step)])
        logged = await log(rig.tenant, run_id, first, group(f"b{step}", "z"), step=step)
        assert logged == SamplesLogged(kept=2)
    whole = await read(rig.tenant, run_id)
    assert [one.prompt for one in whole.samples] == ["b2", "a2", "b1", "a1", "b0", "a0"]
    assert whole.before is None
    assert whole.samples[1].completions == [
        LoggedCompletion(text="x", reward=0.0),
        LoggedCompletion(text="y", reward=2.0),
    ]
    assert whole.samples[0].completions == [LoggedCompletion(text="z")]
    of_step = await read(rig.tenant, run_id, step=1)
    assert [one.prompt for one in of_step.samples] == ["b1", "a1"]
    for bounds, prompts in (
        ({"reward_min": 1.5}, ["a2"]),
        ({"reward_max": 0.5}, ["a2", "a1", "a0"]),
        ({"reward_min": 0.5, "reward_max": 1.5}, ["a1"]),
        ({"reward_min": 3}, []),
    ):
        found = await read(rig.tenant, run_id, **bounds)
        assert [one.prompt for one in found.samples] == prompts, bounds
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 4}
    while True:
        page = await read(rig.tenant, run_id, **params)
        seen += [one.prompt for one in page.samples]
        if page.before is None:
            break
        params["before"] = page.before
    assert seen == [one.prompt for one in whole.samples]


async def test_a_repeated_request_adds_nothing(rig: Rig) -> None:
    """A client that has not heard the answer sends the same again, under the same key."""
    run_id = (await rig.tenant.new_run()).run_id
    for _ in range(2):
        await log(
            rig.tenant, run_id, group("p", "x"), group("q", "y"), headers={"idempotency-key": "one"}
        )
    assert len((await read(rig.tenant, run_id)).samples) == 2


async def test_what_is_too_much_is_counted(rig: Rig) -> None:
    """Of too many prompts and completions the first are kept, of too long texts the beginning; a NUL is shown."""
    run_id = (await rig.tenant.new_run()).run_id
    long = "ä" * (LOGGED_TEXT_MAX_CHARS + 5)
    many = group("nul \0 in it", *["x"] * (LOGGED_COMPLETIONS_MAX + 3))
    groups = [many, group(long, long), *[group("p")] * LOGGED_GROUPS_MAX]
    logged = await log(rig.tenant, run_id, *groups)
    assert logged == SamplesLogged(
        kept=LOGGED_GROUPS_MAX, dropped=2, dropped_completions=3, cut=2, forgotten=0
    )
    found = (await read(rig.tenant, run_id, limit=LOGGED_PAGE_MAX)).samples
    assert found[-1].prompt == "nul ␀ in it"
    assert len(found[-1].completions) == LOGGED_COMPLETIONS_MAX
    cut = found[-2].completions[0].text
    assert cut == "ä" * LOGGED_TEXT_MAX_CHARS + "… [5 more characters were not kept]"


@pytest.mark.parametrize(
    ("per_run", "per_run_bytes", "left"), [(3, 10**6, 3), (100, 30, 2), (100, 5, 0)]
)
async def test_the_oldest_make_room(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, per_run: int, per_run_bytes: int, left: int
) -> None:
    """A run keeps so many prompts, and so many bytes, and says what it forgot; another run's stay."""
    monkeypatch.setattr(samples, "LOGGED_PER_RUN_MAX", per_run)
    monkeypatch.setattr(samples, "LOGGED_PER_RUN_MAX_BYTES", per_run_bytes)
    one, other = (await rig.tenant.new_run()).run_id, (await rig.tenant.new_run()).run_id
    await log(rig.tenant, other, group("o", "o"))
    logged = [
        await log(rig.tenant, one, group("12345", f"{number:05}", "12345")) for number in range(4)
    ]
    assert sum(each.forgotten for each in logged) == 4 - left
    kept = [found.completions[0].text for found in (await read(rig.tenant, one)).samples]
    assert kept == [f"{number:05}" for number in range(4)][::-1][:left]
    assert len((await read(rig.tenant, other)).samples) == 1


async def test_what_is_wrong_is_named(rig: Rig) -> None:
    """No prompts, a reward that is no number, a step or a page out of range."""
    run_id = (await rig.tenant.new_run()).run_id

    async def refused(answer: httpx.Response, param: str) -> None:
        assert answer.status_code == 422, answer.text
        assert error_of(answer).param == param

    path = f"/runs/{run_id}/samples"
    await refused(await rig.tenant.post(path, LogSamples(groups=[])), "groups")
    bad = LogSamples(groups=[group("p"), group("q", "x", "y", rewards=[1.0, float("nan")])])
    packed = await rig.tenant.post(
        path, msgspec.msgpack.encode(bad), headers={"content-type": "application/msgpack"}
    )
    await refused(packed, "groups[1].completions[1].reward")
    await refused(await rig.tenant.post(path, LogSamples(groups=[group("p")], step=-1)), "step")
    for params in ({"limit": 0}, {"limit": LOGGED_PAGE_MAX + 1}, {"step": -1}, {"before": "x"}):
        assert (await rig.tenant.get(path, **params)).status_code == 422, params


async def test_samples_go_with_their_run(rig: Rig) -> None:
    """Nothing is left of a deleted run."""
    run_id = (await rig.tenant.new_run()).run_id
    await log(rig.tenant, run_id, group("p", "x"))
    pool = rig.services.pool
    await pool.execute("delete from run where run_id = $1", run_id)
    assert await pool.fetchval("select count(*) from run_sample") == 0


# ---- The page --------------------------------------------------------------------------------------------------------


async def test_the_page_shows_text_as_text(rig: Rig) -> None:
    """What a model says is neither markup nor script, wherever it is shown; special tokens are text too."""
    run_id = (await rig.tenant.new_run()).run_id
    evil = '</pre><script>alert(1)</script><img src=x onerror="alert(2)"><|im_end|> {{ 7 * 7 }}'
    await log(
        rig.tenant, run_id, group(evil, evil, evil * 8, "", rewards=[1.0, -0.5, None]), step=3
    )
    async with signed_in(rig, rig.tenant) as window:
        page = await window.page(f"/runs/{run_id}/samples")
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "&lt;|im_end|&gt; {{ 7 * 7 }}" in page
        assert not re.search(r"<script(?![^>]* src=)|<img src=x", page)
        assert "reward -0.5" in page
        assert "no reward" in page
        assert "(empty)" in page
        assert "Read the samples" in await window.page(f"/runs/{run_id}")


async def test_the_page_filters_and_pages(rig: Rig) -> None:
    """By step and by reward, with the rest one link away; nonsense in the address is nothing asked for."""
    run_id = (await rig.tenant.new_run()).run_id
    async with signed_in(rig, rig.tenant) as window:
        assert "model.log_samples" in await window.page(f"/runs/{run_id}/samples")
        assert "model.log_samples" in await window.page(f"/runs/{run_id}")
        for step in range(30):
            await log(
                rig.tenant,
                run_id,
                group(f"p{step:02}", "bad", "fine", rewards=[0.0, 1.0]),
                step=step,
            )
        first = await window.page(f"/runs/{run_id}/samples?step=&reward_min=x&reward_max=nan")
        assert "p29" in first
        assert "p09" not in first
        older = re.search(r'href="(/admin/runs/[^"]+before=\d+)"', first)
        assert older is not None
        assert "p09" in await window.page(older[1].removeprefix("/admin").replace("&amp;", "&"))
        page = await window.page(f"/runs/{run_id}/samples?step=7&reward_min=0.5")
        assert "p07" in page
        assert "p08" not in page
        assert ">fine<" in page
        assert ">bad<" not in page
        assert "1 more without" in page
        assert "No sample matches" in await window.page(f"/runs/{run_id}/samples?step=77")


async def test_strangers_see_no_samples(rig: Rig) -> None:
    """The page of another's run is one that nobody has; an admin sees it."""
    run_id = (await rig.tenant.new_run()).run_id
    await log(rig.tenant, run_id, group("secret", "x"))
    for who, status in ((rig.stranger, 404), (rig.admin, 200)):
        async with signed_in(rig, who) as window:
            answer = await window.client.get(f"/admin/runs/{run_id}/samples")
            assert answer.status_code == status
            assert ("secret" in answer.text) == (status == 200)
            if status == 404:
                live = await window.client.get(f"/admin/runs/{run_id}/samples/live")
                assert live.status_code == 404
