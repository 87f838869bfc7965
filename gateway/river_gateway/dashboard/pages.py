"""Pages, and how they stay current: a page names the parts of it that change, and a stream sends those that did."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from litestar import Response
from litestar.response import Redirect, ServerSentEvent, ServerSentEventMessage

from river_gateway.dashboard.static_files import static_url
from river_gateway.dashboard.viewer import viewer_of
from river_gateway.dashboard.words import FILTERS
from river_gateway.database import POSTGRES_AWAY
from river_gateway.errors import GatewayError, UnauthenticatedError, UnavailableError
from river_gateway.limits import (
    DASHBOARD_KEEP_ALIVE_S,
    DASHBOARD_LIVE_S,
    DASHBOARD_STREAMS_MAX,
    DASHBOARD_STREAMS_OF_TENANT_MAX,
)
from river_gateway.services import services_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence

    from litestar import Request
    from litestar.datastructures import Cookie

    from river_gateway.dashboard.viewer import Viewer

    Read = Callable[[], Awaitable[Mapping[str, Any]]]

_HTML = "text/html; charset=utf-8"
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# Jinja leaves these two untyped.
cast("dict[str, Any]", _templates.filters).update(FILTERS)  # pyright: ignore[reportUnknownMemberType]
cast("dict[str, Any]", _templates.globals)["static_url"] = static_url  # pyright: ignore[reportUnknownMemberType]


@dataclass(frozen=True, slots=True)
class Page:
    """A page's template, and the templates of its changing parts by the id of the element that each fills."""

    template: str
    parts: Mapping[str, str] = field(default_factory=dict[str, str])


def show(
    page: Page,
    request: Request[Any, Any, Any],
    viewer: Viewer | None,
    values: Mapping[str, Any],
    *,
    status: int = 200,
) -> Response[str]:
    """A whole page; its templates see `values`, the viewer and the request's path and query."""
    text = _templates.get_template(page.template).render(
        page=page,
        viewer=viewer,
        path=request.url.path,
        query=request.url.query,
        **values,
    )
    return Response(text, media_type=_HTML, status_code=status, headers=_HEADERS)


def redirect(path: str, *, cookies: Sequence[Cookie] = ()) -> Response[Any]:
    """Sends the browser on to another page of ours, which it reads anew whatever brought it here."""
    assert path.startswith("/")
    return Redirect(path, status_code=303, cookies=list(cookies))


def follow(
    page: Page, request: Request[Any, Any, Any], viewer: Viewer, read: Read
) -> ServerSentEvent:
    """Sends each part of a page when it has changed, as an event `part` with the element's id and what is in it.

    The viewer's key is checked before every look: once it has ended, so does the stream, with an event `signed_out`.

    Raises:
        UnavailableError: too many pages are being watched already.
    """
    streams = cast("LiveStreams", request.app.state.live_streams)
    streams.check(viewer.principal.tenant_id)
    return ServerSentEvent(_part_events(streams, page, request, viewer, read))


class LiveStreams:
    """How many pages are being watched, which is bounded, for each tenant too."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def check(self, tenant_id: str) -> None:
        """Raises UnavailableError if a tenant may watch no more."""
        for count, count_max in (
            (self._counts[tenant_id], DASHBOARD_STREAMS_OF_TENANT_MAX),
            (self._counts.total(), DASHBOARD_STREAMS_MAX),
        ):
            if count >= count_max:
                raise UnavailableError(f"{count} pages are being watched already")

    @contextmanager
    def counted(self, tenant_id: str) -> Generator[None]:
        """One more while the block runs."""
        self._counts[tenant_id] += 1
        try:
            yield
        finally:
            self._counts[tenant_id] -= 1
            if not self._counts[tenant_id]:
                del self._counts[tenant_id]


async def _part_events(
    streams: LiveStreams,
    page: Page,
    request: Request[Any, Any, Any],
    viewer: Viewer,
    read: Read,
) -> AsyncGenerator[ServerSentEventMessage]:
    stopping = services_of(request).stopping
    shown: dict[str, str] = {}
    sent_at = time.monotonic()
    with streams.counted(viewer.principal.tenant_id):
        while not stopping.is_set():
            try:
                await viewer_of(request)
                values = await read()
            except UnauthenticatedError:
                yield ServerSentEventMessage(event="signed_out", data="")
                return
            except (GatewayError, *POSTGRES_AWAY):
                values = None  # What is shown stays, and is looked at again.
            if values is not None:
                for element, text in _changed(page, viewer, values, shown):
                    sent_at = time.monotonic()
                    data = msgspec.json.encode({"id": element, "html": text}).decode()
                    yield ServerSentEventMessage(event="part", data=data)
            if time.monotonic() - sent_at > DASHBOARD_KEEP_ALIVE_S:
                sent_at = time.monotonic()
                yield ServerSentEventMessage(comment="still here")
            await _pause(stopping, DASHBOARD_LIVE_S)


def _changed(
    page: Page, viewer: Viewer, values: Mapping[str, Any], shown: dict[str, str]
) -> list[tuple[str, str]]:
    """The parts that look other than what is `shown`, which becomes what they look like."""
    changed: list[tuple[str, str]] = []
    for element, template in page.parts.items():
        text = _templates.get_template(template).render(viewer=viewer, **values)
        if shown.get(element) != text:
            shown[element] = text
            changed.append((element, text))
    return changed


async def _pause(stopping: asyncio.Event, seconds: float) -> None:
    """Waits, but not for a process that is to end."""
    try:
        async with asyncio.timeout(seconds):
            await stopping.wait()
    except TimeoutError:
        pass
