"""Saying what this process has produced, for audits: now and then, and last of all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import nats.errors
from nats.js import JetStreamContext

from river_billing import streams as billing
from river_billing.events import TokensCounted, UsageKind
from river_trainer import journal, limits

logger = logging.getLogger("river.trainer")


class TokenCounts:
    """One life of a trainer; `tokens` is what it has trained on so far."""

    def __init__(
        self, js: JetStreamContext, trainer_id: str, base_model: str, tokens: Callable[[], int]
    ) -> None:
        self._js = js
        self._trainer_id = trainer_id
        self._base_model = base_model
        self._tokens = tokens
        self._started_at = time.time()

    async def tell(self) -> None:
        """Says it every `COUNTS_INTERVAL_S`, until cancelled; what is not heard is said again."""
        while True:
            event = self._event()
            await journal.retry(
                lambda event=event: billing.publish(self._js, event), doing="telling counts"
            )
            await asyncio.sleep(limits.COUNTS_INTERVAL_S)

    async def tell_last(self) -> None:
        """Says it once nothing more is done."""
        try:
            await billing.publish(self._js, self._event(final=True))
        except (nats.errors.Error, OSError) as error:
            logger.warning("the last counts are not told: %r", error)

    def _event(self, *, final: bool = False) -> TokensCounted:
        return TokensCounted(
            producer_id=self._trainer_id,
            base_model=self._base_model,
            started_at=self._started_at,
            counted_at=time.time(),
            tokens={UsageKind.TRAINING: self._tokens()},
            final=final,
        )
