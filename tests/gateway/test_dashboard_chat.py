"""Chat on the dashboard: which models are offered, and answers that are limited, metered and billed as the API's."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from support.dashboard import Window, signed_in
from support.gateway import Rig, eventually
from support.stand_in_answers import CACHED_TOKENS, COMPLETION_TOKENS, PROMPT_TOKENS
from support.stand_ins import BASE

from river_billing.events import UsageKind
from river_engine.protocol import StreamUsage
from river_gateway.tenancy.accounts import create_key

MESSAGES = [{"role": "user", "content": "1+1="}]


def body(model: Any, **more: Any) -> bytes:
    """What the page's script sends."""
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 8, "temperature": 0.5}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(asked | stream | more)


def headers(window: Window) -> dict[str, str]:
    """The headers of the page's script."""
    return {"content-type": "application/json", "x-csrf-token": window.token}


async def test_the_address_names_both_models(rig: Rig) -> None:
    """Without models the page chooses two; those of the address are chosen, whatever they are."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "good", mode="inference")
    await rig.tenant.http.put("/river/v1/aliases/tutor", json={"target": BASE})
    async with signed_in(rig, rig.tenant) as window:
        answer = await window.client.get(f"/admin/chat?right={BASE}")
        assert answer.status_code == 303
        asked = parse_qs(urlsplit(answer.headers["location"]).query)
        assert asked == {"left": ["tutor"], "right": [BASE]}
        page = await window.page(f"/chat?left={saved.path}&right=<b>x")
        for name in ("tutor", BASE, saved.path, f"river://{run.run_id}"):
            assert f'<option value="{name}"' in page
        assert f'data-model="{saved.path}"' in page
        assert 'data-model="&lt;b&gt;x"' in page
        listed = await window.page(f"/checkpoints?left={saved.path}")
        assert "Comparing" in listed


async def test_only_one_s_own_models_are_offered(rig: Rig) -> None:
    """Another tenant's are neither offered nor answered, to an admin neither: its key has a tenant too."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "good", mode="inference")
    await rig.tenant.http.put("/river/v1/aliases/tutor", json={"target": saved.path})
    async with signed_in(rig, rig.stranger) as window:
        page = await window.page(f"/chat?left={BASE}&right={BASE}&tenant={rig.tenant.tenant_id}")
        assert run.run_id not in page
        assert "tutor" not in page
        for model in (saved.path, f"river://{run.run_id}", "tutor"):
            answer = await window.client.post(
                "/admin/chat", content=body(model), headers=headers(window)
            )
            assert answer.status_code == 404
            assert model in answer.json()["error"]["message"]
    async with signed_in(rig, rig.admin) as window:
        page = await window.page(f"/chat?left={BASE}&right={BASE}")
        assert run.run_id not in page
    assert not any(engine.requests for engine in rig.engines)


async def test_an_answer_streams_and_is_billed(rig: Rig) -> None:
    """A streamed answer comes with its usage, its version, and is recorded as the tenant's and its key's."""
    async with signed_in(rig, rig.tenant) as window:
        answer = await window.client.post(
            "/admin/chat", content=body(BASE), headers=headers(window)
        )
    assert answer.status_code == 200
    assert answer.headers["x-river-policy-version"] == BASE
    assert f'"completion_tokens":{COMPLETION_TOKENS}' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    (event,) = await rig.usage(1)
    assert event.quantities == {
        UsageKind.PROMPT: PROMPT_TOKENS - CACHED_TOKENS,
        UsageKind.CACHED_PROMPT: CACHED_TOKENS,
        UsageKind.COMPLETION: COMPLETION_TOKENS,
    }
    assert (event.tenant_id, event.key_id) == (rig.tenant.tenant_id, rig.tenant.key_id)
    (sent,) = [asked for engine in rig.engines for _, asked in engine.requests]
    assert sent["max_tokens"] == 8
    assert sent["temperature"] == 0.5


async def test_stopping_ends_the_engine_s_work(rig: Rig) -> None:
    """A window that goes away cancels the engine's work and is billed for what was produced."""
    for engine in rig.engines:
        engine.behaviour = "hang"
        engine.final_usage = StreamUsage(
            prompt_tokens=PROMPT_TOKENS, cached_tokens=0, completion_tokens=COMPLETION_TOKENS
        )
    async with signed_in(rig, rig.tenant) as window, asyncio.timeout(20):
        asked = window.client.stream(
            "POST", "/admin/chat", content=body(BASE), headers=headers(window)
        )
        async with asked as answer:
            async for line in answer.aiter_lines():
                if "w1" in line:
                    break
    await eventually(lambda: sum(engine.cancelled for engine in rig.engines) == 1)
    (event,) = await rig.usage(1)
    assert event.quantities == {
        UsageKind.PROMPT: PROMPT_TOKENS,
        UsageKind.COMPLETION: COMPLETION_TOKENS,
    }


async def test_chatting_needs_the_page_s_token(rig: Rig) -> None:
    """No other site can spend a viewer's credit: not without the header, nor with the browser's word against it."""
    async with signed_in(rig, rig.tenant) as window:
        for sent in (
            {},
            {"x-csrf-token": "0"},
            headers(window) | {"sec-fetch-site": "cross-site"},
            headers(window) | {"origin": "https://elsewhere"},
        ):
            answer = await window.client.post("/admin/chat", content=body(BASE), headers=sent)
            assert answer.status_code == 403, sent
    assert not any(engine.requests for engine in rig.engines)


@pytest.mark.parametrize(("field", "value"), [("n", 0), ("model", 1), ("stream", "yes")])
async def test_what_is_wrong_is_said_in_words(rig: Rig, field: str, value: object) -> None:
    """An error comes as JSON with a message that names the field, as on `/v1`, so that the page can show it."""
    async with signed_in(rig, rig.tenant) as window:
        answer = await window.client.post(
            "/admin/chat", content=body(**{"model": BASE, field: value}), headers=headers(window)
        )
        assert answer.status_code == 400
        assert field in answer.json()["error"]["message"]


async def test_a_key_that_may_not_infer_is_told_so(rig: Rig) -> None:
    """The key's scopes count here as everywhere."""
    made = await create_key(rig.services.pool, tenant=rig.tenant.tenant_id, scopes=["train"])
    assert made.secret is not None
    rig.tenant.secret = made.secret
    async with signed_in(rig, rig.tenant) as window:
        answer = await window.client.post(
            "/admin/chat", content=body(BASE), headers=headers(window)
        )
        assert answer.status_code == 403
        assert "infer" in answer.json()["error"]["message"]
