"""Streams whose events have names: those of OpenAI's Responses and Anthropic's Messages.

Their own counts come with the last event only, so the engine says in comments what has been used so far. The comments
are counted and taken out; the events pass as they are, but for the last ones, which a route may want to change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from river_engine.protocol import USAGE_COMMENT, StreamUsage
from river_gateway.inference.metering import stream_quantities

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from river_billing.events import UsageKind

    Change = Callable[[bytes], bytes]

_END = b"\n\n"
_usage_decoder = msgspec.json.Decoder(StreamUsage)


def unchanged(event: bytes) -> bytes:
    """The event as it is."""
    return event


class TypedEvents:
    """Reads one stream; `last` maps the first lines of the events that end one to what becomes of them."""

    def __init__(self, last: Mapping[bytes, Change]) -> None:
        self._last = last
        self._comment = b""
        self.done = False

    def show(self, events: bytes) -> bytes:
        """Whole events without the engine's comments."""
        shown: list[bytes] = []
        for event in events.removesuffix(_END).split(_END):
            if event.startswith(USAGE_COMMENT):
                self._comment = event
                continue
            change = self._last.get(event.partition(b"\n")[0])
            if change is not None:
                self.done = True
                event = change(event)  # noqa: PLW2901 - what becomes of it
            shown += (event, _END)
        return b"".join(shown)

    def quantities(self) -> dict[UsageKind, int]:
        """Tokens by kind, as the latest comment said."""
        if not self._comment:
            return {}
        return stream_quantities(_usage_decoder.decode(self._comment[len(USAGE_COMMENT) :]))
