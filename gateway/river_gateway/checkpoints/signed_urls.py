"""URLs that open one file of a checkpoint for a while to whoever has them: for downloads by programs without a key.

A URL is signed by HMAC-SHA-256 over the checkpoint, the file and the time when it ends, with a secret that all gateways
share: `RIVER_URL_SECRET`, or one that is made once and kept in Postgres. A checkpoint that is deleted or has expired is
gone for its URLs, too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from river_gateway.errors import NotFoundError, PermissionDeniedError

if TYPE_CHECKING:
    from river_gateway.database import Database

ROUTE = "/signed"
_NAME = "urls"
_SECRET_BYTES = 32
_MAKE = "insert into gateway_secret (name, secret) values ($1, $2) on conflict (name) do nothing"
_FIND_LOCATION = """
select location from checkpoint
where checkpoint_id = $1 and deleted_at is null and (expires_at is null or expires_at > now())
"""
_READ = "select secret from gateway_secret where name = $1"


class UrlSigner:
    """Signs URLs and checks them; the secret is fetched when it is first needed."""

    def __init__(self, database: Database, configured: str | None) -> None:
        self._database = database
        self._secret = None if configured is None else configured.encode()

    async def query(self, checkpoint_id: str, name: str, expires_at: int) -> str:
        """The path and query, below the API, that open a file until `expires_at` (Unix seconds)."""
        signature = await self._sign(checkpoint_id, name, expires_at)
        path = f"{ROUTE}/{quote(checkpoint_id, safe='')}/{quote(name, safe='')}"
        return f"{path}?{urlencode({'expires': expires_at, 'signature': signature})}"

    async def check(self, checkpoint_id: str, name: str, expires_at: int, signature: str) -> None:
        """Makes sure that a URL was signed here and has not ended.

        Raises:
            NotFoundError: it was not.
            PermissionDeniedError: it has.
        """
        expected = await self._sign(checkpoint_id, name, expires_at)
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise NotFoundError("there is nothing at this URL: it was not signed here")
        if expires_at <= time.time():
            raise PermissionDeniedError("expires: the time of this URL is over", param="expires")

    async def _sign(self, checkpoint_id: str, name: str, expires_at: int) -> str:
        if self._secret is None:
            await self._database.execute(_MAKE, _NAME, secrets.token_bytes(_SECRET_BYTES))
            self._secret = bytes(await self._database.fetchval(_READ, _NAME))
        # No part can hold a line feed, so that no two can be taken for each other.
        message = f"{checkpoint_id}\n{quote(name, safe='')}\n{expires_at}".encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


async def find_location(database: Database, checkpoint_id: str) -> str:
    """Where the files of a live checkpoint are, whoever's it is: for who has been let in to them otherwise.

    Raises:
        NotFoundError: there is none.
    """
    location = await database.fetchval(_FIND_LOCATION, checkpoint_id)
    if location is None:
        raise NotFoundError(f"there is no checkpoint {checkpoint_id!r}", param="checkpoint_id")
    return location
