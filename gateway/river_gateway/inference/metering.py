"""What a request used, counted by the engine.

`UsageTally` reads the counts from a finished answer or from a stream's chunks, which the engine is asked to annotate
throughout, so that what was produced before a client left is known without a tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from river_billing.events import UsageEvent, UsageKind
from river_gateway.ids import uuid7_time_s
from river_gateway.tenancy.credit import UNBOUNDED

if TYPE_CHECKING:
    from river_engine.protocol import StreamUsage
    from river_gateway.inference.models import Target
    from river_gateway.tenancy.auth import Principal
    from river_gateway.tenancy.credit import Hold


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


def stream_quantities(usage: StreamUsage) -> dict[UsageKind, int]:
    """Tokens by kind of what an engine says a request has used."""
    assert 0 <= usage.cached_tokens <= usage.prompt_tokens
    return {
        UsageKind.PROMPT: usage.prompt_tokens - usage.cached_tokens,
        UsageKind.CACHED_PROMPT: usage.cached_tokens,
        UsageKind.COMPLETION: usage.completion_tokens,
    }


def usage_event(
    *,
    request_id: str,
    principal: Principal,
    target: Target,
    context_length: int,
    quantities: dict[UsageKind, int],
    user: str | None = None,
    hold: Hold = UNBOUNDED,
) -> UsageEvent | None:
    """The event of one inference request, or None when it used nothing; settles what was held for it."""
    used = {kind: quantity for kind, quantity in quantities.items() if quantity > 0}
    hold.settle(used)
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
        lease_id=hold.lease_id,
        reserved_nano_usd=hold.reserved_nano_usd,
    )
