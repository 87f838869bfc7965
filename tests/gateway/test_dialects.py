"""OpenAI's Responses and Anthropic's Messages through their own packages, and the fields that each route takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import openai
import pytest
import pytest_asyncio
from support.gateway import Rig, eventually
from support.stand_in_answers import CACHED_TOKENS, COMPLETION_TOKENS, PROMPT_TOKENS
from support.stand_ins import BASE

from river_billing.events import UsageKind
from river_engine.protocol import EngineError
from river_gateway.engines.refusals import refused_by_engine
from river_gateway.inference import completions
from river_gateway.reload import reload_settings

MESSAGES: Any = [{"role": "user", "content": "hello"}]
FULL_USAGE = {
    UsageKind.PROMPT: PROMPT_TOKENS - CACHED_TOKENS,
    UsageKind.CACHED_PROMPT: CACHED_TOKENS,
    UsageKind.COMPLETION: COMPLETION_TOKENS,
}
USAGE_OF_TWO = FULL_USAGE | {UsageKind.COMPLETION: 2}
TEXT = "".join(f"w{index} " for index in range(COMPLETION_TOKENS))

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": BASE, "messages": MESSAGES},
    "/v1/completions": {"model": BASE, "prompt": "hello"},
    "/v1/responses": {"model": BASE, "input": "hello"},
    "/v1/messages": {"model": BASE, "messages": MESSAGES, "max_tokens": 8},
    "/v1/messages/count_tokens": {"model": BASE, "messages": MESSAGES},
}


@pytest_asyncio.fixture
async def claude(rig: Rig) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Anthropic's client; it sends the key as `x-api-key`."""
    async with anthropic.AsyncAnthropic(
        base_url=rig.url, api_key=rig.tenant.secret, max_retries=0
    ) as client:
        yield client


# ---- Responses -------------------------------------------------------------------------------------------------------


async def test_a_response(rig: Rig) -> None:
    """A whole response passes through and is billed by its own usage."""
    raw = await rig.tenant.openai.responses.with_raw_response.create(
        model=BASE, input="hello", store=False, metadata={"a": "b"}, user="ann"
    )
    answer = raw.parse()
    assert (answer.output_text, answer.model, answer.status) == ("w0 ", BASE, "completed")
    assert raw.headers["x-river-policy-version"] == BASE
    assert raw.headers["openai-version"]
    (event,) = await rig.usage(1)
    assert event.quantities == FULL_USAGE
    assert (event.event_id, event.user) == (raw.headers["x-request-id"], "ann")


@pytest.mark.parametrize(
    ("max_tokens", "last"), [(16, "response.completed"), (1, "response.incomplete")]
)
async def test_a_streamed_response(rig: Rig, max_tokens: int, last: str) -> None:
    """A stream shows nothing of the engine's own counting, ends as OpenAI's does, and is billed before its end."""
    body = BODIES["/v1/responses"] | {"stream": True, "max_output_tokens": max_tokens}
    text = (await rig.tenant.http.post("/v1/responses", json=body)).text
    assert "river-usage" not in text
    assert f"event: {last}\ndata: " in text
    stream = await rig.tenant.openai.responses.create(
        model=BASE, input="hello", max_output_tokens=max_tokens, stream=True
    )
    events = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == TEXT
    assert events[-1].type == last
    assert [event.quantities for event in await rig.usage(2)] == [FULL_USAGE] * 2


# ---- Messages --------------------------------------------------------------------------------------------------------


async def test_a_message(rig: Rig, claude: anthropic.AsyncAnthropic) -> None:
    """A whole message passes through and is billed, what came from the cache as such."""
    raw = await claude.messages.with_raw_response.create(
        model=BASE, messages=MESSAGES, max_tokens=8, metadata={"user_id": "ann"}
    )
    answer = await raw.parse()
    assert isinstance(answer, anthropic.types.Message)
    assert answer.content[0].type == "text"
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    (event,) = await rig.usage(1)
    assert event.quantities == FULL_USAGE
    assert (event.event_id, event.user) == (raw.headers["request-id"], "ann")


async def test_a_streamed_message(rig: Rig, claude: anthropic.AsyncAnthropic) -> None:
    """The package's own accumulation of a stream ends in the message, and the bill in what it used."""
    async with claude.messages.stream(model=BASE, messages=MESSAGES, max_tokens=8) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        message = await stream.get_final_message()
    assert text == TEXT
    assert message.usage.output_tokens == COMPLETION_TOKENS
    (event,) = await rig.usage(1)
    assert event.quantities == FULL_USAGE


async def test_counting_tokens_costs_nothing(rig: Rig, claude: anthropic.AsyncAnthropic) -> None:
    """The count comes from the engine; the one bill is that of the message after it."""
    counted = await claude.messages.count_tokens(model=BASE, messages=MESSAGES)
    assert counted.input_tokens == PROMPT_TOKENS
    await claude.messages.create(model=BASE, messages=MESSAGES, max_tokens=8)
    assert len(await rig.usage(1)) == 1


async def test_anthropic_s_errors(rig: Rig, claude: anthropic.AsyncAnthropic) -> None:
    """A bad key, an unknown model and a bad field raise the package's own classes, in Anthropic's shape."""
    bad = claude.with_options(api_key="rv-wrong")
    with pytest.raises(anthropic.AuthenticationError):
        await bad.messages.create(model=BASE, messages=MESSAGES, max_tokens=8)
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await claude.messages.create(model="nobody", messages=MESSAGES, max_tokens=8)
    body: Any = unknown.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "not_found_error"
    assert body["request_id"] == unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await claude.post("/v1/messages", body=BODIES["/v1/messages/count_tokens"], cast_to=object)
    with pytest.raises(anthropic.PermissionDeniedError):
        await claude.with_options(api_key=rig.admin.secret).messages.create(
            model=BASE, messages=MESSAGES, max_tokens=8
        )
    for engine in rig.engines:
        engine.behaviour = "busy"
    with pytest.raises(anthropic.RateLimitError) as busy:
        await claude.messages.create(model=BASE, messages=MESSAGES, max_tokens=8)
    assert "retry-after" in busy.value.response.headers
    for engine in rig.engines:
        engine.behaviour = "fail"
    with pytest.raises(anthropic.APIStatusError) as failed:
        await claude.messages.create(model=BASE, messages=MESSAGES, max_tokens=8)
    assert failed.value.status_code == 503
    assert "secret" not in failed.value.message


# ---- Streams of both -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_leaving_a_typed_stream_bills_what_was_produced(rig: Rig, path: str) -> None:
    """A client that leaves in the middle pays for the tokens that the engine had counted by then."""
    for engine in rig.engines:
        engine.behaviour = "hang"
    body = BODIES[path] | {"stream": True}
    async with rig.tenant.http.stream("POST", path, json=body) as answer:
        async for line in answer.aiter_lines():
            if "w1 " in line:
                break
    await eventually(lambda: sum(engine.cancelled for engine in rig.engines) == 1)
    (event,) = await rig.usage(1)
    assert event.quantities == USAGE_OF_TWO


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_an_engine_lost_in_a_typed_stream(rig: Rig, path: str) -> None:
    """A stream whose engine dies ends with an error event of its own API, and is billed for what came."""
    for engine in rig.engines:
        engine.behaviour = "break"
        engine.may_break.set()
    body = BODIES[path] | {"stream": True}
    answer = await rig.tenant.http.post(path, json=body)
    last = answer.text.strip().split("\n\n")[-1]
    name, data = last.split("\n", 1)
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))
    assert error["type"] == "error"
    assert "engine was lost" in (error.get("error") or error)["message"]
    (event,) = await rig.usage(1)
    assert event.quantities == USAGE_OF_TWO


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", b": keep-alive\n\n"),
        ("/v1/responses", b": keep-alive\n\n"),
        ("/v1/messages", b'event: ping\ndata: {"type":"ping"}\n\n'),
    ],
)
async def test_a_silent_stream_is_kept_alive(
    rig: Rig, path: str, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an engine says nothing its client hears that the stream goes on, and events are never torn apart by it."""
    monkeypatch.setattr(completions, "STREAM_KEEP_ALIVE_S", 0.1)
    for engine in rig.engines:
        engine.behaviour = "hang"
    body = BODIES[path] | {"stream": True}
    received = b""
    async with rig.tenant.http.stream("POST", path, json=body) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        async for data in answer.aiter_bytes():
            received += data
            if received.count(expected) == 3:
                break
    assert b"w1 " in received
    assert received.replace(expected, b"").count(expected.split(b"\n")[0]) == 0


async def test_a_stream_survives_a_reload(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Settings that change while a stream goes on are for the requests after it; a broken file changes nothing."""
    monkeypatch.setattr(completions, "STREAM_KEEP_ALIVE_S", 0.05)
    for engine in rig.engines:
        engine.behaviour = "hang"
    file = tmp_path / "reload.env"
    file.write_text("# rotated\nRIVER_ENGINE_TOKEN = new\n")
    settings = msgspec.structs.replace(rig.services.settings, reload_file=str(file))
    services = dataclasses.replace(rig.services, settings=settings)
    body = BODIES["/v1/responses"] | {"stream": True}
    seen = b""
    async with rig.tenant.http.stream("POST", "/v1/responses", json=body) as answer:
        async for data in answer.aiter_bytes():
            seen += data
            if b"w1 " in seen and seen.count(b": keep-alive") == 1:
                reload_settings(services)
            if seen.count(b": keep-alive") == 4:
                break
    assert services.upstream._authorization[1] == b"Bearer new"
    file.unlink()
    reload_settings(services)
    assert services.upstream._authorization[1] == b"Bearer new"


# ---- Fields ----------------------------------------------------------------------------------------------------------


UNKNOWN = (
    "no_such_field",
    "priority",
    "request_id",
    "cache_salt",
    "kv_transfer_params",
    "vllm_xargs",
    "prompt_embeds",
    "chat_template",
    "use_beam_search",
)


async def test_unknown_and_unsafe_fields_are_refused(rig: Rig) -> None:
    """What no API has, and what of vLLM's reaches beyond the tenant, is unknown: no engine hears of it."""
    for path, body in BODIES.items():
        for name in UNKNOWN:
            answer = await rig.tenant.http.post(path, json=body | {name: 1})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["message"] == f"Unrecognized request argument supplied: {name}"
            assert error["type"] == "invalid_request_error"
            assert error.get("code") is None
            assert error.get("param") is None
    assert not [engine for engine in rig.engines if engine.requests]


NOT_OFFERED: list[tuple[str, str, Any]] = [
    ("/v1/chat/completions", "audio", {"voice": "a", "format": "wav"}),
    ("/v1/chat/completions", "modalities", ["text", "audio"]),
    ("/v1/chat/completions", "functions", []),
    ("/v1/chat/completions", "web_search_options", {}),
    ("/v1/completions", "best_of", 2),
    ("/v1/responses", "store", True),
    ("/v1/responses", "background", True),
    ("/v1/responses", "previous_response_id", "resp_1"),
    ("/v1/responses", "conversation", "conv_1"),
    ("/v1/responses", "prompt", {"id": "x"}),
    ("/v1/responses", "tools", [{"type": "web_search"}]),
    ("/v1/messages", "container", "x"),
    ("/v1/messages", "tools", [{"type": "web_search_20250305", "name": "web_search"}]),
]


async def test_what_is_not_offered_is_named(rig: Rig) -> None:
    """A field that asks for what there is not is refused by its name, rather than answered without it."""
    for path, name, value in NOT_OFFERED:
        answer = await rig.tenant.http.post(path, json=BODIES[path] | {name: value})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert "not" in error["message"]
        if path != "/v1/messages":
            assert error["param"].startswith(name)
            assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (
            "/v1/chat/completions",
            {
                "audio": None,
                "modalities": ["text"],
                "service_tier": "auto",
                "prompt_cache_key": "k",
                "safety_identifier": "s",
                "metadata": {"a": "b"},
                "top_k": 4,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "chat_template_kwargs": {"enable_thinking": False},
                "n": 2,
            },
        ),
        ("/v1/completions", {"best_of": 1, "echo": True, "prompt": [1, 2]}),
        ("/v1/responses", {"store": False, "background": False, "previous_response_id": None}),
        ("/v1/messages", {"mcp_servers": [], "service_tier": "auto", "top_k": 4}),
    ],
)
async def test_fields_pass(rig: Rig, path: str, fields: dict[str, Any]) -> None:
    """Known fields, and refused ones with values that ask for nothing, reach the engine as they came."""
    answer = await rig.tenant.http.post(path, json=BODIES[path] | fields)
    assert answer.status_code == 200, answer.text
    ((_, body),) = [request for engine in rig.engines for request in engine.requests]
    assert body == BODIES[path] | fields


@pytest.mark.parametrize("choices", [0, 129])
async def test_the_number_of_choices_is_bounded(rig: Rig, choices: int) -> None:
    """`n` is what OpenAI lets it be."""
    with pytest.raises(openai.BadRequestError) as refused:
        await rig.tenant.openai.chat.completions.create(model=BASE, messages=MESSAGES, n=choices)
    assert refused.value.param == "n"


# ---- What engines refuse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "param", "expected"),
    [
        (
            "temperature must be non-negative, got -3.0. (parameter=temperature, value=-3.0)",
            "temperature",
            ("temperature must be non-negative, got -3.0.", "temperature", None),
        ),
        (
            "This model's maximum context length is 8 tokens. (parameter=input_tokens, value=9)",
            "input_tokens",
            (
                "This model's maximum context length is 8 tokens.",
                "input_tokens",
                "context_length_exceeded",
            ),
        ),
        (
            "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'x', 'input': '<dict>'}",
            "body.messages",
            (
                "Missing required parameter: 'messages'.",
                "messages",
                "missing_required_parameter",
            ),
        ),
        (
            """2 validation errors: {'type': 'int_type', 'loc': 'body.messages.0.A.s', 'msg': "It isn't", 'input'""",
            "body.x",
            (
                "Invalid value for 'messages[0].s': It isn't",
                "messages[0].s",
                "invalid_type",
            ),
        ),
    ],
)
def test_refusals_of_engines(
    message: str, param: str | None, expected: tuple[str, str | None, str | None]
) -> None:
    """The words of vLLM become OpenAI's: the field by its path, and a code that clients look for."""
    error = refused_by_engine(400, EngineError(type="x", message=message, param=param))
    assert (error.message, error.param, error.code) == expected
