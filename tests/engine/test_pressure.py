"""The situations in which vLLM by itself dies for everybody or lets some starve, on a real engine through our door.

Two adapter slots, three adapters loaded at most, sixteen sequences at once, and a queue of forty for each tenant.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.parse import unquote, urlsplit

import httpx
import msgspec
import pytest
from support.slow_store import OPTIONS, slow_store

from river_engine.adapter_files import WEIGHTS_FILE
from river_engine.protocol import ADAPTER_LOADING, TENANT_HEADER, AdapterRef, EngineError
from river_engine.stores import OPTIONS_VARIABLE

from .conftest import RunningEngine, adapter_headers, running_engine

MakeAdapter = Callable[..., AdapterRef]
PROMPT = [5 + 3 * i for i in range(20)]
QUEUE, SEQUENCES = 40, 16
ADAPTER_WAIT_S = 5.0
WITHIN_S = 20.0


@pytest.fixture(scope="module")
def small(
    tiny_moe: Path, nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEngine]:
    """Whose environment asks vLLM for its routes that load adapters and reach into the engine."""
    with running_engine(
        tiny_moe,
        nats_url,
        tmp_path_factory.mktemp("small"),
        RIVER_ENGINE_ID="eng-small",
        RIVER_MAX_LORAS="2",
        RIVER_MAX_CPU_LORAS="3",
        RIVER_MAX_LORA_RANK="16",
        RIVER_MAX_NUM_SEQS=str(SEQUENCES),
        RIVER_QUEUE_TENANT_MAX=str(QUEUE),
        RIVER_ADAPTER_WAIT_S=str(ADAPTER_WAIT_S),
        **{OPTIONS_VARIABLE: OPTIONS},
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
        VLLM_SERVER_DEV_MODE="1",
    ) as running:
        yield running


def directory_of(ref: AdapterRef) -> Path:
    return Path(unquote(urlsplit(ref.location).path))


def tokens_of(engine: RunningEngine, ref: AdapterRef | None, length: int) -> list[int]:
    """What `ref` answers to the prompt."""
    fields = {"prompt_token_ids": [PROMPT], "max_tokens": length, "temperature": 0.0}
    tenant = "base" if ref is None else ref.name
    group = engine.sample(adapter=ref, tenant_id=tenant, **fields).groups[0]
    return group.samples[0].tokens


def wait_until(condition: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "not so in time"
        time.sleep(0.02)


def asked(engine: RunningEngine) -> int:
    """Prompts at the engine, waiting or inside."""
    return engine.gauge("waiting{") + engine.gauge("inside")


@contextmanager
def flood(concurrency: int, ask: Callable[[], object]) -> Iterator[list[object]]:
    """`concurrency` askers, each with its next request as soon as the last is answered; yields the answers."""
    answers: list[object] = []
    stopped = threading.Event()

    def go_on() -> None:
        while not stopped.is_set():
            answers.append(ask())

    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(go_on) for _ in range(concurrency)]
        try:
            yield answers
        finally:
            stopped.set()
        for future in futures:
            future.result()


# ---- Deaths ----------------------------------------------------------------------------------------------------------


def test_files_may_go_while_requests_run_and_wait(
    small: RunningEngine, make_adapter: MakeAdapter
) -> None:
    """Eight versions at once, where vLLM holds three, their publisher's files gone: each gets its own answer.

    vLLM drops what was used least recently and reads it again at the step that needs it; that read failing is the end
    of the engine.
    """
    refs = [make_adapter(seed=seed) for seed in range(100, 108)]
    expected = [tokens_of(small, ref, 150) for ref in refs]
    assert len({tuple(tokens) for tokens in expected}) == len(refs)
    with ThreadPoolExecutor(2 * len(refs)) as pool:
        answers = [pool.submit(tokens_of, small, ref, 150) for ref in refs * 2]
        wait_until(lambda: asked(small) == 2 * len(refs))
        for ref in refs:
            shutil.rmtree(directory_of(ref))
        assert [answer.result() for answer in answers] == expected * 2
    assert tokens_of(small, None, 4)


def test_versions_of_one_run_may_follow_each_other(
    small: RunningEngine, make_adapter: MakeAdapter
) -> None:
    """New versions come while requests to older ones run and wait; every answer is of the version it asked for.

    Two live versions under one name, or more than there are slots for, kill vLLM.
    """
    made = [make_adapter(seed=seed) for seed in range(120, 132)]
    refs = [
        AdapterRef(name=f"run_churn@{step}", location=ref.location) for step, ref in enumerate(made)
    ]
    answers: list[Future[list[int]]] = []
    with ThreadPoolExecutor(3 * len(refs)) as pool:
        for ref in refs:
            answers += [pool.submit(tokens_of, small, ref, 60) for _ in range(3)]
            time.sleep(0.03)
    expected = [tokens_of(small, ref, 60) for ref in refs]
    assert len({tuple(tokens) for tokens in expected}) == len(refs)
    assert [answer.result() for answer in answers[::3]] == expected
    assert [answer.result() for answer in answers[2::3]] == expected


def test_unfit_adapters_disturb_nobody(small: RunningEngine, make_adapter: MakeAdapter) -> None:
    """Corrupt, too large, missing, or spoilt after it has been served: refused, while others' requests go on."""
    good, corrupt, spoilt = (make_adapter(seed=seed) for seed in (140, 141, 142))
    large = make_adapter(seed=143, rank=32)
    weights = directory_of(corrupt) / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:5000])
    missing = AdapterRef(name="run_gone@1", location=good.location + "-gone")
    before = tokens_of(small, good, 300)
    tokens_of(small, spoilt, 4)
    for seed in (144, 145, 146):  # Which push it out.
        tokens_of(small, make_adapter(seed=seed), 1)
    # In place, and so in what the engine has of it, too.
    (directory_of(spoilt) / WEIGHTS_FILE).write_bytes(b"junk")
    with ThreadPoolExecutor(2) as pool:
        beside = [pool.submit(tokens_of, small, good, 300) for _ in range(2)]
        for ref, status in ((corrupt, 422), (large, 422), (spoilt, 422), (missing, 404)):
            fields = {"prompt_token_ids": [PROMPT], "adapter": ref, "max_tokens": 4}
            assert small.refusal(**fields)[0] == status
            response = small.client.post(
                "/v1/completions", headers=adapter_headers(ref), json={"prompt": PROMPT}
            )
            assert response.status_code == status
        assert [answer.result() for answer in beside] == [before] * 2


def test_clients_may_leave_while_their_adapter_is_pushed_out(
    small: RunningEngine, make_adapter: MakeAdapter
) -> None:
    """Streams broken off at their first piece, then their adapter taken out of vLLM and its files away."""
    body = {"prompt": PROMPT, "max_tokens": 900, "stream": True}
    for seed in range(150, 154):
        ref = make_adapter(seed=seed)
        with small.client.stream(
            "POST", "/v1/completions", headers=adapter_headers(ref), json=body
        ) as stream:
            shutil.rmtree(directory_of(ref))
            next(stream.iter_lines())
        for other in (seed + 10, seed + 20, seed + 30):
            tokens_of(small, make_adapter(seed=other), 1)
    wait_until(lambda: asked(small) == 0)
    assert tokens_of(small, None, 4)


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc", "/sleep", "/pause"],
)
def test_nobody_reaches_past_the_door(small: RunningEngine, path: str) -> None:
    """The routes that load, drop or pin adapters are closed, whatever the environment asks for."""
    body = {"lora_name": "x", "lora_path": "/x", "method": "pin_lora", "args": [1]}
    assert small.client.post(path, json=body).status_code == 404


# ---- Slow stores -----------------------------------------------------------------------------------------------------


def test_first_requests_wait_for_an_adapter_so_long_and_no_longer(
    small: RunningEngine, make_adapter: MakeAdapter
) -> None:
    """On either route, many at once: told to come back, and then answered by the adapter, which was fetched once."""
    local = make_adapter(seed=180)
    expected = tokens_of(small, local, 20)
    with slow_store(directory_of(local).parent) as slow, ThreadPoolExecutor(8) as pool:
        location = f"{slow.url}/{directory_of(local).name}"
        ref = AdapterRef(name="run_slow@1", location=location)
        body = {"prompt": PROMPT, "max_tokens": 4}
        started = time.monotonic()
        asking = [
            pool.submit(
                small.client.post, "/v1/completions", headers=adapter_headers(ref), json=body
            )
            for _ in range(4)
        ]
        status, error = small.refusal(prompt_token_ids=[PROMPT], adapter=ref, max_tokens=4)
        assert ADAPTER_WAIT_S <= time.monotonic() - started < 2 * ADAPTER_WAIT_S
        assert (status, error.type) == (503, ADAPTER_LOADING)
        assert f"waited {ADAPTER_WAIT_S:g} s for adapter run_slow@1" in error.message
        for answer in asking:
            response = answer.result()
            assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert tokens_of(small, None, 4), "others are served meanwhile"
        again = pool.submit(tokens_of, small, ref, 20)
        slow.may_answer.set()
        assert again.result() == expected
        assert set(slow.asked.values()) == {1}
    assert small.client.get("/readyz").status_code == 200


def test_those_who_wait_for_a_slow_store_fill_the_queue(
    small: RunningEngine, make_adapter: MakeAdapter
) -> None:
    """So a tenant cannot have any number of requests here by naming an adapter that does not come; others can ask."""
    local = make_adapter(seed=181)
    with slow_store(directory_of(local).parent) as slow, ThreadPoolExecutor(1) as pool:
        ref = AdapterRef(name="run_slow@2", location=f"{slow.url}/{directory_of(local).name}")
        many = {"prompt_token_ids": [PROMPT] * QUEUE, "max_tokens": 4, "tenant_id": "bob"}
        asking = pool.submit(small.sample, adapter=ref, **many)
        wait_until(lambda: small.gauge('waiting{reason="adapter"}') == QUEUE)
        status, error = small.refusal(prompt_token_ids=[PROMPT], tenant_id="bob")
        assert (status, error.type) == (429, "busy")
        assert tokens_of(small, None, 4)
        slow.may_answer.set()
        assert len(asking.result().groups) == QUEUE


# ---- Starvation ------------------------------------------------------------------------------------------------------


def test_a_third_adapter_gets_its_answer_beside_two_busy_ones(
    small: RunningEngine, make_adapter: MakeAdapter
) -> None:
    """Where vLLM would let it wait for as long as the other two are asked for; base requests never wait for slots."""
    busy = [make_adapter(seed=seed) for seed in (200, 201)]
    third = make_adapter(seed=202)
    expected = tokens_of(small, third, 20)
    with (
        flood(4, lambda: tokens_of(small, busy[0], 80)) as first,
        flood(4, lambda: tokens_of(small, busy[1], 80)) as second,
    ):
        wait_until(lambda: len(first) >= 4 and len(second) >= 4)
        took_s: list[float] = []
        for _ in range(3):
            started = time.monotonic()
            assert tokens_of(small, third, 20) == expected
            took_s.append(time.monotonic() - started)
            assert tokens_of(small, None, 4)
        before = len(first), len(second)
        wait_until(lambda: len(first) > before[0] + 4 and len(second) > before[1] + 4)
    assert max(took_s) < WITHIN_S / 2, took_s


def test_a_flood_leaves_another_tenant_its_answers(small: RunningEngine) -> None:
    """Bob keeps all the room and the queue full and is told to come later; Ann's requests take their usual time.

    The steps themselves take longer with more in them, on a CPU: the bound is for that. What waiting adds is tested on
    a clock of its own.
    """
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0.0, "ignore_eos": True}

    def ask(tenant: str, **changes: object) -> httpx.Response:
        headers = {TENANT_HEADER: tenant}
        return small.client.post("/v1/completions", headers=headers, json=body | changes)

    def timed() -> float:
        started = time.monotonic()
        assert ask("ann").status_code == 200
        return time.monotonic() - started

    alone_s = median(timed() for _ in range(10))
    refusals: list[httpx.Response] = []

    def ask_again() -> None:
        response = ask("bob", max_tokens=120)
        if response.status_code != 200:
            refusals.append(response)
            time.sleep(0.2)

    with flood(QUEUE + SEQUENCES + 4, ask_again):
        wait_until(lambda: bool(refusals))
        beside_s = median(timed() for _ in range(10))
        waiting = small.gauge("waiting{")
    assert beside_s < 6 * alone_s, (alone_s, beside_s)
    assert waiting > QUEUE / 2
    assert {response.status_code for response in refusals} == {429}
    assert all(1 <= int(response.headers["retry-after"]) <= 30 for response in refusals)
    assert msgspec.json.decode(refusals[0].content, type=EngineError).type == "busy"
    status = small.client.get("/readyz").status_code
    assert status == 200, "a full engine is a healthy one"


def test_a_request_with_many_prompts_lets_others_in(small: RunningEngine) -> None:
    """Its prompts go in as there is room; another tenant's single one is not behind all of them."""
    many = {
        "prompt_token_ids": [PROMPT] * QUEUE,
        "num_samples": 4,
        "max_tokens": 100,
        "tenant_id": "bob",
    }
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(small.sample, **many)
        wait_until(lambda: small.gauge("waiting{") > QUEUE / 2)
        assert tokens_of(small, None, 5)
        assert not batch.done()
        groups = batch.result().groups
    assert [len(group.samples) for group in groups] == [4] * QUEUE
    status, error = small.refusal(
        **(many | {"prompt_token_ids": [PROMPT] * (QUEUE + 1), "num_samples": 1})
    )
    assert (status, error.type) == (429, "busy")


def test_clients_that_stop_waiting_leave_the_queue(small: RunningEngine) -> None:
    """On either route, without having cost anything; those behind them go on."""
    body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}
    sample = {"request_id": "x", "prompt_token_ids": [PROMPT], "tenant_id": "bob"}
    headers = {TENANT_HEADER: "bob"}
    with ThreadPoolExecutor(SEQUENCES) as pool:
        for _ in range(SEQUENCES):
            pool.submit(small.client.post, "/v1/completions", headers=headers, json=body)
        wait_until(lambda: asked(small) == SEQUENCES)
        assert small.gauge("waiting{") > 0
        with pytest.raises(httpx.ReadTimeout):
            small.client.post("/v1/completions", headers=headers, json=body, timeout=0.3)
        with pytest.raises(httpx.ReadTimeout):
            small.client.post("/river/sample", content=msgspec.msgpack.encode(sample), timeout=0.3)
        wait_until(lambda: asked(small) <= SEQUENCES, within_s=3.0)
    wait_until(lambda: asked(small) == 0)
    assert small.gauge("outstanding_tokens") == 0
    assert small.gauge("slots_used") == 0
