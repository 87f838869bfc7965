"""Model names of one's own: what they point at, how they share requests, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from river_client import wire
from river_client.transport import Transport


class AsyncAliases:
    """`client.aliases`: model names of your own."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def list(self) -> list[wire.Alias]:
        """Your aliases, by name."""
        page = await self._transport.call("GET", "/aliases", wire.Page)
        return page.aliases or []

    async def get(self, name: str) -> wire.Alias:
        """What a name points at."""
        return await self._transport.call("GET", _path(name), wire.Alias)

    async def set(self, name: str, target: str) -> wire.Alias:
        """Points a name at a base model, a checkpoint, or `river://<run>` to follow its live version."""
        return await self._put(name, wire.PutAlias(target=target))

    async def promote(self, name: str, target: str) -> wire.Alias:
        """Lets a target take all requests of a name from now on; `rollback` undoes it."""
        return await self.set(name, target)

    async def split(self, name: str, weights: Mapping[str, int]) -> wire.Alias:
        """Shares the requests of a name among targets by weight: `{stable: 95, canary: 5}`.

        Requests with the same `prompt_cache_key`, or else the same `user`, are answered by the same target.
        """
        targets = [
            wire.AliasTarget(target=target, weight=weight) for target, weight in weights.items()
        ]
        return await self._put(name, wire.PutAlias(targets=targets))

    async def rollback(self, name: str) -> wire.Alias:
        """Points a name at what it pointed at before; again goes back one more.

        Raises:
            NotFoundError: there is no such name.
            InvalidRequestError: there is nothing to go back to, or it is gone.
        """
        current = await self.get(name)
        # Saying what is to be left makes a retry harmless: it would otherwise go back twice.
        params = {"version": str(current.version)}
        return await self._transport.call(
            "POST", f"{_path(name)}/rollback", wire.Alias, params=params
        )

    async def history(self, name: str) -> list[wire.Alias]:
        """What a name has pointed at, newest first."""
        page = await self._transport.call("GET", f"{_path(name)}/history", wire.Page)
        return page.aliases or []

    async def delete(self, name: str) -> None:
        """Removes a name; what it pointed at stays."""
        await self._transport.tell("DELETE", _path(name))

    async def _put(self, name: str, body: wire.PutAlias) -> wire.Alias:
        return await self._transport.call("PUT", _path(name), wire.Alias, body=body)


def _path(name: str) -> str:
    return f"/aliases/{quote(name, safe='')}"
