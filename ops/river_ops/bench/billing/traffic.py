"""The usage of many tenants, the same for the same seed, and what it must cost by a reckoning of its own."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Context, Decimal

from river_billing.events import UsageEvent, UsageKind
from river_billing.prices import card_prices

TENANTS = 200
KEYS_PER_TENANT = 2
TENANT_EXPONENT = 0.6
"""Of the power law by which some tenants use more than others."""
CACHED_SHARE = 0.4
TRAINING_SHARE = 0.05
EVENTS_PER_S = 2000.0
"""Of the clock by which events happen, so that a run spans hours; events arrive as fast as they can."""
TIERS = (
    ("Qwen3.5-397B-A17B-FP8", 65_536),
    ("Qwen3.5-397B-A17B-FP8", 262_144),
    ("Kimi-K2.6-NVFP4", 32_768),
    ("Kimi-K2.6-NVFP4", 131_072),
    ("GLM-5.1-NVFP4", 131_072),
)
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)


@dataclass(slots=True)
class Expected:
    """What must be in the tables when a number of events are: lines, and nano-dollars by tenant."""

    events: int = 0
    lines: int = 0
    amounts: Counter[str] = field(default_factory=Counter[str])


def tenant_ids() -> list[str]:
    """All tenants; every other one is prepaid."""
    return [f"ten_{number:04d}" for number in range(TENANTS)]


def draw_events(count: int, *, seed: int, began_at: float) -> Iterator[UsageEvent]:
    """Events in the order they happened, from `began_at` (Unix seconds) on."""
    draw = random.Random(seed)  # noqa: S311
    tenants = tenant_ids()
    weights = [1 / (rank + 1) ** TENANT_EXPONENT for rank in range(TENANTS)]
    cumulated = [sum(weights[: rank + 1]) for rank in range(TENANTS)]
    for number in range(count):
        occurred_at = round(began_at + number / EVENTS_PER_S, 3)
        (tenant,) = draw.choices(tenants, cum_weights=cumulated)
        key = draw.randrange(KEYS_PER_TENANT)
        # A tenant mostly stays with a model or two.
        base_model, context_length = TIERS[(number_of(tenant) + draw.randrange(2)) % len(TIERS)]
        yield UsageEvent(
            event_id=_uuid7(occurred_at, draw),
            occurred_at=occurred_at,
            tenant_id=tenant,
            key_id=f"key_{tenant}_{key}",
            base_model=base_model,
            context_length=context_length,
            quantities=_quantities(draw),
            run_id=f"run_{tenant}",
            policy_version=f"run_{tenant}@{number // 10_000}",
            user=f"user-{draw.randrange(1000)}",
        )


def expected(events: Iterable[UsageEvent]) -> Expected:
    """What the price card asks for the events, each line rounded once, in exact decimals."""
    prices = {(model, tier, kind): price for model, tier, kind, price in card_prices()}
    found = Expected()
    for event in events:
        found.events += 1
        for kind, quantity in event.quantities.items():
            price = prices[event.base_model, event.context_length, kind]
            exact = _EXACT.multiply(Decimal(quantity), price)
            found.lines += 1
            found.amounts[event.tenant_id] += int(_EXACT.to_integral_value(exact))
    return found


def number_of(text: str) -> int:
    """The number in a tenant's id."""
    return int(text.rpartition("_")[2])


def _quantities(draw: random.Random) -> dict[UsageKind, int]:
    if draw.random() < TRAINING_SHARE:
        return {UsageKind.TRAINING: draw.randrange(1, 32_768)}
    quantities = {
        UsageKind.PROMPT: draw.randrange(1, 8_192),
        UsageKind.COMPLETION: draw.randrange(1, 2_048),
    }
    if draw.random() < CACHED_SHARE:
        quantities[UsageKind.CACHED_PROMPT] = draw.randrange(1, 4_096)
    return quantities


def _uuid7(occurred_at: float, draw: random.Random) -> str:
    head = round(occurred_at * 1000) << 80 | 0x7 << 76 | draw.getrandbits(12) << 64
    return str(uuid.UUID(int=head | 0b10 << 62 | draw.getrandbits(62)))
