"""What a browser does with the dashboard, without a browser."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
from support.gateway import Rig, Tenant


class Window:
    """A signed-in client with a cookie jar; `token` is that of the forms it is shown."""

    def __init__(self, client: httpx.AsyncClient, token: str) -> None:
        self.client = client
        self.token = token

    async def page(self, path: str) -> str:
        """The text of a page that must be there."""
        answer = await self.client.get(f"/admin{path}")
        assert answer.status_code == 200, answer.text
        return answer.text

    async def send(self, path: str, /, **fields: str) -> httpx.Response:
        """Sends a form of ours."""
        return await self.client.post(f"/admin{path}", data={"csrf_token": self.token} | fields)


@asynccontextmanager
async def signed_in(rig: Rig, tenant: Tenant) -> AsyncGenerator[Window]:
    """A window of a tenant's key."""
    async with httpx.AsyncClient(base_url=rig.url) as client:
        answer = await client.post("/admin/sign-in", data={"key": tenant.secret})
        assert answer.status_code == 303
        yield Window(client, csrf_token((await client.get("/admin")).text))


def csrf_token(page: str) -> str:
    """The token in a page's forms."""
    found = re.search(r'name="csrf_token" value="(\w+)"', page)
    assert found is not None
    return found[1]
