"""A real engine, asked over HTTP."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import msgspec
import openai
import pytest

from river_engine.protocol import AdapterRef, EngineError, EngineSampleGroup, StreamUsage

from .conftest import BASE_MODEL, RunningEngine, adapter_headers
from .reference import token_logprobs

PROMPTS = ["12+30=", "Question: what is 7 times 8?", "a b c d e f g"]
PROMPT_IDS = [[5 + 3 * i + j for i in range(20 + j)] for j in range(3)]
CHAT = [{"role": "user", "content": "What is 3+4?"}]

MakeAdapter = Callable[..., AdapterRef]


@pytest.fixture(scope="session")
def adapters(make_adapter: MakeAdapter) -> tuple[AdapterRef, AdapterRef]:
    return make_adapter(seed=1), make_adapter(seed=2)


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def all_logprobs(group: EngineSampleGroup, sample: int = 0) -> list[float]:
    """Of the prompt after its first token, then of the sample."""
    assert group.prompt_logprobs is not None
    assert group.prompt_logprobs[0] is None
    prompt = [value for value in group.prompt_logprobs if value is not None]
    return prompt + group.samples[sample].logprobs


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_logprobs_are_those_of_transformers_and_peft(
    engine: RunningEngine, tiny_moe: Path, adapters: tuple[AdapterRef, AdapterRef], which: str
) -> None:
    """Of prompts and of what was sampled, with an adapter on attention, experts and head, to 1e-4."""
    adapter = adapters[0] if which == "adapter" else None
    result = engine.sample(
        prompt_token_ids=PROMPT_IDS,
        adapter=adapter,
        num_samples=2,
        max_tokens=12,
        return_prompt_logprobs=True,
    )
    for group in result.groups:
        for index, sample in enumerate(group.samples):
            expected = token_logprobs(tiny_moe, adapter, group.prompt_token_ids + sample.tokens)
            assert largest_difference(all_logprobs(group, index), expected) < 1e-4


def test_rows_of_a_mixed_batch_are_as_alone(
    engine: RunningEngine, adapters: tuple[AdapterRef, AdapterRef]
) -> None:
    """Base model and two adapters at once give what each gives alone, to 1e-5."""

    def ask(adapter: AdapterRef | None) -> list[EngineSampleGroup]:
        return engine.sample(
            prompt_token_ids=PROMPT_IDS,
            adapter=adapter,
            max_tokens=24,
            temperature=0.0,
            return_prompt_logprobs=True,
        ).groups

    asked = (None, *adapters)
    alone = [ask(adapter) for adapter in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(ask, asked))
    for one, many in zip(alone, together, strict=True):
        for group, other in zip(one, many, strict=True):
            assert group.samples[0].tokens == other.samples[0].tokens
            assert largest_difference(all_logprobs(group), all_logprobs(other)) < 1e-5
    assert largest_difference(all_logprobs(alone[0][0])[:15], all_logprobs(alone[1][0])[:15]) > 0.05


def test_logprobs_are_of_the_distribution_drawn_from(engine: RunningEngine, tiny_moe: Path) -> None:
    """At temperature 0.5 they are log-softmax of the doubled logits, and the top ones come most likely first."""
    sample = (
        engine.sample(prompt_token_ids=PROMPT_IDS[:1], temperature=0.5, logprobs=3, max_tokens=8)
        .groups[0]
        .samples[0]
    )
    assert sample.top_logprobs is not None
    assert len(sample.top_logprobs) == len(sample.tokens)
    for token, logprob, row in zip(
        sample.tokens, sample.logprobs, sample.top_logprobs, strict=True
    ):
        values = [value for _, value in row]
        assert len(row) == 3
        assert values == sorted(values, reverse=True)
        assert logprob <= values[0] + 1e-6
        assert dict(row).get(token, logprob) == pytest.approx(logprob)


# ---- Sampling --------------------------------------------------------------------------------------------------------


def test_seeded_samples_differ_and_repeat(engine: RunningEngine) -> None:
    """The samples of a seeded request differ from each other, also of equal prompts, and are the same the next time."""
    fields = {"prompts": [PROMPTS[0]] * 2, "num_samples": 3, "max_tokens": 16, "seed": 7}
    first, second = (
        [sample.tokens for group in engine.sample(**fields).groups for sample in group.samples]
        for _ in range(2)
    )
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == 6


def test_seeded_prompts_may_take_several_steps(engine: RunningEngine) -> None:
    """More seeded prompts than a step has room for get the tokens that each of them gets alone."""
    prompts = [[5 + (7 * i + j) % 400 for j in range(50)] for i in range(120)]
    together = engine.sample(prompt_token_ids=prompts, max_tokens=2, seed=3).groups
    for index in range(0, 120, 7):
        alone = engine.sample(prompt_token_ids=[prompts[index]], max_tokens=2, seed=3 + index)
        assert together[index].samples[0].tokens == alone.groups[0].samples[0].tokens
    again = engine.sample(prompt_token_ids=prompts, max_tokens=2, seed=3).groups
    assert [group.samples[0].tokens for group in again] == [
        group.samples[0].tokens for group in together
    ]


def test_a_special_token_stops_and_is_the_last_token(engine: RunningEngine) -> None:
    """A stop that is one special token is found although it is not text, and is left out of the text."""
    samples = (
        engine.sample(
            prompts=PROMPTS[:1],
            num_samples=16,
            max_tokens=200,
            stop=["<|im_end|>"],
            temperature=1.5,
        )
        .groups[0]
        .samples
    )
    stopped = [sample for sample in samples if sample.stop_reason == "stop"]
    assert stopped
    for sample in samples:
        assert len(sample.tokens) == len(sample.logprobs)
        assert "<|im_end|>" not in sample.text
    assert len({sample.tokens[-1] for sample in stopped}) == 1


def test_a_stop_string_ends_the_text(engine: RunningEngine) -> None:
    """Tokens are what was generated up to it; the text ends before it."""
    free = engine.sample(prompts=PROMPTS[:1], max_tokens=40, temperature=0.0).groups[0].samples[0]
    stop = free.text[3:6]
    sample = (
        engine.sample(prompts=PROMPTS[:1], max_tokens=40, temperature=0.0, stop=[stop])
        .groups[0]
        .samples[0]
    )
    assert sample.stop_reason == "stop"
    assert sample.text == free.text[: free.text.index(stop)]
    assert sample.tokens == free.tokens[: len(sample.tokens)]
    assert len(sample.tokens) == len(sample.logprobs) < len(free.tokens)


def test_text_prompts_get_no_tokens_added(engine: RunningEngine) -> None:
    """The prompt's tokens come back, and sampling from them is the same."""
    by_text = engine.sample(prompts=PROMPTS, max_tokens=5, temperature=0.0).groups
    by_ids = engine.sample(
        prompt_token_ids=[group.prompt_token_ids for group in by_text],
        max_tokens=5,
        temperature=0.0,
    ).groups
    assert [group.samples[0].tokens for group in by_text] == [
        group.samples[0].tokens for group in by_ids
    ]
    assert by_text[0].samples[0].stop_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_token_ids": [[1], [2, 3], [4, 9999]]}, "prompt_token_ids[2][1]"),
        ({"prompt_token_ids": [[1, -1]]}, "prompt_token_ids[0][1]"),
        ({"prompt_token_ids": [[1], []]}, "prompt_token_ids[1]"),
        ({"prompt_token_ids": [[1], [1] * 1000], "max_tokens": 100}, "prompt_token_ids[1]"),
        ({"prompts": [PROMPTS[0] * 500]}, "prompts[0]"),
        ({"prompts": []}, "prompts"),
        ({}, "prompts"),
        ({"prompts": ["a"], "top_p": 0.0}, "top_p"),
        ({"prompts": ["a"], "num_samples": 0}, "num_samples"),
        ({"prompts": ["a"], "logprobs": 1000}, "logprobs"),
        ({"prompts": ["a"], "stop": ["x", ""]}, "stop[1]"),
    ],
)
def test_wrong_fields_are_named(
    engine: RunningEngine, fields: dict[str, object], param: str
) -> None:
    """With the index at fault, and status 422."""
    status, error = engine.refusal(**fields)
    assert (status, error.param) == (422, param), error


def test_a_client_that_goes_away_stops_its_generations(engine: RunningEngine) -> None:
    """Long after it left, nothing of its request runs, and nothing was answered."""
    before = engine.token_counts()
    fields = {"request_id": "impatient", "prompts": PROMPTS, "num_samples": 64, "max_tokens": 900}
    body = msgspec.msgpack.encode(fields)
    with pytest.raises(httpx.ReadTimeout):
        engine.client.post("/river/sample", content=body, timeout=1.0)
    deadline = time.monotonic() + 10.0
    while engine.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.running() == 0
    assert engine.token_counts() == before


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/responses"])
def test_what_a_cut_stream_used_is_known_to_the_token(engine: RunningEngine, route: str) -> None:
    """After its end, the engine says of a request what its own counters have counted for it."""
    before = engine.token_counts()
    asked = {"messages": CHAT} if "chat" in route else {"input": "What is 3+4?"}
    body = {
        "model": BASE_MODEL,
        "stream": True,
        "max_tokens": 500,
        "max_output_tokens": 500,
    } | asked
    with engine.client.stream("POST", route, json=body, headers={"x-request-id": route}) as answer:
        pieces = answer.iter_raw()
        for _ in range(5):
            next(pieces)
    told = engine.client.post("/river/usage", content=route)
    usage = msgspec.json.decode(told.content, type=StreamUsage)
    counted = engine.token_counts()
    grown = {kind: counted[kind] - before[kind] for kind in counted}
    assert usage.completion_tokens == grown["completion"] > 0
    assert usage.cached_tokens == grown["cached_prompt"]
    assert usage.prompt_tokens == grown["prompt"] + grown["cached_prompt"] > 0
    time.sleep(0.5)
    assert engine.token_counts() == counted, "something of it went on"
    assert engine.client.post("/river/usage", content="unknown").status_code == 404


# ---- Adapters --------------------------------------------------------------------------------------------------------


def test_a_bad_adapter_is_refused_and_the_engine_lives(
    engine: RunningEngine, make_adapter: MakeAdapter, adapters: tuple[AdapterRef, AdapterRef]
) -> None:
    """Missing: 404; corrupt: 422; neither is ever answered by the base model, and the next request is."""
    missing = AdapterRef(name="run_gone@1", location=adapters[0].location + "-gone")
    assert engine.refusal(prompts=PROMPTS[:1], adapter=missing)[0] == 404
    corrupt = make_adapter(seed=9)
    weights = Path(unquote(urlsplit(corrupt.location).path)) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    status, error = engine.refusal(prompts=PROMPTS[:1], adapter=corrupt)
    assert (status, error.type) == (422, "invalid_adapter")
    response = engine.client.post(
        "/v1/chat/completions",
        headers=adapter_headers(corrupt),
        json={"model": "x", "messages": CHAT},
    )
    assert response.status_code == 422
    assert msgspec.json.decode(response.content, type=EngineError).type == "invalid_adapter"
    assert engine.sample(prompts=PROMPTS[:1], adapter=adapters[0], max_tokens=2).groups


def test_more_adapters_than_slots_take_turns(
    engine: RunningEngine, make_adapter: MakeAdapter
) -> None:
    """Six adapters on three slots all get their answers, each its own."""
    refs = [make_adapter(seed=seed) for seed in range(20, 26)]

    def ask(ref: AdapterRef) -> list[int]:
        fields = {"prompts": PROMPTS[:1], "max_tokens": 8, "temperature": 0.0}
        return engine.sample(adapter=ref, **fields).groups[0].samples[0].tokens

    with ThreadPoolExecutor(len(refs)) as pool:
        together = list(pool.map(ask, refs))
    assert together == [ask(ref) for ref in refs]


def test_a_publisher_may_remove_its_files(engine: RunningEngine, make_adapter: MakeAdapter) -> None:
    """A version that is loaded stays usable when the directory it came from is gone."""
    ref = make_adapter(seed=30)
    fields = {"prompts": PROMPTS[:1], "max_tokens": 4, "temperature": 0.0, "adapter": ref}
    before = engine.sample(**fields).groups[0].samples[0].tokens
    shutil.rmtree(unquote(urlsplit(ref.location).path))
    assert engine.sample(**fields).groups[0].samples[0].tokens == before


# ---- OpenAI's routes -------------------------------------------------------------------------------------------------


def client(engine: RunningEngine) -> openai.OpenAI:
    token = engine.client.headers["authorization"].removeprefix("Bearer ")
    return openai.OpenAI(base_url=f"{engine.url}/v1", api_key=token, max_retries=0)


def test_chat_answers_with_the_adapter_under_the_public_name(
    engine: RunningEngine, adapters: tuple[AdapterRef, AdapterRef]
) -> None:
    """Whatever `model` the body names, the header's adapter answers, and the name shown is the public one."""
    answers: list[str] = []
    for adapter in (None, *adapters):
        completion = client(engine).chat.completions.create(
            model="anything",
            messages=CHAT,  # type: ignore[arg-type]
            max_tokens=12,
            temperature=0.0,
            extra_headers=adapter_headers(adapter, "team/latest"),
        )
        assert completion.model == "team/latest"
        answers.append(completion.choices[0].message.content or "")
    assert len(set(answers)) == 3


def test_chat_streams_with_the_adapter(
    engine: RunningEngine, adapters: tuple[AdapterRef, AdapterRef]
) -> None:
    """The stream is the answer in pieces, every piece under the public name, with usage at its end."""
    options = {"model": "x", "messages": CHAT, "max_tokens": 12, "temperature": 0.0}
    headers = adapter_headers(adapters[0], "team/latest")
    whole = client(engine).chat.completions.create(**options, extra_headers=headers)  # type: ignore[call-overload]
    chunks = list(
        client(engine).chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}, extra_headers=headers
        )  # type: ignore[call-overload]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {"team/latest"}
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_an_adapter_cannot_be_reached_by_its_name(
    engine: RunningEngine, adapters: tuple[AdapterRef, AdapterRef]
) -> None:
    """A body that names another tenant's loaded adapter gets the base model, and no list shows adapters."""
    engine.sample(prompts=PROMPTS[:1], adapter=adapters[0], max_tokens=1)
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0.0}
    by_name, by_base = (
        engine.client.post("/v1/completions", json={**body, "model": model}).json()
        for model in (adapters[0].name, BASE_MODEL)
    )
    assert by_name["choices"][0]["text"] == by_base["choices"][0]["text"]
    models = engine.client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [BASE_MODEL]


def test_the_token_is_asked_for(engine: RunningEngine) -> None:
    """On every route but health and metrics."""
    with httpx.Client(base_url=engine.url) as stranger:
        for path in ("/healthz", "/readyz", "/health", "/metrics"):
            assert stranger.get(path).status_code == 200
        for path in ("/v1/models", "/river/sample", "/v1/chat/completions", "/nowhere"):
            assert stranger.get(path).status_code == 401
        wrong = {"authorization": "Bearer nonsense"}
        assert stranger.post("/v1/completions", headers=wrong, json={}).status_code == 401


def test_bad_headers_and_bodies_are_refused(engine: RunningEngine) -> None:
    """An adapter header that is not an AdapterRef, and bytes that are not a request."""
    response = engine.client.post("/v1/completions", headers={"x-river-adapter": "{}"}, json={})
    assert response.status_code == 422
    assert engine.client.post("/river/sample", content=b"\xc1").status_code == 422
    assert engine.client.post("/v1/completions", content=b"not json").status_code in (400, 422)


# ---- Counting --------------------------------------------------------------------------------------------------------


def usage_of(body: dict[str, object]) -> dict[str, int]:
    usage = body["usage"]
    assert isinstance(usage, dict)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "prompt": usage["prompt_tokens"] - cached,
        "cached_prompt": cached,
        "completion": usage["completion_tokens"],
    }


def usage_of_groups(groups: list[EngineSampleGroup]) -> dict[str, int]:
    cached = sum(group.cached_prompt_tokens for group in groups)
    return {
        "prompt": sum(len(group.prompt_token_ids) for group in groups) - cached,
        "cached_prompt": cached,
        "completion": sum(len(sample.tokens) for group in groups for sample in group.samples),
    }


def test_counters_are_what_the_answers_report(
    engine: RunningEngine, adapters: tuple[AdapterRef, AdapterRef]
) -> None:
    """Every route adds to the three counters exactly what its answer says, prompts once however many samples."""
    headers = adapter_headers(adapters[0])
    long_prompt = [7 + i % 300 for i in range(100)]
    total: dict[str, int] = {"prompt": 0, "cached_prompt": 0, "completion": 0}
    before = engine.token_counts()

    def add(usage: dict[str, int]) -> None:
        for kind, count in usage.items():
            total[kind] += count

    for _ in range(2):
        groups = engine.sample(
            prompt_token_ids=[long_prompt, [1, 2]], num_samples=4, max_tokens=6
        ).groups
        add(usage_of_groups(groups))
    assert total["cached_prompt"] > 0
    chat = {"model": "x", "messages": CHAT * 6, "max_tokens": 8, "n": 3}
    for _ in range(2):
        add(usage_of(engine.client.post("/v1/chat/completions", headers=headers, json=chat).json()))
    stream = {**chat, "stream": True, "stream_options": {"include_usage": True}}
    with engine.client.stream(
        "POST", "/v1/chat/completions", headers=headers, json=stream
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    add(usage_of(json.loads(lines[-1].removeprefix("data: "))))
    for prompt in ("one prompt", ["two", "prompts " * 20], [long_prompt, long_prompt]):
        add(
            usage_of(
                engine.client.post(
                    "/v1/completions", json={"prompt": prompt, "max_tokens": 4}
                ).json()
            )
        )

    after = engine.token_counts()
    assert {kind: after[kind] - before[kind] for kind in total} == total


def test_the_cached_tokens_of_a_prompt_are_those_it_found(engine: RunningEngine) -> None:
    """Samples of one new prompt find each other's work in the cache; that does not make the prompt a cached one."""
    prompt = [11 + 5 * i % 400 for i in range(90)]
    first = engine.sample(prompt_token_ids=[prompt], num_samples=4, max_tokens=2).groups[0]
    second = engine.sample(prompt_token_ids=[prompt], num_samples=4, max_tokens=2).groups[0]
    assert first.cached_prompt_tokens == 0
    assert 0 < second.cached_prompt_tokens < len(prompt)
