"""The lease on a base model: of all trainers of one base, only its holder follows the journal.

It is a key in a KV bucket whose entries fade unless renewed. Whoever finds it absent may create it, and only its holder
renews it, each by compare-and-set. A lease that faded while NATS was away is taken again; it is lost only when somebody
else has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import nats.errors
from nats.aio.client import Client
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from river_engine.protocol import subject_token
from river_trainer import journal, limits
from river_trainer.errors import LeaseLostError

logger = logging.getLogger("river.trainer")


class Lease:
    """One trainer's claim to one base model."""

    def __init__(self, client: Client, base_model: str, trainer_id: str) -> None:
        self._js = client.jetstream(timeout=limits.LEASE_REQUEST_TIMEOUT_S)
        self._key = subject_token(base_model)
        self._holder = trainer_id.encode()

    async def take(self) -> None:
        """Waits until the lease is ours."""
        waiting = False
        while not await journal.retry(self._claim, doing="taking the lease"):
            if not waiting:
                logger.warning("waiting: another trainer of this base model is at work")
                waiting = True
            await asyncio.sleep(limits.LEASE_POLL_INTERVAL_S)

    async def keep(self) -> None:
        """Renews the lease until cancelled.

        Raises:
            LeaseLostError: another trainer has it.
        """
        while True:
            if not await journal.retry(self._claim, doing="renewing the lease"):
                raise LeaseLostError("another trainer of this base model has the lease")
            await asyncio.sleep(limits.LEASE_RENEWAL_INTERVAL_S)

    async def release(self) -> None:
        """Lets the next trainer in at once, if NATS is there; otherwise the lease fades."""
        with contextlib.suppress(nats.errors.Error, OSError):
            bucket, revision = await self._look()
            if revision:
                await bucket.delete(self._key, last=revision)

    async def _claim(self) -> bool:
        """Whether the lease is ours, from now on or still."""
        while True:
            bucket, revision = await self._look()
            if revision is None:
                return False
            # Otherwise it faded, somebody was faster, or an earlier attempt of ours arrived late: look again.
            with contextlib.suppress(KeyWrongLastSequenceError):
                await bucket.update(self._key, self._holder, last=revision)
                return True

    async def _look(self) -> tuple[KeyValue, int | None]:
        """The revision to write over if the lease is ours or free, None if somebody else has it."""
        bucket = await journal.leases_bucket(self._js)
        try:
            entry = await bucket.get(self._key)
        except KeyNotFoundError as error:
            return bucket, error.entry.revision if error.entry else 0
        return bucket, entry.revision if entry.value == self._holder else None
