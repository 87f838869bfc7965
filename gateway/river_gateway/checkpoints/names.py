"""What names mean, remembered, so that completions ask neither Postgres nor NATS.

These are aliases, checkpoints, the live versions of runs, and whether these learn.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec

from river_gateway.bus import BusError
from river_gateway.checkpoints import aliases, catalog
from river_gateway.errors import NotFoundError, UnavailableError
from river_gateway.feedback import learning
from river_gateway.limits import LIVE_FRESH_S, NAME_CACHE_ENTRIES_MAX, NAME_CACHE_FRESH_S
from river_gateway.lru import Lru
from river_trainer.protocol import LIVE_BUCKET, LiveVersion, policy_version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.msg import Msg

    from river_client.learning_wire import LearningState
    from river_gateway.bus import Bus
    from river_gateway.checkpoints.aliases import Served
    from river_gateway.checkpoints.catalog import CheckpointRow
    from river_gateway.database import Database

logger = logging.getLogger("river.gateway")

_CHANGED = "river.names.changed"
_LIVE_SUBJECTS = f"$KV.{LIVE_BUCKET}.*"
_OPERATION_HEADER = "KV-Operation"
_LIVE_PREFIX = f"$KV.{LIVE_BUCKET}."


class _Changed(msgspec.Struct, frozen=True, array_like=True):
    """What gateways tell each other when a name is written: to one tenant, or None to all of them."""

    tenant_id: str | None
    name: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """What was found, when (of `time.monotonic`), and after how many losses of the connection."""

    value: Any
    found_at: float
    losses: int


class Names:
    """Aliases and checkpoints by name, as Postgres had them at most `NAME_CACHE_FRESH_S` ago, in a bounded LRU.

    Whoever writes a name tells all gateways, which forget it at once. A gateway that may have missed that, since it
    lost its connection meanwhile, forgets everything.
    """

    def __init__(self, database: Database, bus: Bus) -> None:
        self._database = database
        self._bus = bus
        self._entries: Lru[tuple[str, str], _Entry] = Lru(NAME_CACHE_ENTRIES_MAX)
        self._forgotten = 0

    async def listen(self) -> None:
        """Begins to hear what others write."""
        await self._bus.hear(_CHANGED, self._hear)

    async def alias(self, name: str, tenant_id: str) -> Served | None:
        """One alias; that there is none is remembered too."""

        async def find() -> Served | None:
            return await aliases.find(self._database, name=name, tenant_id=tenant_id)

        return await self._find((tenant_id, name), find)

    async def checkpoint(self, path: str, tenant_id: str) -> CheckpointRow:
        """The live checkpoint of a path, of one's own or shown to all.

        Raises:
            NotFoundError: there is none.
        """

        async def find() -> CheckpointRow:
            return await catalog.find_checkpoint(
                self._database, path=path, tenant_id=tenant_id, public=True
            )

        row = await self._find((tenant_id, path), find)
        if row.has_expired:
            self._forget(tenant_id, path)
            raise NotFoundError(f"there is no checkpoint {path!r}", param="path")
        return row

    async def checkpoint_of_step(
        self, run_id: str, step: int, tenant_id: str
    ) -> CheckpointRow | None:
        """The newest live checkpoint of a policy version, if it was saved."""

        async def find() -> CheckpointRow | None:
            return await catalog.find_checkpoint_of_step(
                self._database, run_id=run_id, step=step, tenant_id=tenant_id
            )

        row = await self._find((tenant_id, policy_version(run_id, step)), find)
        return None if row is None or row.has_expired else row

    async def learning(self, run_id: str, tenant_id: str) -> LearningState | None:
        """What a run learns, or has learnt last, from feedback."""

        async def find() -> LearningState | None:
            return await learning.find(self._database, run_id=run_id, tenant_id=tenant_id)

        return await self._find((tenant_id, learning.name_of(run_id)), find)

    async def changed(self, tenant_id: str | None, name: str) -> None:
        """Says that a name has been written: the next request here sees it, and those elsewhere within a moment.

        What other tenants may have seen, too, is written for all of them: None.
        """
        self._forget(tenant_id, name)
        if not self._bus.connected:
            return  # The others notice their own loss of connection, or ask anew soon.
        try:
            await self._bus.tell(_CHANGED, msgspec.msgpack.encode(_Changed(tenant_id, name)))
        except BusError as error:
            logger.warning("others were not told of a change: %r", error)

    async def _find(self, key: tuple[str, str], find: Callable[[], Awaitable[Any]]) -> Any:
        entry = self._entries.use(key)
        if entry is not None and self._is_current(entry):
            return entry.value
        forgotten, losses = self._forgotten, self._bus.losses
        value = await find()
        # Else it may have been read before what was written meanwhile.
        if self._forgotten == forgotten:
            self._entries.put(key, _Entry(value, time.monotonic(), losses))
        return value

    def _is_current(self, entry: _Entry) -> bool:
        return (
            entry.losses == self._bus.losses
            and time.monotonic() - entry.found_at < NAME_CACHE_FRESH_S
        )

    async def _hear(self, message: Msg) -> None:
        changed = msgspec.msgpack.decode(message.data, type=_Changed)
        self._forget(changed.tenant_id, changed.name)

    def _forget(self, tenant_id: str | None, name: str) -> None:
        self._forgotten += 1
        if tenant_id is not None:
            self._entries.pop((tenant_id, name), None)
            return
        for key in [key for key in self._entries if key[1] == name]:
            del self._entries[key]


class LiveVersions:
    """The live versions of runs, heard as trainers write them.

    A trainer writes a version before the result that made it, over one connection, and both reach this gateway over
    one: whoever has the result from here is answered by its version. What is not known, may have been missed in a lost
    connection, or is older than `LIVE_FRESH_S`, is asked of NATS.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._known: Lru[str, _Entry] = Lru(NAME_CACHE_ENTRIES_MAX)

    async def listen(self) -> None:
        """Begins to hear what trainers write."""
        await self._bus.hear(_LIVE_SUBJECTS, self._hear)

    async def of(self, run_id: str) -> LiveVersion:
        """The live version of a run.

        Raises:
            UnavailableError: it has none yet, or NATS does not answer.
        """
        entry = self._known.get(run_id)
        if entry is not None and self._is_current(entry):
            return cast("LiveVersion", entry.value)
        losses = self._bus.losses
        value = await self._bus.get(LIVE_BUCKET, run_id)
        if value is None:
            raise UnavailableError(f"the run {run_id!r} has no version yet; try again")
        live = msgspec.msgpack.decode(value, type=LiveVersion)
        heard = self._known.get(run_id)
        if heard is not entry and heard is not None:  # Something newer has come meanwhile.
            return cast("LiveVersion", heard.value)
        self._keep(run_id, live, losses)
        return live

    def _is_current(self, entry: _Entry) -> bool:
        return (
            entry.losses == self._bus.losses
            and self._bus.connected
            and time.monotonic() - entry.found_at < LIVE_FRESH_S
        )

    async def _hear(self, message: Msg) -> None:
        # Nothing is awaited here: the result that is next on the connection must find this done.
        run_id = message.subject.removeprefix(_LIVE_PREFIX)
        if (message.headers or {}).get(_OPERATION_HEADER):  # It was removed, not written.
            self._known.pop(run_id, None)
            return
        live = msgspec.msgpack.decode(message.data, type=LiveVersion)
        self._keep(run_id, live, self._bus.losses)

    def _keep(self, run_id: str, live: LiveVersion, losses: int) -> None:
        self._known.put(run_id, _Entry(live, time.monotonic(), losses))
