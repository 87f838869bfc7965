"""OpenAI's API through the unmodified `openai` package."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import msgspec
import openai
import pytest
from support.gateway import Rig, eventually, served_gateway
from support.stand_in_answers import CACHED_TOKENS, COMPLETION_TOKENS, PROMPT_TOKENS
from support.stand_ins import BASE

from river_billing.events import UsageEvent, UsageKind
from river_client import wire
from river_engine.protocol import ADAPTER_LOADING, StreamUsage
from river_gateway.engines.registry import Engines
from river_gateway.ids import uuid7
from river_gateway.limits import BREAKER_FAILURES

MESSAGES: Any = [{"role": "user", "content": "hello"}]
FULL_USAGE = {
    UsageKind.PROMPT: PROMPT_TOKENS - CACHED_TOKENS,
    UsageKind.CACHED_PROMPT: CACHED_TOKENS,
    UsageKind.COMPLETION: COMPLETION_TOKENS,
}
TEXT = "".join(f"w{index} " for index in range(COMPLETION_TOKENS))


async def test_a_chat_completion(rig: Rig) -> None:
    """A whole answer passes through unchanged; its usage is stored, under the request's id, before it arrives."""
    raw = await rig.tenant.openai.chat.completions.with_raw_response.create(
        model=BASE, messages=MESSAGES, temperature=0.5, user="ann", extra_body={"min_p": 0.1}
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "w0 "
    assert answer.model == BASE
    assert raw.headers["x-river-policy-version"] == BASE
    assert int(raw.headers["openai-processing-ms"]) >= 0
    (event,) = await rig.usage(1)
    assert event.event_id == raw.headers["x-request-id"]
    assert event.quantities == FULL_USAGE
    assert (event.tenant_id, event.key_id) == (rig.tenant.tenant_id, rig.tenant.key_id)
    assert (event.base_model, event.user) == (BASE, "ann")
    headers, body = (rig.engines[0].requests + rig.engines[1].requests)[0]
    assert body == {
        "model": BASE,
        "messages": MESSAGES,
        "temperature": 0.5,
        "user": "ann",
        "min_p": 0.1,
    }
    assert "x-river-adapter" not in headers


@pytest.mark.parametrize("include_usage", [True, False, None])
async def test_a_stream(rig: Rig, include_usage: bool | None) -> None:
    """A stream carries usage at its end if the client asked, never in between, and is billed alike."""
    options: Any = (
        {} if include_usage is None else {"stream_options": {"include_usage": include_usage}}
    )
    stream = await rig.tenant.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, stream=True, **options
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == TEXT
    assert all(chunk.usage is None for chunk in chunks if chunk.choices)
    assert [bool(chunk.usage) for chunk in chunks if not chunk.choices] == [True] * bool(
        include_usage
    )
    (event,) = await rig.usage(1)
    assert event.quantities == FULL_USAGE


async def test_continuous_usage_reaches_who_asked(rig: Rig) -> None:
    """A client that asks for usage in each chunk gets it."""
    stream = await rig.tenant.openai.completions.create(
        model=BASE,
        prompt="hello",
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    assert all([chunk.usage is not None async for chunk in stream])


async def test_usage_is_stored_before_the_end_is_seen(rig: Rig) -> None:
    """Nobody sees `[DONE]` whose bill could still be lost."""
    body = {"model": BASE, "messages": MESSAGES, "stream": True}
    async with rig.tenant.http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                break
        info = await rig.nats.jetstream().stream_info("EVENTS")
    assert info.state.messages == 1


async def test_leaving_a_stream_cancels_and_bills_what_was_produced(rig: Rig) -> None:
    """A client that leaves mid-stream stops the engine and pays for the tokens counted by then."""
    for engine in rig.engines:
        engine.behaviour = "hang"
    stream = await rig.tenant.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, stream=True
    )
    received = [await anext(stream), await anext(stream)]
    assert len(received) == 2
    await stream.close()
    await eventually(lambda: sum(engine.cancelled for engine in rig.engines) == 1)
    (event,) = await rig.usage(1)
    assert event.quantities == {UsageKind.PROMPT: PROMPT_TOKENS, UsageKind.COMPLETION: 2}
    await eventually(lambda: not rig.services.upstream.fleet.outstanding_tokens())


async def test_leaving_a_stream_is_billed_by_the_engine_s_last_word(rig: Rig) -> None:
    """What was produced and cached for a client that left, but not read any more, is on the bill."""
    for engine in rig.engines:
        engine.behaviour = "hang"
        engine.final_usage = StreamUsage(PROMPT_TOKENS, PROMPT_TOKENS - 1, 5)
    stream = await rig.tenant.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, stream=True
    )
    await anext(stream)
    await stream.close()
    (event,) = await rig.usage(1)
    assert event.quantities == {
        UsageKind.PROMPT: 1,
        UsageKind.CACHED_PROMPT: PROMPT_TOKENS - 1,
        UsageKind.COMPLETION: 5,
    }
    await eventually(lambda: sum(engine.cancelled for engine in rig.engines) == 1)


async def test_leaving_a_whole_answer_cancels(rig: Rig) -> None:
    """A client that does not wait for its answer stops the engine too."""
    for engine in rig.engines:
        engine.behaviour = "hang"
    with pytest.raises(openai.APITimeoutError):
        await rig.tenant.openai.with_options(timeout=0.3).chat.completions.create(
            model=BASE, messages=MESSAGES
        )
    await eventually(lambda: sum(engine.cancelled for engine in rig.engines) == 1)
    await eventually(lambda: not rig.services.upstream.fleet.outstanding_tokens())


async def test_an_engine_lost_in_a_stream_ends_it_with_an_error(rig: Rig) -> None:
    """A stream whose engine dies ends with an error event, and is billed for what came."""
    for engine in rig.engines:
        engine.behaviour = "break"
    stream = await rig.tenant.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, stream=True
    )
    _ = [await anext(stream), await anext(stream)]
    for engine in rig.engines:
        engine.may_break.set()
    with pytest.raises(openai.APIError, match="engine was lost"):
        await anext(stream)
    (event,) = await rig.usage(1)
    assert event.quantities == {UsageKind.PROMPT: PROMPT_TOKENS, UsageKind.COMPLETION: 2}


async def test_another_engine_is_tried_before_the_first_byte(rig: Rig) -> None:
    """An engine that is not ready, or gone, is replaced by the other one; when both are, it is 503 with Retry-After."""
    rig.engines[0].behaviour = "unready"
    answer = await rig.tenant.openai.chat.completions.create(model=BASE, messages=MESSAGES)
    assert answer.choices[0].message.content
    await rig.register(rig.engines[0].record(url="http://127.0.0.1:9"))
    answer = await rig.tenant.openai.chat.completions.create(model=BASE, messages=MESSAGES)
    assert answer.choices[0].message.content
    rig.engines[1].behaviour = "unready"
    with pytest.raises(openai.InternalServerError) as refused:
        await rig.tenant.openai.chat.completions.create(model=BASE, messages=MESSAGES)
    assert refused.value.status_code == 503
    assert float(refused.value.response.headers["retry-after"]) > 0


async def test_names_of_models(rig: Rig) -> None:
    """A run, a checkpoint and an alias answer with their adapter and say which version answered."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "final")
    put = await rig.tenant.http.put("/river/v1/aliases/prod", json={"target": saved.path})
    assert put.status_code == 200
    names = [f"river://{run.run_id}", saved.path, "prod"]
    for name in names:
        raw = await rig.tenant.openai.chat.completions.with_raw_response.create(
            model=name, messages=MESSAGES
        )
        assert raw.parse().model == name
        assert raw.headers["x-river-policy-version"] == f"{run.run_id}@0"
    sent = [request for engine in rig.engines for request in engine.requests]
    adapters = [headers["x-river-adapter"] for headers, _ in sent]
    assert sum(f'"{run.run_id}@0"' in adapter for adapter in adapters) == 1
    assert sum(saved.checkpoint_id in adapter for adapter in adapters) == 2
    assert all(body["model"] == BASE for _, body in sent)
    assert all(event.run_id == run.run_id for event in await rig.usage(3))
    listed = {model.id async for model in rig.tenant.openai.models.list()}
    assert listed == {BASE, "prod", saved.path}
    assert (await rig.tenant.openai.models.retrieve(saved.path)).id == saved.path
    assert {model.id async for model in rig.stranger.openai.models.list()} == {BASE}


async def test_the_live_version_moves_at_once(rig: Rig) -> None:
    """Whoever has the result of a step is answered by its version."""
    run = await rig.tenant.new_run()
    adam = wire.AdamParams(lr=1e-3)
    for seq in (1, 2):
        step = wire.TrainStep(data=[wire.Datum(input_ids=[1, 2])], adam=adam)
        await rig.tenant.submit(run.run_id, seq, step)
        result = await rig.tenant.result(f"{run.run_id}-{seq}")
        raw = await rig.tenant.openai.chat.completions.with_raw_response.create(
            model=f"river://{run.run_id}", messages=MESSAGES
        )
        assert (
            raw.headers["x-river-policy-version"] == result.policy_version == f"{run.run_id}@{seq}"
        )


def wrong() -> list[Any]:
    return [
        pytest.param(
            {"model": "nobody/knows"}, openai.NotFoundError, "model_not_found", id="model"
        ),
        pytest.param(
            {"model": "river://run_0/weights/x"}, openai.NotFoundError, "model_not_found", id="path"
        ),
        pytest.param({"stream": "yes"}, openai.BadRequestError, "invalid_type", id="type"),
        pytest.param(
            {"extra_body": {"n": 1.5}}, openai.BadRequestError, "invalid_type", id="fraction"
        ),
        pytest.param({"user": "x" * 257}, openai.BadRequestError, None, id="long user"),
        pytest.param({"user": "a\0"}, openai.BadRequestError, None, id="NUL in user"),
        pytest.param({"model": "a\0"}, openai.NotFoundError, "model_not_found", id="NUL in model"),
    ]


@pytest.mark.parametrize(("change", "kind", "code"), wrong())
async def test_wrong_requests(
    rig: Rig, change: dict[str, Any], kind: type[openai.APIStatusError], code: str | None
) -> None:
    """What is wrong with a request raises the package's own class, with the request's id."""
    with pytest.raises(kind) as refused:
        await rig.tenant.openai.chat.completions.create(
            **{"model": BASE, "messages": MESSAGES} | change
        )
    assert refused.value.code == code
    assert refused.value.request_id
    if "user" in change:
        assert refused.value.param == "user"


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        ("refuse", openai.BadRequestError),
        ("busy", openai.RateLimitError),
        ("fail", openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_s_refusals(
    rig: Rig, behaviour: str, kind: type[openai.APIStatusError], stream: bool
) -> None:
    """An engine's refusal keeps its meaning, in a stream too; its own troubles stay its own."""
    for engine in rig.engines:
        engine.behaviour = behaviour
    with pytest.raises(kind) as refused:
        await rig.tenant.openai.chat.completions.create(
            model=BASE, messages=MESSAGES, stream=stream
        )
    assert "secret" not in refused.value.message
    if behaviour == "refuse":
        assert refused.value.param == "temperature"
        assert "non-negative" in refused.value.message


@pytest.mark.parametrize("type_name", ["not_found", "invalid_adapter"])
async def test_weights_that_cannot_be_loaded(
    rig: Rig, type_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where weights lie is told to the log only; the tenant may try again."""
    run = await rig.tenant.new_run()
    for engine in rig.engines:
        engine.unloadable[f"{run.run_id}@0"] = (type_name, _nothing)
    with pytest.raises(openai.InternalServerError) as refused:
        await rig.tenant.openai.chat.completions.create(
            model=f"river://{run.run_id}", messages=MESSAGES
        )
    assert refused.value.status_code == 503
    assert "retry-after" in refused.value.response.headers
    assert "file://" not in refused.value.message
    assert "file://" in caplog.text


async def test_prompts_that_begin_alike_go_to_one_engine(rig: Rig) -> None:
    """Where their first blocks are cached, whatever else is asked for, and in whatever order; others spread."""
    chat = rig.tenant.openai.chat.completions
    system = {"role": "system", "content": "You answer. " * 50}
    for number in range(8):
        messages: Any = [system, {"role": "user", "content": f"{number}"}]
        answer: Any = await chat.create(
            model=BASE, messages=messages, stream=number % 2 == 0, temperature=0.1 * number
        )
        if number % 2 == 0:
            assert [chunk async for chunk in answer]
    assert sorted(len(engine.requests) for engine in rig.engines) == [0, 8]
    for number in range(16):
        await chat.create(model=BASE, messages=[{"role": "user", "content": f"{number}"}])
    assert min(len(engine.requests) for engine in rig.engines) > 0


@pytest.mark.parametrize("stream", [True, False])
async def test_weights_that_take_long_to_load(rig: Rig, stream: bool) -> None:
    """The client is told what was waited for and when to come back; no other engine begins anew, none is to blame."""
    run = await rig.tenant.new_run()
    for engine in rig.engines:
        engine.unloadable[f"{run.run_id}@0"] = (ADAPTER_LOADING, _nothing)
    for _ in range(2 * BREAKER_FAILURES):
        with pytest.raises(openai.InternalServerError) as refused:
            await rig.tenant.openai.chat.completions.create(
                model=f"river://{run.run_id}", messages=MESSAGES, stream=stream
            )
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "5"
        assert (refused.value.type, refused.value.code) == ("server_error", "model_loading")
        assert "adapter" in refused.value.message
    assert sorted(len(engine.requests) for engine in rig.engines) == [0, 2 * BREAKER_FAILURES]
    assert not any(engine.failing for engine in rig.services.upstream.fleet.everybody())


async def test_a_version_pruned_meanwhile(rig: Rig) -> None:
    """A live version that is replaced and removed while a request is on its way is answered by the newer one."""
    run = await rig.tenant.new_run()

    async def train() -> None:
        for engine in rig.engines:
            for name in engine.unloadable:
                engine.unloadable[name] = ("not_found", _nothing)
        seq = rig.trainer.steps[run.run_id] + 1
        data = [wire.Datum(input_ids=[1, 2])]
        step = wire.TrainStep(data=data, adam=wire.AdamParams(lr=1e-3))
        assert (await rig.tenant.submit(run.run_id, seq, step)).status_code == 202
        await rig.tenant.result(f"{run.run_id}-{seq}")

    for engine in rig.engines:
        engine.unloadable[f"{run.run_id}@0"] = ("not_found", train)
    raw = await rig.tenant.openai.chat.completions.with_raw_response.create(
        model=f"river://{run.run_id}", messages=MESSAGES
    )
    assert raw.headers["x-river-policy-version"] == f"{run.run_id}@1"
    for engine in rig.engines:
        engine.unloadable[f"{run.run_id}@1"] = ("not_found", train)
    asked = wire.SampleRequest(model=f"river://{run.run_id}", prompts=["x"], max_tokens=4)
    answer = await rig.tenant.post("/sample", asked)
    assert answer.json()["policy_version"] == f"{run.run_id}@2"
    assert [event.policy_version for event in await rig.usage(2)] == [
        f"{run.run_id}@1",
        f"{run.run_id}@2",
    ]


async def _nothing() -> None:
    pass


async def test_an_event_that_is_refused_for_good_blocks_nobody(rig: Rig) -> None:
    """A usage event that JetStream will never take is given up, counted, and those behind it get through."""
    fine = UsageEvent(
        event_id=uuid7(),
        occurred_at=1.0,
        tenant_id="ten_a",
        key_id="key_a",
        base_model=BASE,
        context_length=1,
        quantities={UsageKind.PROMPT: 1},
    )
    too_large = msgspec.structs.replace(fine, event_id=uuid7(), user="x" * 300_000)
    far_too_large = msgspec.structs.replace(fine, event_id=uuid7(), user="x" * 2**21)
    meter = rig.services.meter
    await meter.record(too_large)
    assert meter.waiting == 0
    for event in (too_large, far_too_large, fine):
        meter.record_later(event)
    assert await rig.usage(1) == [fine]
    await eventually(lambda: not meter.waiting)
    metrics = (await rig.tenant.http.get("/metrics")).text
    assert "river_gateway_usage_dropped_total 3.0" in metrics


async def test_before_the_registry_has_been_read(rig: Rig) -> None:
    """A gateway that has just started calls no model unknown, and is not ready."""
    engines = Engines(rig.services.bus)
    services = dataclasses.replace(rig.services, engines=engines, stopping=asyncio.Event())
    async with served_gateway(services) as url:
        completion = {"model": BASE, "messages": MESSAGES}
        answer = await rig.tenant.http.post(f"{url}/v1/chat/completions", json=completion)
        assert answer.status_code == 503
        assert float(answer.headers["retry-after"]) > 0
        session = (await rig.tenant.post("/sessions", wire.CreateSession())).json()["session_id"]
        run = {"session_id": session, "base_model": "new/model"}
        answer = await rig.tenant.http.post(f"{url}/river/v1/runs", json=run)
        assert answer.status_code == 503
        assert (await rig.tenant.http.get(f"{url}/readyz")).status_code == 503
        watching = asyncio.create_task(engines.watch())
        await eventually(lambda: engines.loaded)
        assert (await rig.tenant.http.get(f"{url}/readyz")).status_code == 200
        answer = await rig.tenant.http.post(f"{url}/river/v1/runs", json=run)
        assert answer.status_code == 404
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_keys(rig: Rig) -> None:
    """No key, a wrong one, a revoked one and one without the scope are refused as such."""
    for header in ("Basic eA==", "Bearer rv-wrong", "Bearer sk-other", "Bearer rv-" + "x" * 500):
        answer = await rig.tenant.http.get("/v1/models", headers={"authorization": header})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        await rig.admin.openai.chat.completions.create(model=BASE, messages=MESSAGES)
    assert (await rig.tenant.get("/runs")).status_code == 200
    revoked = await rig.admin.http.delete(f"/river/v1/keys/{rig.tenant.key_id}")
    assert revoked.status_code == 204
    with pytest.raises(openai.AuthenticationError):
        await rig.tenant.openai.models.list()


async def test_embeddings_are_not_offered(rig: Rig) -> None:
    """Embeddings answer 501 in the dialect."""
    with pytest.raises(openai.InternalServerError) as refused:
        await rig.tenant.openai.embeddings.create(model=BASE, input="x")
    assert refused.value.status_code == 501
