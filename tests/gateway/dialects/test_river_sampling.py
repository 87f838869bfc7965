"""Samples and chats through the River dialect: what the engines are asked, and how it is collected."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import msgspec
import numpy as np
import pytest
from support.gateway import Rig, eventually
from support.river_dialect import Refused, RiverDialect, gradients, new_model, result
from support.stand_ins import BASE

from river_engine.protocol import EngineSample
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.routing_handle import read_handle
from river_trainer.protocol import RESULTS_STREAM, TRAIN_STREAM


def prompt(**changes: Any) -> pb.InferencePrompt:
    given: dict[str, Any] = {
        "input_ids": [1],
        "max_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
    }
    return pb.InferencePrompt(**given | changes)


async def samples(river: RiverDialect, *prompts: pb.InferencePrompt) -> pb.InferenceResponse:
    asked = pb.InferenceGenerateRequest(base_model=BASE, prompts=prompts)
    accepted = await river.call("InferenceGenerate", asked)
    return (await result(river, accepted.request_id)).inference


def asked_of(rig: Rig) -> list[EngineSample]:
    """What the engines were asked, as it is of each."""
    return [sample for engine in rig.engines for sample in engine.samples]


async def test_equal_prompts_are_one_request(rig: Rig, river: RiverDialect) -> None:
    """Repeats without a seed share the prompt's pass and its bill; seeds are asked for one by one, in their order."""
    answer = await samples(river, prompt(), prompt(), prompt(input_ids=[2]), prompt(input_ids=[2]))
    assert len(answer.results) == 4
    assert sorted((s.prompt_token_ids, s.num_samples) for s in asked_of(rig)) == [
        ([[1]], 2),
        ([[2]], 2),
    ]
    assert answer.usage.prompt_tokens == 2
    await samples(river, prompt(seed=5), prompt(seed=6))
    assert [s.seed for s in asked_of(rig) if s.seed is not None] in ([5, 6], [6, 5])
    events = await rig.usage(4)
    assert {event.tenant_id for event in events} == {rig.tenant.tenant_id}


async def test_a_sample_carries_what_was_asked_for(rig: Rig, river: RiverDialect) -> None:
    """Tokens, log-probabilities, version and counts always; top-K, the prompt's own and the routing when asked for."""
    for engine in rig.engines:
        await rig.register(engine.record(expert_routing=True))
    (plain,) = (await samples(river, prompt())).results
    assert (plain.text, list(plain.token_ids), list(plain.token_logprobs)) == (
        "w0 w1",
        [3, 4],
        [-0.5, -0.25],
    )
    assert (plain.policy_version.id, plain.policy_version.step) == (BASE, 0)
    assert (plain.prompt_tokens, plain.cached_prompt_tokens) == (1, 1)
    assert [(span.end, span.policy_version.id) for span in plain.policy_spans] == [(2, BASE)]
    assert not plain.prompt_token_ids
    assert not plain.HasField("top_logprobs")
    (full,) = (
        await samples(
            river, prompt(logprobs=3, return_expert_routing=True, stop=["x"], top_k=0, top_p=0.5)
        )
    ).results
    (last,) = [sample for sample in asked_of(rig) if sample.logprobs]
    assert (last.logprobs, last.stop, last.top_k, last.top_p) == (3, ["x"], -1, 0.5)
    ids = np.frombuffer(full.top_logprobs.token_ids, "<i4").reshape(2, 3)
    logprobs = np.frombuffer(full.top_logprobs.logprobs, "<f4").reshape(2, 3)
    assert ids.tolist() == [[3, -1, -1], [4, -1, -1]]
    assert logprobs.tolist() == [[-0.5, -np.inf, -np.inf], [-0.25, -np.inf, -np.inf]]
    assert list(full.prompt_token_ids) == [1]
    routing = full.expert_routing
    assert (routing.num_tokens, routing.num_decoder_layers, routing.top_k) == (2, 2, 2)
    experts = read_handle(routing.routing_handle.encode(), "x", tokens=3, size_max_bytes=100)
    assert experts.shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"prompt": "x"}, "INVALID_ARGUMENT", r"prompts\[1\]: give either prompt or input_ids"),
        ({"images": [b"x"]}, "UNIMPLEMENTED", r"prompts\[1\]: images are not supported"),
        (
            {"kv_cache_policy": pb.KvCachePolicy(max_staleness=1)},
            "UNIMPLEMENTED",
            r"prompts\[1\]: keeping the KV cache of an earlier policy",
        ),
    ],
    ids=["both", "images", "kv"],
)
async def test_a_wrong_prompt_is_refused_at_once(
    river: RiverDialect, changes: dict[str, Any], code: str, sentence: str
) -> None:
    """What can be seen without an engine is refused with the prompt's index."""
    with pytest.raises(Refused, match=sentence) as refused:
        await samples(river, prompt(), prompt(**changes))
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_tokens": 64}, "prompts[1].input_ids: 1 tokens and 64 to be drawn are more than"),
        ({"temperature": -1.0}, "prompts[1].temperature: -1.0, must be"),
        ({"input_ids": [9999]}, "prompts[1].input_ids[0]: 9999 is outside the vocabulary"),
    ],
    ids=["length", "temperature", "vocabulary"],
)
async def test_a_wrong_setting_fails_with_its_place(
    rig: Rig, river: RiverDialect, changes: dict[str, Any], sentence: str
) -> None:
    """What the model's limits forbid is the failure that is collected; it names its place, and nothing was drawn."""
    asked = pb.InferenceGenerateRequest(
        base_model=BASE, prompts=[prompt(seed=1), prompt(seed=2, **changes)]
    )
    accepted = await river.call("InferenceGenerate", asked)
    failed = (await result(river, accepted.request_id)).failed
    assert failed.error_category == "invalid_request"
    assert failed.message.startswith(sentence)
    assert asked_of(rig) == []


async def test_sources_that_are_not_there(rig: Rig, river: RiverDialect) -> None:
    """An unknown base, checkpoint or model is NOT_FOUND at once; a checkpoint of another base is named."""
    for name, request, sentence in (
        (
            "InferenceGenerate",
            pb.InferenceGenerateRequest(base_model="none", prompts=[prompt()]),
            "there is no base model 'none'",
        ),
        (
            "SampleFromCheckpoint",
            pb.SampleFromCheckpointRequest(checkpoint_path="river://a/weights/b"),
            "does not exist",
        ),
        ("SampleFromTraining", pb.SampleFromTrainingRequest(model_id="run_1"), "there is no run"),
    ):
        with pytest.raises(Refused, match=sentence) as refused:
            await river.call(name, request)
        assert refused.value.code == "NOT_FOUND"
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x", mode="inference")
    asked = pb.SampleFromCheckpointRequest(
        checkpoint_path=saved.path, base_model="other", prompts=[prompt()]
    )
    with pytest.raises(Refused, match="base_model: 'other', but"):
        await river.call("SampleFromCheckpoint", asked)
    asked.base_model = BASE
    accepted = await river.call("SampleFromCheckpoint", asked)
    (sample,) = (await result(river, accepted.request_id)).inference.results
    assert sample.policy_version.id == saved.policy_version


async def test_samples_of_a_model_come_after_what_was_submitted_before(
    rig: Rig, river: RiverDialect
) -> None:
    """They wait for the queue; the newest snapshot and a pinned policy do not."""
    model_id = await new_model(river)
    rig.trainer.answering = False
    await river.call("ForwardBackward", gradients(model_id, 1))
    training = pb.SampleFromTrainingRequest(model_id=model_id, prompts=[prompt()])
    ordered = await river.call("SampleFromTraining", training)
    poll = pb.RetrieveFutureRequest(request_id=ordered.request_id)
    pending = await river.call("RetrieveFuture", poll, timeout_s=0.8)
    assert pending.HasField("try_again")
    newest = pb.SubmitSamplingBatchRequest(
        policy_selection=pb.SAMPLING_POLICY_SELECTION_LATEST_SNAPSHOT
    )
    pinned = pb.SubmitSamplingBatchRequest(pinned_policy_id=f"{model_id}@0")
    for batch in (newest, pinned):
        batch.idempotency_key = str(uuid.uuid4())
        batch.training.CopyFrom(training)
        (request_id,) = (await river.call("SubmitSamplingBatch", batch)).request_ids
        (sample,) = (await result(river, request_id)).inference.results
        assert sample.policy_version.id == f"{model_id}@0"
    (message,) = [message for message in rig.trainer.messages if message.seq == 1]
    await rig.trainer.answer(message)
    assert len((await result(river, ordered.request_id)).inference.results) == 1


async def test_samples_of_a_run_whose_results_are_gone(rig: Rig, river: RiverDialect) -> None:
    """A run that has long been idle, of which neither journal nor results tell, is sampled and unloaded at once."""
    model_id = await new_model(river)
    jetstream = rig.nats.jetstream()
    for stream in (TRAIN_STREAM, RESULTS_STREAM):
        await jetstream.purge_stream(stream)
    await rig.services.pool.execute("update run set last_seq = 5 where run_id = $1", model_id)
    training = pb.SampleFromTrainingRequest(model_id=model_id, prompts=[prompt()])
    accepted = await river.call("SampleFromTraining", training)
    assert len((await result(river, accepted.request_id)).inference.results) == 1
    unloading = await river.call("UnloadModel", pb.UnloadModelRequest(model_id=model_id))
    poll = pb.RetrieveFutureRequest(request_id=unloading.request_id)
    answer = await river.call("RetrieveFuture", poll, timeout_s=1.0)
    assert answer.HasField("unload_model")


async def test_independent_samples_are_collected_as_they_come(
    rig: Rig, river: RiverDialect
) -> None:
    """Each has an id, the same key gives the same ids, and a look says how each stands as soon as one is done."""
    batch = pb.SubmitSamplingBatchRequest(
        idempotency_key=str(uuid.uuid4()),
        base=pb.InferenceGenerateRequest(
            base_model=BASE, prompts=[prompt(), prompt(), prompt(temperature=-1.0)]
        ),
    )
    first = await river.call("SubmitSamplingBatch", batch)
    assert len(set(first.request_ids)) == 3
    assert await river.call("SubmitSamplingBatch", batch) == first
    asked = pb.RetrieveSamplingResultsRequest(request_ids=[*first.request_ids, "fut_none"])

    found = await river.stream("RetrieveSamplingResults", asked)
    while any(standing.HasField("pending") for standing in found):
        found = await river.stream("RetrieveSamplingResults", asked)
    one, two, wrong, none = found
    assert one.request_id == first.request_ids[0]
    assert len(one.inference.results) == len(two.inference.results) == 1
    assert wrong.failed.message.startswith("prompts[2].temperature")
    assert (none.error.code, none.error.message) == (5, "there is no request 'fut_none'")
    assert len(asked_of(rig)) == 2
    stranger = RiverDialect(river.channel, rig.stranger.secret)
    theirs = await stranger.stream("RetrieveSamplingResults", asked)
    assert [standing.error.code for standing in theirs] == [5] * 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"idempotency_key": ""}, "idempotency_key: missing"),
        ({"pinned_policy_id": "run_1@3"}, "only a model in training has policies"),
        ({"retained_kv_groups": ["x"]}, "keeping the KV cache"),
        ({"base": pb.InferenceGenerateRequest(base_model=BASE)}, "prompts: empty|prompts: 0"),
        (
            {"base": pb.InferenceGenerateRequest(base_model=BASE, prompts=[prompt()] * 129)},
            "prompts: 129, must be 1 to 128",
        ),
    ],
    ids=["key", "pin", "kv", "none", "many"],
)
async def test_a_wrong_batch_is_refused(
    river: RiverDialect, changes: dict[str, Any], sentence: str
) -> None:
    """A batch is refused whole, before anything of it is drawn."""
    given: dict[str, Any] = {
        "idempotency_key": str(uuid.uuid4()),
        "base": pb.InferenceGenerateRequest(base_model=BASE, prompts=[prompt()]),
    }
    with pytest.raises(Refused, match=sentence):
        await river.call("SubmitSamplingBatch", pb.SubmitSamplingBatchRequest(**given | changes))


async def test_what_an_engine_refuses_names_the_prompt(rig: Rig, river: RiverDialect) -> None:
    """An engine's own refusal, of the only prompt it got, is told of the client's prompt."""
    for engine in rig.engines:
        engine.behaviour = "refuse"
    asked = pb.InferenceGenerateRequest(base_model=BASE, prompts=[prompt()])
    accepted = await river.call("InferenceGenerate", asked)
    failed = (await result(river, accepted.request_id)).failed
    assert failed.message == "prompts[0].prompt: too long"


# ---- Chats -----------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "hello"}]


async def chat(river: RiverDialect, **changes: Any) -> pb.ChatCompleteResponse:
    body = msgspec.json.encode({"model": "whatever", "messages": MESSAGES} | changes).decode()
    asked = pb.ChatCompleteFromBaseRequest(base_model=BASE, request_json=body)
    accepted = await river.call("ChatCompleteFromBase", asked)
    return (await result(river, accepted.request_id)).chat_complete


async def test_a_chat_is_the_openai_apis_own(rig: Rig, river: RiverDialect) -> None:
    """The same answer, metered the same; the model is the source's, whatever the body names."""
    answer = await chat(river, max_tokens=4)
    assert answer.status_code == 200
    body = msgspec.json.decode(answer.response_json)
    assert body["choices"][0]["message"]["content"] == "w0 "
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        body["usage"]["prompt_tokens"],
        body["usage"]["completion_tokens"],
    )
    (event,) = await rig.usage(1)
    assert (event.tenant_id, event.base_model) == (rig.tenant.tenant_id, BASE)


async def test_chats_of_checkpoints_and_models_name_their_version(
    rig: Rig, river: RiverDialect
) -> None:
    """The adapter of a checkpoint, or the newest version of a model, answers."""
    run = await rig.tenant.new_run()
    saved = await rig.tenant.save(run.run_id, 1, "x", mode="inference")
    body = msgspec.json.encode({"messages": MESSAGES}).decode()
    for name, request, adapter in (
        (
            "ChatCompleteFromCheckpoint",
            pb.ChatCompleteFromCheckpointRequest(checkpoint_path=saved.path, request_json=body),
            saved.checkpoint_id,
        ),
        (
            "ChatCompleteFromTraining",
            pb.ChatCompleteFromTrainingRequest(model_id=run.run_id, request_json=body),
            f"{run.run_id}@0",
        ),
    ):
        accepted = await river.call(name, request)
        assert (await result(river, accepted.request_id)).chat_complete.status_code == 200
        asked = [headers for engine in rig.engines for headers, _ in engine.requests]
        assert any(adapter in str(headers.get("x-river-adapter")) for headers in asked)


async def test_a_wrong_chat_says_what_the_openai_api_says(river: RiverDialect) -> None:
    """A refused chat has the status and the body of the OpenAI API; one that cannot be begun has a gRPC status."""
    answer = await chat(river, functions=[])
    error = msgspec.json.decode(answer.response_json)["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    with pytest.raises(Refused, match=r"request_json.stream: a chat that is collected later"):
        await chat(river, stream=True)
    asked = pb.ChatCompleteFromBaseRequest(base_model=BASE, request_json="{")
    with pytest.raises(Refused, match="request_json: the body is not valid JSON") as refused:
        await river.call("ChatCompleteFromBase", asked)
    assert refused.value.code == "INVALID_ARGUMENT"


async def test_a_chat_that_an_engine_cannot_take_now_waits(rig: Rig, river: RiverDialect) -> None:
    """While no engine answers a chat is pending, and it is answered once one does."""
    for engine in rig.engines:
        engine.behaviour = "unready"
    waiting = asyncio.create_task(chat(river))
    await eventually(lambda: any(engine.requests for engine in rig.engines))
    for engine in rig.engines:
        engine.behaviour = "ok"
    assert (await waiting).status_code == 200
