"""A trainer in the test's own process, on a real nats-server, and what a test asks about it."""

# What is waited for happens in another process or task, and only NATS or the disk tells.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from support.training import RunScript

from river_billing import streams as billing
from river_billing.events import EVENTS_STREAM, AnyEvent, TokensCounted
from river_trainer import journal
from river_trainer.assembly import parts_of
from river_trainer.base_model import BaseModel
from river_trainer.lanes import Lanes
from river_trainer.protocol import (
    TRAIN_STREAM,
    LiveVersion,
    TrainMessage,
    TrainResult,
    operation_id,
    train_subject,
)
from river_trainer.service import Service
from river_trainer.settings import TrainerSettings

WAIT_S = 60.0


@dataclass(slots=True)
class World:
    """A connection, and a base name and a directory that only one test uses."""

    js: JetStreamContext
    client: Client
    base: BaseModel
    lanes: Lanes
    base_name: str
    directory: Path
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the next trainer that differ from the usual."""

    def settings(self, nats_url: str = "", model_path: str = "") -> TrainerSettings:
        usual = TrainerSettings(
            nats_url=nats_url,
            base_model=self.base_name,
            model_path=model_path,
            data_dir=str(self.directory),
            snapshot_every_steps=2,
            snapshot_interval_s=0.0,
            snapshot_idle_s=0.2,
            context_length=256,
            max_lora_rank=32,
        )
        return msgspec.structs.replace(usual, **self.options)

    async def submit(self, *messages: TrainMessage) -> None:
        for message in messages:
            await journal.submit(self.js, message)

    async def result(self, message: TrainMessage) -> TrainResult:
        operation = operation_id(message.run_id, message.seq)
        async with asyncio.timeout(WAIT_S):
            while (result := await journal.find_result(self.js, operation)) is None:
                await asyncio.sleep(0.02)
        return result

    async def results(self, script: RunScript) -> list[TrainResult]:
        return [await self.result(message) for message in script.messages]

    async def live(self, run_id: str) -> LiveVersion:
        entry = await (await journal.live_bucket(self.js)).get(run_id)
        return journal.decode_live(entry.value or b"")

    async def events(self, subject: str, run_id: str) -> list[AnyEvent]:
        """The events of a run under a subject, in stream order."""
        found: list[AnyEvent] = []
        seq = 1
        while True:
            try:
                message = await self.js.get_msg(
                    EVENTS_STREAM, seq=seq, subject=subject, direct=False, next=True
                )
            except NotFoundError:
                return found
            assert message.seq is not None
            assert message.data is not None
            found += [
                event
                for event in billing.decode(message.data)
                if not isinstance(event, TokensCounted) and event.run_id == run_id
            ]
            seq = message.seq + 1

    async def journal_size(self, run_id: str) -> int:
        info = await self.js.stream_info(
            TRAIN_STREAM, subjects_filter=train_subject(self.base_name, run_id)
        )
        return sum((info.state.subjects or {}).values())

    async def until_trimmed(self, run_id: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self.journal_size(run_id):
                await asyncio.sleep(0.05)

    @asynccontextmanager
    async def trainer(self) -> AsyncIterator[Service]:
        """A trainer in this process, on a connection of its own."""
        settings = self.settings()
        parts = parts_of(settings, self.base, self.lanes)
        client = await journal.connect(str(self.client.connected_url.geturl()))  # pyright: ignore[reportOptionalMemberAccess]
        with (
            ThreadPoolExecutor(max_workers=1) as worker,
            ThreadPoolExecutor(4) as disk,
            ThreadPoolExecutor(4) as store,
        ):
            service = Service(settings, parts, client, worker, disk, store)
            running = asyncio.create_task(service.run())
            try:
                yield service
            finally:
                if running.done():
                    # Why the trainer died says more than what the test has missed since.
                    running.result()
                running.cancel()
                await asyncio.wait([running])
                await client.close()
