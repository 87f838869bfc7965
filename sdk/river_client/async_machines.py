"""`client.engines` and `client.trainers`: what serves and trains, for admins."""

from __future__ import annotations

import builtins
from urllib.parse import quote

from river_client.machine_wire import Engine, MachineAction, Machines, MachineTold, Trainer
from river_client.transport import Transport


class _Told:
    """What engines and trainers can be told."""

    _path: str

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def drain(self, machine_id: str) -> MachineTold:
        """Has it end what it has begun, and begin nothing new until told otherwise.

        Raises:
            NotFoundError: none of that id is alive.
            ConflictError: it is about to leave.
        """
        return await self._tell(machine_id, "drain")

    async def undrain(self, machine_id: str) -> MachineTold:
        """Has it go on; raises as `drain` does."""
        return await self._tell(machine_id, "undrain")

    async def restart(self, machine_id: str) -> MachineTold:
        """Has it drain, leave, and be started again by whoever looks after it; raises as `drain` does."""
        return await self._tell(machine_id, "restart")

    async def _tell(self, machine_id: str, action: MachineAction) -> MachineTold:
        path = f"{self._path}/{quote(machine_id, safe='')}/{action}"
        return await self._transport.call("POST", path, MachineTold)


class AsyncEngines(_Told):
    """`client.engines`."""

    _path = "/engines"

    async def list(self) -> builtins.list[Engine]:
        """Those that are alive."""
        return (await self._transport.call("GET", self._path, Machines)).engines


class AsyncTrainers(_Told):
    """`client.trainers`."""

    _path = "/trainers"

    async def list(self) -> builtins.list[Trainer]:
        """Those that are alive."""
        return (await self._transport.call("GET", self._path, Machines)).trainers
