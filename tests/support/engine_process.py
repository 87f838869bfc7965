"""An engine that computes nothing, as a process of its own: `python engine_process.py NAME NATS_URL SECONDS_A_WORD`.

It speaks the engine's protocol: registers, loads the adapters that it is asked for, which takes time, holds a few, and
answers with its own name and the adapter's. On SIGTERM it takes nothing new, ends what is running, and leaves.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import OrderedDict
from http import HTTPStatus

import msgspec
import nats
from aiohttp import web

from river_engine.protocol import (
    ADAPTER_HEADER,
    ENGINES_BUCKET,
    MODEL_HEADER,
    AdapterRef,
    EngineRecord,
)

BASE = "river/test-base"
LOAD_S = 0.1
WORDS = 5
WORD_S = 0.02
RESIDENT_MAX = 8
HEARTBEAT_S = 0.25


class EngineProcess:
    """`loads` counts how often each adapter was loaded."""

    def __init__(self, engine_id: str, word_s: float) -> None:
        self.engine_id = engine_id
        self.word_s = word_s
        self.url = ""
        self.running = 0
        self.draining = False
        self.loads: dict[str, int] = {}
        self._resident: OrderedDict[str, asyncio.Event] = OrderedDict()

    def record(self) -> EngineRecord:
        return EngineRecord(
            engine_id=self.engine_id,
            base_model=BASE,
            url=self.url,
            context_length=64,
            vocab_size=512,
            max_loras=RESIDENT_MAX,
            max_lora_rank=16,
            heartbeat_at=time.time(),
            resident=[name for name, loaded in self._resident.items() if loaded.is_set()],
            running=self.running,
            draining=self.draining,
        )

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.draining:
            return web.json_response(
                {"error": {"message": "leaving"}}, status=HTTPStatus.SERVICE_UNAVAILABLE
            )
        self.running += 1
        try:
            reference = request.headers.get(ADAPTER_HEADER, "null")
            adapter = msgspec.json.decode(reference, type=AdapterRef | None)
            if adapter is not None:
                await self._load(adapter.name)
            body = await request.json()
            who = f"{self.engine_id}|{adapter.name if adapter else ''}"
            if body.get("stream"):
                return await self._stream(request, who)
            await asyncio.sleep(WORDS * self.word_s)
            message = {"role": "assistant", "content": who}
            return web.json_response(self._chunk(request, WORDS, message=message))
        finally:
            self.running -= 1

    async def counts(self, _request: web.Request) -> web.Response:
        return web.json_response(self.loads)

    async def _load(self, name: str) -> None:
        loaded = self._resident.get(name)
        if loaded is not None:
            self._resident.move_to_end(name)
            await loaded.wait()
            return
        loaded = self._resident[name] = asyncio.Event()
        self.loads[name] = self.loads.get(name, 0) + 1
        await asyncio.sleep(LOAD_S)
        loaded.set()
        while len(self._resident) > RESIDENT_MAX:
            self._resident.popitem(last=False)

    async def _stream(self, request: web.Request, who: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for produced in range(1, WORDS + 1):
            await asyncio.sleep(self.word_s)
            chunk = self._chunk(request, produced, delta={"content": f"{who} "})
            await response.write(b"data: " + msgspec.json.encode(chunk) + b"\n\n")
        last = self._chunk(request, WORDS) | {"choices": []}
        await response.write(b"data: " + msgspec.json.encode(last) + b"\n\ndata: [DONE]\n\n")
        return response

    def _chunk(self, request: web.Request, produced: int, **said: object) -> dict[str, object]:
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk" if "delta" in said else "chat.completion",
            "created": 1,
            "model": request.headers[MODEL_HEADER],
            "choices": [{"index": 0, "finish_reason": None, **said}],
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": produced,
                "total_tokens": 3 + produced,
            },
        }


async def main(engine_id: str, nats_url: str, word_s: str) -> None:
    """Serves until SIGTERM."""
    engine = EngineProcess(engine_id, float(word_s))
    application = web.Application()
    application.router.add_post("/v1/chat/completions", engine.complete)
    application.router.add_get("/counts", engine.counts)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    client = await nats.connect(nats_url)
    bucket = await client.jetstream().key_value(ENGINES_BUCKET)
    while not (engine.draining and engine.running == 0):
        engine.draining = stopping.is_set()
        await bucket.put(engine_id, msgspec.msgpack.encode(engine.record()))
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await stopping.wait()
                await asyncio.sleep(WORD_S)
        except TimeoutError:
            continue
    await bucket.delete(engine_id)
    await client.close()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
