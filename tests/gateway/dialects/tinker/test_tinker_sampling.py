"""Sampling through the Tinker dialect's routes: sessions, repetition, limits, credit and many at once."""

from __future__ import annotations

import asyncio
import time
from decimal import Decimal
from typing import Any

import asyncpg
import httpx
import msgspec
import numpy as np
import pytest
from support.gateway import Rig
from support.stand_ins import BASE, CONTEXT_LENGTH
from support.tinker import PROTOBUF, TinkerUser

from river_billing.events import UsageKind
from river_billing.ledger import set_billing
from river_billing.prices import seed_prices, set_price
from river_gateway.dialects.tinker import messages_pb2 as pb
from river_gateway.inference import futures
from river_gateway.tenancy.messages import AccountChanged

MANY = 512


async def new_sampler(user: TinkerUser, session: str, number: int = 0, **model: str) -> str:
    body = {"session_id": session, "sampling_session_seq_id": number}
    made = await user.accepted("/create_sampling_session", body | (model or {"base_model": BASE}))
    return made["sampling_session_id"]


def asked(sampler: str, seq: int = 0, **changes: Any) -> dict[str, Any]:
    """A request for samples of one token of prompt."""
    return {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [7]}]},
        "sampling_params": {"max_tokens": 4, "temperature": 1.0, "top_k": -1, "top_p": 1.0},
        "num_samples": 1,
        "type": "sample",
    } | changes


async def sampled(user: TinkerUser, body: dict[str, Any]) -> pb.SampleResponse:
    accepted = await user.accepted("/asample", body, x_tinker_sampling_backpressure="1")
    answer = await user.result(accepted["request_id"])
    assert answer.headers["content-type"] == PROTOBUF, answer.text
    message = pb.SampleResponse.FromString(answer.content)
    assert len(accepted["sample_sequence_ids"]) == len(message.sequences)
    return message


async def test_samples_of_a_base_model(rig: Rig) -> None:
    """A sampling session says what it is of; its samples come as a message, with what was asked for beside them."""
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    sampler = await new_sampler(user, session, 3)
    assert sampler == f"{session}:sample:3"
    shown = (await user.get(f"/samplers/{sampler}")).json()
    assert shown == {"sampler_id": sampler, "base_model": BASE, "model_path": None}
    body = asked(sampler, num_samples=2, topk_sample_logprobs=1)
    body["sampling_params"] |= {"temperature": 0.5, "stop": [3, 5], "seed": 11}
    message = await sampled(user, body)
    assert [np.frombuffer(s.tokens, "<i4").tolist() for s in message.sequences] == [[3, 4]] * 2
    assert message.sequences[0].stop_reason == pb.STOP_REASON_LENGTH
    assert message.prompt_cache_hit_tokens == 1
    (sample,) = (sample for engine in rig.engines for sample in engine.samples)
    assert (sample.temperature, sample.seed, sample.stop_token_ids) == (0.5, 11, [3, 5])
    assert (sample.adapter, sample.num_samples, sample.logprobs) == (None, 2, 1)
    (event,) = await rig.usage(1)
    assert (event.tenant_id, event.base_model) == (rig.tenant.tenant_id, BASE)


async def test_a_request_sent_twice_is_drawn_once(rig: Rig) -> None:
    """The same number of the same sampling session is the same request; a clone numbers its own."""
    user = TinkerUser(rig.tenant)
    sampler = await new_sampler(user, await user.new_session())
    first, again, other = [
        await user.accepted("/asample", asked(sampler, seq)) for seq in (5, 5, 6)
    ]
    assert first == again != other
    for accepted in (first, other):
        await user.result(accepted["request_id"])
    assert sum(len(engine.samples) for engine in rig.engines) == 2
    body = {"sampling_session_id": sampler}
    numbers = [
        (await user.accepted("/join_sampling_session", body))["client_counter"] for _ in "ab"
    ]
    assert numbers == [1, 2]


async def test_a_sampling_session_is_of_one_model(rig: Rig) -> None:
    """Made again it is the same; under the number of another model it is refused."""
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    model = await user.new_model(session)
    saved = await user.accepted(
        "/save_weights_for_sampler", {"model_id": model, "path": "a", "seq_id": 1}
    )
    path = (await user.result(saved["request_id"])).json()["path"]
    assert path == f"tinker://{model}/sampler_weights/a"
    sampler = await new_sampler(user, session, model_path=path)
    assert await new_sampler(user, session, model_path=path) == sampler
    assert (await user.get(f"/samplers/{sampler}")).json()["model_path"] == path
    await sampled(user, asked(sampler))
    other = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    refused = await user.post("/create_sampling_session", other)
    assert (refused.status_code, "another model" in refused.text) == (422, True)
    for model_of, sentence in (
        ({"base_model": "nobody/model"}, "there is no model 'nobody/model' to sample from"),
        ({"model_path": f"tinker://{model}/weights/none"}, "there is no model"),
    ):
        body = {"session_id": session, "sampling_session_seq_id": 9} | model_of
        unknown = await user.post("/create_sampling_session", body)
        assert (unknown.status_code, sentence in unknown.json()["detail"]) == (404, True)


@pytest.mark.parametrize("kind", ["snapshot", "inflight"])
async def test_weights_without_a_name(rig: Rig, kind: str) -> None:
    """A snapshot samples from what was saved, one in flight from the run's newest version."""
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    model = await user.new_model(session)
    body = {"model_id": model, "sampling_session_seq_id": 0, "seq_id": 1, "kind": kind}
    saved = await user.accepted("/save_weights_for_sampler", body)
    result = (await user.result(saved["request_id"])).json()
    assert (result["path"], result["sampling_session_id"]) == (None, f"{session}:sample:0")
    await sampled(user, asked(result["sampling_session_id"]))
    (sample,) = (sample for engine in rig.engines for sample in engine.samples)
    assert sample.adapter is not None
    assert sample.adapter.name.startswith("ckpt_" if kind == "snapshot" else "run_")


async def test_legacy_requests_name_their_model_themselves(rig: Rig) -> None:
    """Without a sampling session a request says what it is of, and is known again by its idempotency key."""
    user = TinkerUser(rig.tenant)
    body = asked("", base_model=BASE)
    del body["sampling_session_id"], body["seq_id"]
    first = await user.accepted("/asample", body, x_idempotency_key="one")
    assert await user.accepted("/asample", body, x_idempotency_key="one") == first
    assert (await user.result(first["request_id"])).status_code == 200


async def test_what_is_wrong_is_told_before_it_is_taken(rig: Rig) -> None:
    """A request that cannot be understood, or asks for what is out of range, is refused before it is kept."""
    user = TinkerUser(rig.tenant)
    sampler = await new_sampler(user, await user.new_session())
    for changes, status, sentence in (
        ({"prompt_alt_tokens_k": 1}, 422, "prompt_alt_tokens_k: "),
        ({"record_stability_info": True}, 422, "record_stability_info: not offered"),
        ({"images": []}, 422, "unknown field `images`"),
        ({"prompt": {"chunks": []}}, 422, "prompt: empty"),
        ({"sampling_session_id": "ses_0:sample:0"}, 404, "there is no sampling session"),
        ({"sampling_session_id": None}, 422, "base_model: missing, or model_path"),
    ):
        answer = await user.post("/asample", asked(sampler) | changes)
        assert (answer.status_code, sentence in answer.json()["detail"]) == (status, True), (
            answer.text
        )
    params = {"max_tokens": 4}
    for changes, sentence in (
        ({"sampling_params": params | {"temperature": -1}}, "sampling_params.temperature: -1"),
        ({"sampling_params": {"max_tokens": 10**6}}, "prompt: 1 tokens and 1000000 to be drawn"),
        ({"prompt": {"chunks": [{"tokens": [10**6]}]}}, "prompt[0]: 1000000 is outside"),
        ({"prompt": {"chunks": [{"tokens": [1] * 10**6}]}}, "prompt: 1000000 tokens and"),
    ):
        answer = await user.post("/asample", asked(sampler) | changes)
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith(sentence), answer.text
    assert not any(engine.samples for engine in rig.engines)


async def test_too_much_at_once_is_back_pressure(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """429 with a time to wait, and the same number is taken when there is room."""
    monkeypatch.setattr(futures, "FUTURES_OF_TENANT_MAX", 1)
    for engine in rig.engines:
        engine.behaviour = "mute"
    user = TinkerUser(rig.tenant)
    sampler = await new_sampler(user, await user.new_session())
    first = await user.accepted("/asample", asked(sampler, 0))
    full = await user.post("/asample", asked(sampler, 1))
    assert full.status_code == 429
    assert float(full.headers["retry-after-ms"]) > 0
    assert (
        await user.post("/cancel_future", {"request_id": first["request_id"]})
    ).status_code == 200
    for engine in rig.engines:
        engine.behaviour = "ok"
    gone = await user.result(first["request_id"])
    assert gone.status_code == 410
    await sampled(user, asked(sampler, 1))


async def test_without_credit_nothing_is_begun(rig: Rig, postgres_url: str) -> None:
    """402 makes the client wait for credit: no engine hears of the request."""
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    sampler, model = await new_sampler(user, session), await user.new_model(session)
    connection = await asyncpg.connect(postgres_url)
    try:
        await seed_prices(connection)
        for kind in (UsageKind.PROMPT, UsageKind.COMPLETION):
            await set_price(
                connection,
                model=BASE,
                context_length=CONTEXT_LENGTH,
                kind=kind,
                nano_usd_per_unit=Decimal(10_000),
            )
        await set_billing(connection, rig.tenant.tenant_id, "prepaid")
    finally:
        await connection.close()
    rig.services.keys.forget(AccountChanged(tenant_id=rig.tenant.tenant_id))
    answer = await user.post("/asample", asked(sampler))
    assert answer.status_code == 402
    assert "credit" in answer.json()["detail"]
    assert not any(engine.samples for engine in rig.engines)
    assert model


async def test_sessions_end_and_are_told_so(rig: Rig) -> None:
    """A heartbeat is answered while a session is open, and 410 once it is not."""
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    beat = {"session_id": session, "type": "session_heartbeat"}
    assert (await user.accepted("/session_heartbeat", beat))["type"] == "session_heartbeat"
    ended = await rig.tenant.http.delete(f"/river/v1/sessions/{session}")
    assert ended.status_code == 204
    assert (await user.post("/session_heartbeat", beat)).status_code == 410


async def test_keys_are_known_by_either_prefix(rig: Rig) -> None:
    """The client's own header with a `tml-` key is enough; without a key, or with a wrong one, it is 401."""
    secret = "tml-" + rig.tenant.secret.removeprefix("rv-")
    async with httpx.AsyncClient(base_url=rig.url) as http:
        route = "/api/v1/client/config"
        known = await http.post(route, headers={"x-api-key": secret})
        assert known.status_code == 200
        for headers in ({}, {"x-api-key": "tml-" + "0" * 40}):
            answer = await http.post(route, headers=headers)
            assert (answer.status_code, list(answer.json())) == (401, ["detail"])
        assert (await http.get("/api/v1/healthz")).json() == {"status": "ok"}
    models = (await TinkerUser(rig.tenant).get("/get_server_capabilities")).json()
    assert models["supported_models"] == [
        {"model_name": BASE, "max_context_length": 64, "trainable": True, "sampleable": True}
    ]
    told = await TinkerUser(rig.tenant).post("/telemetry", {"events": []})
    assert told.json() == {"status": "accepted"}
    token = await TinkerUser(rig.tenant).post("/auth/token")
    assert (token.status_code, "API keys" in token.json()["detail"]) == (422, True)


async def test_many_samples_at_once(rig: Rig) -> None:
    """512 samples in the air, each waited for by a poll of its own: none fails, and each is drawn once."""
    for engine in rig.engines:
        # On a busy machine it takes longer than an engine may go without a word.
        await rig.register(msgspec.structs.replace(engine.record(), heartbeat_at=time.time() + 60))
    user = TinkerUser(rig.tenant)
    sampler = await new_sampler(user, await user.new_session())
    drawn = await asyncio.gather(*(sampled(user, asked(sampler, seq)) for seq in range(MANY)))
    assert len(drawn) == MANY
    assert sum(len(engine.samples) for engine in rig.engines) == MANY
