"""A program that keeps some streams of an OpenAI server going, and notes when their tokens come.

It says so once every stream has had a token, and with its input's end it answers with all arrivals.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from river_ops.bench.programs import answer_with, program_settings

STARTED_TIMEOUT_S = 60.0


class StreamSettings(Struct, frozen=True, kw_only=True):
    """`prompts` are token ids, one list per stream; every stream is `tokens` long and then begins anew."""

    base_url: str
    api_key: str
    model: str
    prompts: list[list[int]]
    tokens: int


class Started(Struct, frozen=True, kw_only=True):
    """Every stream has had a token."""

    streams: int


class Arrivals(Struct, frozen=True, kw_only=True):
    """For each request, when something of its stream came: monotonic time in seconds, the same for all processes."""

    requests: list[list[float]]


def main() -> None:
    """Streams until the input ends."""
    asyncio.run(serve(program_settings(StreamSettings)))


async def serve(settings: StreamSettings) -> None:
    """Runs all streams and answers with their arrivals; a stream that breaks ends everything."""
    requests: list[list[float]] = []
    headers = {"authorization": f"Bearer {settings.api_key}", "content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(
            settings.base_url, headers=headers, connector=connector, raise_for_status=True
        ) as session,
        asyncio.TaskGroup() as group,
    ):
        started = [asyncio.Event() for _ in settings.prompts]
        streams = [
            group.create_task(stream_for_ever(session, settings, prompt, requests, event))
            for prompt, event in zip(settings.prompts, started, strict=True)
        ]
        async with asyncio.timeout(STARTED_TIMEOUT_S):
            for event in started:
                await event.wait()
        answer_with(Started(streams=len(streams)))
        await asyncio.to_thread(sys.stdin.read)
        for stream in streams:
            stream.cancel()
    answer_with(Arrivals(requests=requests))


async def stream_for_ever(
    session: aiohttp.ClientSession,
    settings: StreamSettings,
    prompt: list[int],
    requests: list[list[float]],
    started: asyncio.Event,
) -> None:
    """One stream after another; each adds a list of arrivals to `requests`. `started` is set by the first one."""
    body = completion_body(settings.model, prompt, tokens=settings.tokens)
    while True:
        arrivals: list[float] = []
        requests.append(arrivals)
        async with session.post("/v1/completions", data=body) as response:
            while await response.content.readany():
                arrivals.append(time.monotonic())
                started.set()


def completion_body(model: str, prompt: list[int], *, tokens: int) -> bytes:
    """A streamed completion of exactly so many tokens."""
    fields: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 1.0,
        "stream": True,
        "ignore_eos": True,
    }
    return msgspec.json.encode(fields)


if __name__ == "__main__":
    main()
