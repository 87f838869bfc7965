"""Who asks for what, and when: drawn once, so that every way of routing answers the very same requests."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

ADAPTERS = 5000
ADAPTER_EXPONENT = 1.0
"""Of Zipf's law: the second adapter is asked for half as often as the first, the thousandth a thousandth as often."""
BASE_SHARE = 0.2
"""So many of the requests are for the base model."""
BASE_PROMPTS = 1000
"""How many system prompts the base model is asked with, as unevenly as adapters; an adapter has one of its own."""
SYSTEM_TOKENS = 512
QUESTION_TOKENS_MEAN = 128
COMPLETION_TOKENS_MEAN = 96
COMPLETION_TOKENS_MAX = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request; `system_prompt` is what its first `SYSTEM_TOKENS` say, the same for all of one adapter."""

    arrives_s: float
    adapter: str | None
    system_prompt: str
    question_tokens: int
    completion_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return SYSTEM_TOKENS + self.question_tokens


def draw_requests(count: int, *, per_s: float, seed: int) -> list[Request]:
    """So many requests at random times, `per_s` on average, in their order."""
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    adapters = _zipf_weights(ADAPTERS)
    prompts = _zipf_weights(BASE_PROMPTS)
    names = chance.choices(range(ADAPTERS), cum_weights=adapters, k=count)
    systems = chance.choices(range(BASE_PROMPTS), cum_weights=prompts, k=count)
    now_s = 0.0
    found: list[Request] = []
    for name, system in zip(names, systems, strict=True):
        now_s += chance.expovariate(per_s)
        of_base = chance.random() < BASE_SHARE
        found.append(
            Request(
                now_s,
                None if of_base else f"run_{name}@1",
                f"base {system}" if of_base else f"adapter {name}",
                1 + int(chance.expovariate(1 / QUESTION_TOKENS_MEAN)),
                min(1 + int(chance.expovariate(1 / COMPLETION_TOKENS_MEAN)), COMPLETION_TOKENS_MAX),
            )
        )
    return found


def _zipf_weights(count: int) -> list[float]:
    """Cumulative weights of ranks 1 to `count`."""
    return list(itertools.accumulate(rank**-ADAPTER_EXPONENT for rank in range(1, count + 1)))
