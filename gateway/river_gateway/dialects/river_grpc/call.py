"""One call of the River dialect, as its handlers see it, and what a handler is."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

if TYPE_CHECKING:
    from river_gateway.dialects.river_grpc.known_runs import KnownRuns
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks, and until when; `deadline` is of a steady clock, None when the client would wait for ever."""

    services: Services
    known_runs: KnownRuns
    principal: Principal
    request_id: str
    deadline: float | None

    def time_left_s(self, *, at_most_s: float, margin_s: float = 0.0) -> float:
        """How long may be waited so that the answer still arrives `margin_s` before the deadline."""
        if self.deadline is None:
            return at_most_s
        return max(0.0, min(at_most_s, self.deadline - margin_s - time.monotonic()))


Made = Message | bytes
"""An answer; what is large has been encoded by its handler, beside the event loop."""
Handler = Callable[[Call, Any], Awaitable[Made]]
StreamHandler = Callable[[Call, Any], AsyncIterator[Made]]

TRAIN = ("train",)
INFER = ("infer",)
EITHER = ("train", "infer")


@dataclass(frozen=True, slots=True)
class Unary:
    """An RPC with one answer: the type of its request, the scopes of which a key needs one (none: no key is needed)."""

    request: type[Message]
    scopes: tuple[str, ...]
    handle: Handler


@dataclass(frozen=True, slots=True)
class Streaming:
    """An RPC that answers with a stream."""

    request: type[Message]
    scopes: tuple[str, ...]
    handle: StreamHandler


Methods = dict[str, Unary | Streaming]
