"""Eight engine processes that come and go under load."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from support import engine_process
from support.gateway import Rig, eventually, running_rig

from river_billing.events import UsageKind
from river_engine.protocol import HEARTBEAT_LOST_AFTER_S

ENGINES = 8
RUNS = 20
CLIENTS = 24
ENDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
"""How engines end, one after another."""
START_PATIENCE_S = 60.0
"""Processes start slowly where others run too."""


@pytest_asyncio.fixture
async def rig(postgres_url: str, nats_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    """A gateway without engines in this process."""
    async with running_rig(postgres_url, nats_url, tmp_path, engines=0) as running:
        yield running


class Processes:
    """The engines."""

    def __init__(self, nats_url: str, word_s: float) -> None:
        self._nats_url = nats_url
        self._word_s = word_s
        self._names = itertools.count()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: list[subprocess.Popen[bytes]] = []

    def start(self) -> str:
        name = f"engine-{next(self._names)}"
        program = [sys.executable, engine_process.__file__]
        command = [*program, name, self._nats_url, str(self._word_s)]
        self.running[name] = subprocess.Popen(command)
        return name

    def end(self, name: str, how: signal.Signals) -> None:
        process = self.running.pop(name)
        process.send_signal(how)
        self._ended.append(process)

    def stop(self, name: str) -> None:
        """As if its machine were gone: it neither answers nor closes anything."""
        self.running[name].send_signal(signal.SIGSTOP)

    def close(self) -> None:
        for process in [*self.running.values(), *self._ended]:
            process.kill()
            process.wait()


@asynccontextmanager
async def engines(
    rig: Rig, nats_url: str, count: int, word_s: float = engine_process.WORD_S
) -> AsyncGenerator[Processes]:
    """So many engines, registered."""
    processes = Processes(nats_url, word_s)
    try:
        for _ in range(count):
            processes.start()
        await eventually(lambda: len(rig.services.engines.alive()) == count, START_PATIENCE_S)
        yield processes
    finally:
        processes.close()


@dataclass
class Tally:
    """What clients saw; `broken` has the errors that ended streams."""

    answers: Counter[str] = field(default_factory=Counter[str])
    whole: int = 0
    streamed: int = 0
    broken: list[str] = field(default_factory=list[str])


async def ask(
    rig: Rig, model: str, version: str, tally: Tally, *, stream: bool, question: str = ""
) -> None:
    """One request; fails unless it was answered by the right adapter, or broke after its first byte as it should."""
    question = question or f"question {random.random()}"
    messages: Any = [{"role": "user", "content": question}]
    answer = await rig.tenant.openai.chat.completions.create(
        model=model, messages=messages, stream=stream
    )
    if not isinstance(answer, openai.AsyncStream):
        content = answer.choices[0].message.content or ""
        tally.whole += 1
    else:
        content = ""
        try:
            async for chunk in answer:
                for choice in chunk.choices:
                    content += choice.delta.content or ""
        except openai.APIError as error:
            tally.broken.append(error.message)
        tally.streamed += 1
    said = set(content.split())
    assert len(said) <= 1, f"several engines in one answer: {said}"
    for who in said:
        engine_id, _, adapter = who.partition("|")
        assert adapter == version
        tally.answers[engine_id] += 1


async def test_engines_come_and_go_under_load(rig: Rig, nats_url: str) -> None:
    """No request is lost before its first byte, none answered by a wrong adapter, cut streams end with an error."""
    runs = [await rig.tenant.new_run() for _ in range(RUNS)]
    chance = random.Random(1)
    tally = Tally()
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            run = chance.choice(runs)
            # Some adapters are much more in demand than others; some requests are for the base model.
            if chance.random() < 0.3:
                run = runs[0]
            model, version = f"river://{run.run_id}", f"{run.run_id}@0"
            if chance.random() < 0.2:
                model, version = engine_process.BASE, ""
            await ask(rig, model, version, tally, stream=chance.random() < 0.5)

    async def disturb(processes: Processes) -> None:
        try:
            for how in ENDS:
                joined = processes.start()
                await eventually(lambda name=joined: tally.answers[name], START_PATIENCE_S)
                processes.end(chance.choice(sorted(processes.running)), how)
            await asyncio.sleep(2 * engine_process.WORDS * engine_process.WORD_S)
        finally:
            stop.set()

    async with engines(rig, nats_url, ENGINES) as processes, asyncio.TaskGroup() as tasks:
        tasks.create_task(disturb(processes))
        for _ in range(CLIENTS):
            tasks.create_task(client())
    assert tally.whole > 50
    assert tally.streamed > 50
    assert len(tally.broken) < tally.streamed / 4
    assert set(tally.broken) <= {"the engine was lost in the middle of the answer"}


async def test_first_requests_load_an_adapter_once(rig: Rig, nats_url: str) -> None:
    """Many at once for an adapter that nobody holds go to one engine, which loads it once."""
    run = await rig.tenant.new_run()
    tally = Tally()
    async with engines(rig, nats_url, 3):
        version = f"{run.run_id}@0"
        await asyncio.gather(
            *(ask(rig, f"river://{run.run_id}", version, tally, stream=False) for _ in range(20))
        )
        loads: Counter[str] = Counter()
        async with httpx.AsyncClient() as client:
            for record in rig.services.engines.alive():
                loads.update((await client.get(f"{record.url}/counts")).json())
    assert loads == {version: 1}
    assert len(tally.answers) == 1


async def test_a_leaving_engine_ends_what_it_has_begun(rig: Rig, nats_url: str) -> None:
    """It is sent nothing new while its streams run to their ends."""
    tally = Tally()
    async with engines(rig, nats_url, 2) as processes:
        asking = [
            asyncio.create_task(ask(rig, engine_process.BASE, "", tally, stream=True))
            for _ in range(10)
        ]
        await asyncio.sleep(engine_process.WORD_S)
        leaving = min(processes.running)
        processes.end(leaving, signal.SIGTERM)
        await asyncio.gather(*asking)
        await eventually(lambda: len(rig.services.engines.alive()) == 1)
        for _ in range(5):
            await ask(rig, engine_process.BASE, "", tally, stream=False)
    assert not tally.broken
    assert sum(tally.answers.values()) == 15


async def test_an_engine_vanishes_without_a_word(rig: Rig, nats_url: str) -> None:
    """As when its machine loses its power: no connection is reset, and requests would wait for ever.

    Once its heartbeat is lost, those that have no byte of an answer get it from another engine; streams end with an
    error and are billed for what came.
    """
    word_s = 1.0

    def asking(tally: Tally, *, stream: bool) -> asyncio.Task[None]:
        return asyncio.create_task(
            ask(rig, engine_process.BASE, "", tally, stream=stream, question="the same")
        )

    early, late = Tally(), Tally()
    async with engines(rig, nats_url, 2, word_s) as processes:
        begun = asking(early, stream=True)
        await asyncio.sleep(2.2 * word_s)
        waiting = [asking(late, stream=stream) for stream in (True, False)]
        await asyncio.sleep(0.4 * word_s)
        (home,) = rig.services.upstream.fleet.outstanding_tokens()
        processes.stop(home)
        await eventually(lambda: len(rig.services.engines.alive()) == 1, 2 * HEARTBEAT_LOST_AFTER_S)
        async with asyncio.timeout(HEARTBEAT_LOST_AFTER_S + 2 * engine_process.WORDS * word_s):
            await asyncio.gather(begun, *waiting)
    assert early.broken == ["the engine was lost in the middle of the answer"]
    assert set(early.answers) == {home}
    assert late.broken == []
    assert set(late.answers) == set(processes.running) - {home}
    used = sorted(event.quantities[UsageKind.COMPLETION] for event in await rig.usage(3))
    assert used[0] in range(1, engine_process.WORDS)
    assert used[1:] == [engine_process.WORDS] * 2


@pytest.mark.parametrize("stream", [True, False])
async def test_without_any_engine(rig: Rig, nats_url: str, stream: bool) -> None:
    """Killed engines: an error that invites to try again."""
    async with engines(rig, nats_url, 1) as processes:
        processes.end(next(iter(processes.running)), signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as refused:
            await ask(rig, engine_process.BASE, "", Tally(), stream=stream)
    assert refused.value.status_code == 503
    assert "retry-after" in refused.value.response.headers
