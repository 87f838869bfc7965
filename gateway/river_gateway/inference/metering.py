"""What a request used, and getting that to the recorder: published and acknowledged before the client sees the end.

Counts always are the engine's own. `UsageTally` reads them from a finished answer or from a stream's chunks, which the
engine is asked to annotate throughout, so that what was produced before a client left is known without a tokenizer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from river_billing import streams
from river_billing.events import UsageEvent, UsageKind
from river_gateway.bus import REFUSALS, BusError
from river_gateway.errors import UnavailableError
from river_gateway.ids import uuid7_time_s
from river_gateway.limits import USAGE_BACKLOG_MAX, USAGE_RETRY_S

if TYPE_CHECKING:
    from river_gateway.bus import Bus
    from river_gateway.inference.models import Target
    from river_gateway.telemetry import Telemetry
    from river_gateway.tenancy.auth import Principal

logger = logging.getLogger("river.gateway")

# ---- Counting --------------------------------------------------------------------------------------------------------


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """OpenAI's usage object; `prompt_tokens` includes the cached ones."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Choice(msgspec.Struct, frozen=True):
    index: int = 0


class Chunk(msgspec.Struct, frozen=True):
    """The part of an answer or of a stream's chunk that says what it cost."""

    choices: list[Choice] = msgspec.field(default_factory=list[Choice])
    usage: Usage | None = None


@dataclass(slots=True)
class UsageTally:
    """Adds up one request's usage.

    The engine's running counts are per choice, and per prompt for a completion of several prompts, whose choices are
    numbered through: choice i belongs to prompt `i // choices_per_prompt`. The last chunk, without choices, has the
    sum.
    """

    choices_per_prompt: int = 1
    _prompt: dict[int, int] = field(default_factory=dict[int, int])
    _completion: dict[int, int] = field(default_factory=dict[int, int])
    _total: Usage | None = None

    def observe(self, chunk: Chunk) -> None:
        """Takes in a chunk of a stream."""
        if chunk.usage is None:
            return
        if not chunk.choices:
            self._total = chunk.usage
        for choice in chunk.choices:
            produced = chunk.usage.completion_tokens or 0
            self._completion[choice.index] = max(self._completion.get(choice.index, 0), produced)
            self._prompt[choice.index // self.choices_per_prompt] = chunk.usage.prompt_tokens

    def finish(self, usage: Usage | None) -> None:
        """Takes in the usage of a whole answer."""
        self._total = usage or self._total

    def quantities(self) -> dict[UsageKind, int]:
        """Tokens by kind so far; the cached part of the prompt is not in `PROMPT`."""
        total = self._total or Usage(
            prompt_tokens=sum(self._prompt.values()),
            completion_tokens=sum(self._completion.values()),
        )
        details = total.prompt_tokens_details
        cached = (details.cached_tokens if details else None) or 0
        assert 0 <= cached <= total.prompt_tokens
        return {
            UsageKind.PROMPT: total.prompt_tokens - cached,
            UsageKind.CACHED_PROMPT: cached,
            UsageKind.COMPLETION: total.completion_tokens or 0,
        }


def usage_event(
    *,
    request_id: str,
    principal: Principal,
    target: Target,
    context_length: int,
    quantities: dict[UsageKind, int],
    user: str | None = None,
) -> UsageEvent | None:
    """The event of one inference request, or None when it used nothing."""
    used = {kind: quantity for kind, quantity in quantities.items() if quantity > 0}
    if not used:
        return None
    return UsageEvent(
        event_id=request_id,
        occurred_at=uuid7_time_s(request_id),
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        base_model=target.base_model,
        context_length=context_length,
        quantities=used,
        run_id=target.run_id,
        policy_version=target.policy_version,
        user=user,
    )


# ---- Publishing ------------------------------------------------------------------------------------------------------


class Meter:
    """Publishes usage events. While NATS is away they wait here, bounded, and requests go on being answered."""

    def __init__(self, bus: Bus, telemetry: Telemetry) -> None:
        self._bus = bus
        self._telemetry = telemetry
        self._backlog: deque[UsageEvent] = deque()
        self._wake = asyncio.Event()

    def admit(self) -> None:
        """Refuses new work when what it uses could no longer be remembered.

        Raises:
            UnavailableError: the backlog is full.
        """
        if len(self._backlog) >= USAGE_BACKLOG_MAX:
            raise UnavailableError("usage cannot be recorded at the moment; try again")

    async def record(self, event: UsageEvent | None) -> None:
        """Returns once the event is stored, or once it is in the backlog because NATS cannot store it now."""
        if event is None:
            return
        try:
            await self._publish(event)
        except REFUSALS as error:
            self._drop(event, error)
        except (BusError, UnavailableError, TimeoutError) as error:
            logger.warning("usage event waits: %s", error, extra={"request": event.event_id})
            self.record_later(event)
        else:
            self._telemetry.metered(event)

    def record_later(self, event: UsageEvent | None) -> None:
        """Leaves an event to `drain`; for places that cannot wait, such as a cancelled stream."""
        if event is not None:
            self._backlog.append(event)
            self._telemetry.usage_backlog.set(len(self._backlog))
            self._wake.set()

    async def drain(self) -> None:
        """Publishes the backlog whenever there is one; runs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while not await self.flush():  # noqa: ASYNC110 - polls NATS, not a variable
                await asyncio.sleep(USAGE_RETRY_S)

    async def flush(self) -> bool:
        """Publishes the backlog, oldest first; False when NATS refused and some of it is left."""
        while self._backlog:
            event, refused = self._backlog[0], None
            try:
                await self._publish(event)
            except REFUSALS as error:
                refused = error
            except (BusError, UnavailableError, TimeoutError):
                return False
            if self._backlog and self._backlog[0] is event:
                self._backlog.popleft()
                if refused is None:
                    self._telemetry.metered(event)
                else:
                    self._drop(event, refused)
            self._telemetry.usage_backlog.set(len(self._backlog))
        return True

    @property
    def waiting(self) -> int:
        """How many events NATS has not acknowledged."""
        return len(self._backlog)

    async def _publish(self, event: UsageEvent) -> None:
        self._bus.require()
        await streams.publish(self._bus.jetstream, event)

    def _drop(self, event: UsageEvent, error: BusError) -> None:
        """Gives up an event that JetStream will never take, rather than let all others wait behind it."""
        logger.error("usage event dropped: %s", error, extra={"request": event.event_id})
        self._telemetry.usage_dropped.inc()
