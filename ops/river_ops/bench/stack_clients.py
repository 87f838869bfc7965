"""A program of the benchmarks of a whole stack: some clients that train, each with a run of its own, on one event loop.

It reads a line of JSON per measurement, `Measurement`, and answers each with a `Measured`; it ends with its input.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

import river_client as river
from river_client.async_model import AsyncModel
from river_ops.bench.programs import answer_with, program_settings
from river_ops.models import TINY_MOE_NAME

VOCABULARY = 512
LEARNING_RATE = 1e-4


class ClientSettings(Struct, frozen=True, kw_only=True):
    """A client for each key."""

    base_url: str
    api_keys: list[str]
    rank: int


class Measurement(Struct, frozen=True, kw_only=True):
    """The first `clients` of them train for `seconds` on batches of `sequences` x `tokens`."""

    clients: int
    sequences: int
    tokens: int
    seconds: float


class Measured(Struct, frozen=True, kw_only=True):
    """`seconds` reach from the start to the end of the last step; `cpu_s` is this process's own."""

    steps: int
    seconds: float
    cpu_s: float


def main() -> None:
    """Serves measurements."""
    asyncio.run(serve(program_settings(ClientSettings)))


async def serve(settings: ClientSettings) -> None:
    """Opens all clients, says so with an empty measurement, then measures as asked."""
    async with AsyncExitStack() as stack:
        models: list[AsyncModel] = []
        for number, api_key in enumerate(settings.api_keys):
            client = await stack.enter_async_context(
                river.AsyncClient(api_key=api_key, base_url=settings.base_url)
            )
            session = await stack.enter_async_context(client.session(bench="training"))
            lora = river.LoraConfig(
                rank=settings.rank, seed=number, train_attn=True, train_mlp=True, train_unembed=True
            )
            models.append(await session.create_model(TINY_MOE_NAME, lora=lora))
        answer_with(Measured(steps=0, seconds=0.0, cpu_s=0.0))
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = msgspec.json.decode(line, type=Measurement)
            answer_with(await measure(models[: asked.clients], asked))


async def measure(models: list[AsyncModel], asked: Measurement) -> Measured:
    """Steps of all `models` at once, counted until the time is over; a step that began before counts whole."""
    cpu_s, started = time.process_time(), time.monotonic()
    deadline = started + asked.seconds
    steps = await asyncio.gather(
        *(
            train_until(deadline, model, batch(number, asked.sequences, asked.tokens))
            for number, model in enumerate(models)
        )
    )
    ended = time.monotonic()
    return Measured(steps=sum(steps), seconds=ended - started, cpu_s=time.process_time() - cpu_s)


async def train_until(deadline: float, model: AsyncModel, data: list[dict[str, Any]]) -> int:
    """forward_backward and optim_step, each awaited, again and again; returns how often."""
    steps = 0
    while time.monotonic() < deadline:
        await model.forward_backward(data, loss_fn="cross_entropy")
        await model.optim_step(lr=LEARNING_RATE)
        steps += 1
    return steps


def batch(seed: int, sequences: int, tokens: int) -> list[dict[str, Any]]:
    """Random training data."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (sequences, tokens), dtype=np.int32)
    return [{"input_ids": row} for row in ids]


if __name__ == "__main__":
    main()
