"""A program that publishes a benchmark's events in groups, as gateways do, and is sure that each is stored."""

# nats-py leaves the keyword arguments of its methods untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import nats
from nats.js import JetStreamContext

from river_billing.events import UsageEvent
from river_billing.streams import ensure_streams, publish_group
from river_ops.bench.billing.messages import Published, PublisherSettings
from river_ops.bench.billing.traffic import draw_events
from river_ops.bench.programs import answer_with, program_settings

IN_FLIGHT = 32


def main() -> None:
    """Publishes everything and says so."""
    answer_with(asyncio.run(_publish(program_settings(PublisherSettings))))


async def _publish(settings: PublisherSettings) -> Published:
    events = list(draw_events(settings.events, seed=settings.seed, began_at=settings.began_at))
    groups: list[Sequence[UsageEvent]] = [
        events[at : at + settings.group] for at in range(0, len(events), settings.group)
    ]
    client = await nats.connect(settings.nats_url)
    try:
        await ensure_streams(client.jetstream())
        began_s = time.perf_counter()
        waiting = iter(enumerate(groups))
        await asyncio.gather(
            *(_work(client.jetstream(), waiting, settings, began_s) for _ in range(IN_FLIGHT))
        )
        seconds = time.perf_counter() - began_s
    finally:
        await client.close()
    return Published(events=len(events), messages=len(groups), seconds=seconds)


async def _work(
    js: JetStreamContext,
    waiting: enumerate[Sequence[UsageEvent]],
    settings: PublisherSettings,
    began_s: float,
) -> None:
    for number, group in waiting:
        if settings.events_per_s is not None:
            due_s = began_s + number * settings.group / settings.events_per_s
            await asyncio.sleep(max(due_s - time.perf_counter(), 0))
        await publish_group(js, group)


if __name__ == "__main__":
    main()
