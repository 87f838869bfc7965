"""What gateways tell each other about limits, over core NATS: drawn shares at once, and a sign of life every tick."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from river_gateway.bus import BusError
from river_gateway.limits import QUOTA_JOIN_S, QUOTA_PUBLISH_GAP_S, QUOTA_TICK_S
from river_gateway.tenancy.messages import QUOTAS_SUBJECT, Announcement

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from river_gateway.bus import Bus
    from river_gateway.tenancy.quotas import Quotas

logger = logging.getLogger("river.gateway")


class Exchange:
    """Connects one gateway's `Quotas` with those of the others."""

    def __init__(self, bus: Bus, quotas: Quotas) -> None:
        self._bus = bus
        self._quotas = quotas
        self._wake = asyncio.Event()
        quotas.replicas.wake = self._wake.set

    async def join(self) -> None:
        """Makes itself known and gives the others time to say what is left of all limits."""
        await self._bus.hear(QUOTAS_SUBJECT, self._hear)
        await self._announce()
        await asyncio.sleep(QUOTA_JOIN_S)

    async def run(self) -> None:
        """Goes on until cancelled; then the others are told that this gateway is going."""
        clock = asyncio.get_running_loop().time
        tick_at = clock()
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(tick_at):
                        await self._wake.wait()
                self._wake.clear()
                if clock() >= tick_at:
                    self._quotas.tick(connected=self._bus.connected)
                    tick_at = clock() + QUOTA_TICK_S
                await self._announce()
                await asyncio.sleep(QUOTA_PUBLISH_GAP_S)
        finally:
            await self._publish(self._quotas.farewell())

    async def _announce(self) -> None:
        # While the connection is down, what is published would be kept and come too late.
        if self._bus.connected:
            for announcement in self._quotas.announcements():
                await self._publish(announcement)

    async def _publish(self, announcement: Announcement) -> None:
        try:
            await self._bus.tell(QUOTAS_SUBJECT, msgspec.msgpack.encode(announcement))
        except BusError as error:
            logger.warning("limits are not announced: %s", error)

    async def _hear(self, message: Msg) -> None:
        try:
            announcement = msgspec.msgpack.decode(message.data, type=Announcement)
        except msgspec.DecodeError as error:
            logger.warning("unreadable announcement of limits: %s", error)
        else:
            self._quotas.hear(announcement)
