"""The stand-in engine and the load tool of `river bench gateway`: what they count and measure is what happened."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import openai
import pytest

from river_ops.bench.gateway.answers import (
    COMPLETION_TOKENS,
    MODEL,
    PROMPT_TOKENS,
    STREAM_TOKENS,
    whole_answer,
)
from river_ops.bench.gateway.load import send_load
from river_ops.bench.gateway.measurements import Found
from river_ops.bench.gateway.messages import (
    PACED_USER,
    Listening,
    LoadResult,
    LoadSettings,
    StubSettings,
)
from river_ops.bench.gateway.platform import STUB_MODULE
from river_ops.bench.gateway.processes import on_cores, pin, processor_s, resident_mb
from river_ops.bench.gateway.report import GatewayReport, missed_goals, table
from river_ops.bench.gateway.stub import PACE_S, request_end
from river_ops.bench.measure import machine
from river_ops.bench.programs import start_program

EVENTS = STREAM_TOKENS + 2
"""One for each token, the usage, the end."""


@pytest.fixture(scope="module")
def stub_url() -> Iterator[str]:
    """The stand-in engine, not registered anywhere."""
    program = start_program(STUB_MODULE, StubSettings())
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        yield msgspec.json.decode(program.stdout.readline(), type=Listening).url
    finally:
        program.stdin.close()
        program.wait(10.0)
        program.stdout.close()


def load(url: str, **settings: Any) -> LoadResult:
    """What the load tool finds."""
    port = int(url.rpartition(":")[2])
    base = {"port": port, "model": MODEL, "api_key": "none", "connections": 8}
    return asyncio.run(send_load(LoadSettings(**base | settings)))


# ---- The stand-in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("received", "end"),
    [
        (b"", None),
        (b"GET / HTTP/1.1\r\nhost: a\r\n", None),
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", 27),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}", None),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\n{ }", 41),
        (b"POST / HTTP/1.1\r\ncontent-length:3\r\nhost: a\r\n\r\n{ }POST", 49),
    ],
    ids=["nothing", "half a head", "no body", "half a body", "whole", "the next one behind it"],
)
def test_the_end_of_a_request(received: bytes, end: int | None) -> None:
    """A request ends where its head says, and not before all of it is there."""
    assert request_end(received) == end


def test_answers_are_as_long_as_a_short_chat() -> None:
    """About 750 bytes, as the design's measurements have."""
    body = whole_answer().partition(b"\r\n\r\n")[2]
    assert 700 <= len(body) <= 900


def test_whole_answers_are_openais(stub_url: str) -> None:
    """The unmodified client reads the answer and its usage."""
    with openai.OpenAI(base_url=f"{stub_url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}]
        )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == PROMPT_TOKENS
    assert answer.usage.completion_tokens == COMPLETION_TOKENS


@pytest.mark.parametrize("continuous", [False, True], ids=["usage at the end", "in every chunk"])
def test_streams_are_openais(stub_url: str, continuous: bool) -> None:
    """One chunk a token, and usage where it was asked for."""
    options: Any = {"include_usage": True} | (
        {"continuous_usage_stats": True} if continuous else {}
    )
    with openai.OpenAI(base_url=f"{stub_url}/v1", api_key="none") as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "x"}],
                stream=True,
                stream_options=options,
            )
        )
    *tokens, last = chunks
    assert [chunk.choices[0].delta.content for chunk in tokens] == [
        f" word{index}" for index in range(STREAM_TOKENS)
    ]
    assert tokens[-1].choices[0].finish_reason == "stop"
    assert [chunk.usage is not None for chunk in tokens] == [continuous] * STREAM_TOKENS
    assert last.usage is not None
    assert last.usage.completion_tokens == STREAM_TOKENS


@pytest.mark.parametrize("space", ["", " "], ids=["compact", "spaced"])
def test_paced_streams_take_their_time(stub_url: str, space: str) -> None:
    """Tokens come one by one however a client writes its JSON, and each comes as an event of its own."""
    body = f'{{"model":"m","stream":{space}true,"user":{space}"{PACED_USER}"}}'
    started = time.monotonic()
    events = b""
    with httpx.stream("POST", f"{stub_url}/v1/chat/completions", content=body) as answer:
        for data in answer.iter_bytes():
            events += data
    assert time.monotonic() - started >= (STREAM_TOKENS - 1) * PACE_S
    assert events.count(b"data: ") == EVENTS
    assert events.endswith(b"data: [DONE]\n\n")


# ---- The load tool ---------------------------------------------------------------------------------------------------


def test_all_requests_are_counted(stub_url: str) -> None:
    """As many answers as were asked for, in a time that makes the rate."""
    result = load(stub_url, requests=1000)
    assert (result.requests, result.errors, result.events) == (1000, 0, 0)
    assert 0 < result.first_byte_p50_ms <= result.p50_ms <= result.p99_ms
    assert result.requests_per_s == pytest.approx(1000 / result.seconds)


def test_all_events_are_counted(stub_url: str) -> None:
    """Every event of every stream, wherever the network cuts it."""
    result = load(stub_url, requests=100, stream=True)
    assert (result.requests, result.errors, result.events) == (100, 0, 100 * EVENTS)


def test_first_tokens_are_early(stub_url: str) -> None:
    """The first token of a paced stream is there long before its end."""
    result = load(stub_url, requests=8, stream=True, paced=True)
    assert result.events == 8 * EVENTS
    assert result.p50_ms >= 1e3 * (STREAM_TOKENS - 1) * PACE_S
    assert result.first_byte_p99_ms < result.p50_ms / 2


def test_a_rate_is_kept(stub_url: str) -> None:
    """Requests are due at even intervals."""
    result = load(stub_url, rate=100.0, seconds=1.0)
    assert 99 <= result.requests <= 101
    assert result.errors == 0


@asynccontextmanager
async def serving(answer: Callable[[], Awaitable[bytes | None]]) -> AsyncIterator[int]:
    """A server that answers each request by what `answer` returns, or cuts the connection; yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                await reader.readexactly(length)
                reply = await answer()
                if reply is None:
                    return
                writer.write(reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # The client has what it wanted.
        finally:
            writer.close()
            ended.set()

    ended = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await ended.wait()


async def load_of(answer: Callable[[], Awaitable[bytes | None]], **settings: Any) -> LoadResult:
    """What the load tool finds at a server of `answer`'s."""
    async with serving(answer) as port:
        return await send_load(LoadSettings(port=port, model=MODEL, api_key="none", **settings))


async def test_refusals_are_errors() -> None:
    """Another status than 200 is an error, and the first one is shown."""

    async def refuse() -> bytes:
        return b"HTTP/1.1 503 Away\r\ncontent-length: 4\r\n\r\naway"

    result = await load_of(refuse, connections=1, requests=10)
    assert (result.requests, result.errors) == (10, 10)
    assert result.first_error is not None
    assert "503" in result.first_error


async def test_a_lost_connection_is_an_error() -> None:
    """An answer that never comes is not waited for."""
    answers = iter([whole_answer(), None])

    async def answer() -> bytes | None:
        return next(answers)

    result = await load_of(answer, connections=1, requests=2)
    assert (result.requests, result.errors) == (2, 1)


async def test_waiting_for_a_connection_counts() -> None:
    """While a server stands still, requests go on being due: what they waited for is in their latency.

    A tool that only measured from sending would see one slow answer of a hundred and call the median fast.
    """
    pause_s = 0.8
    answered = 0

    async def answer() -> bytes:
        nonlocal answered
        answered += 1
        if answered == 10:
            await asyncio.sleep(pause_s)
        return whole_answer()

    result = await load_of(answer, connections=1, rate=100.0, seconds=1.0)
    assert result.requests >= 90
    assert result.errors == 0
    assert result.p99_ms >= 0.8 * 1e3 * pause_s
    assert result.p50_ms >= 0.2 * 1e3 * pause_s


# ---- Processes and results -------------------------------------------------------------------------------------------


def test_processes_are_pinned_and_measured() -> None:
    """A process runs where it is told to, and its time and memory are its own."""
    core = min(os.sched_getaffinity(0))
    program = (
        "import time; data = bytes(50_000_000)\nwhile time.process_time() < 0.5: pass\ninput()"
    )
    with on_cores({core}):
        child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    try:
        assert os.sched_getaffinity(child.pid) == {core}
        pin(child.pid, os.sched_getaffinity(0))
        assert os.sched_getaffinity(child.pid) == os.sched_getaffinity(0)
        deadline = time.monotonic() + 30.0
        while processor_s(child.pid) < 0.4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert resident_mb(child.pid) > 5.0
    finally:
        child.communicate(b"\n")


def test_ratios_are_those_of_rounds() -> None:
    """The median of what the rounds say, not what the medians say."""
    ours, theirs = Found(rates=[100.0, 10.0, 40.0]), Found(rates=[50.0, 10.0, 10.0])
    assert ours.times(theirs) == 2.0


def report(**changes: Any) -> GatewayReport:
    """A report that reaches every goal."""
    good: dict[str, Any] = {
        "throughput_ratio": 0.99,
        "throughput_ratio_short": 0.9,
        "added_p50_ms": 0.5,
        "added_p99_ms": 1.0,
        "added_stream_p50_ms": 0.5,
        "added_stream_p99_ms": 1.0,
        "requests_per_s": 100.0,
        "cpu_us_per_request": 50.0,
        "cpu_us_per_event": 30.0,
        "memory_mb": 100.0,
        "memory_growth_mb": 1.0,
        "vllm_router_ratio": 0.7,
        "litellm_ratio": 60.0,
        "peers": {"vllm_router": None, "litellm": None},
        "billable": 10,
        "recorded": 10,
        "missed": [],
        "settings": {},
        "machine": machine(),
    }
    return GatewayReport(**good | changes)


def test_goals_met_and_missed() -> None:
    """What is too low or too high is said, and what was not measured is not."""
    assert missed_goals(report()) == []
    assert missed_goals(report(vllm_router_ratio=None, throughput_ratio=None)) == []
    assert missed_goals(report(added_p99_ms=3.5)) == ["added_p99_ms 3.5, at most 3 wanted"]
    assert missed_goals(report(litellm_ratio=39.0)) == ["litellm_ratio 39, at least 40 wanted"]


def test_lost_usage_is_missed() -> None:
    """A request that was answered and not billed is a goal missed."""
    assert missed_goals(report(recorded=9)) == ["9 of 10 requests were recorded"]


def test_the_table_names_peers_that_are_missing() -> None:
    """Nothing is made up for a peer that is not installed."""
    lines = table(report())
    assert [line.split()[0] for line in lines if "not installed" in line] == [
        "vllm_router",
        "litellm",
    ]
