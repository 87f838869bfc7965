"""What gateways tell each other of how requests went: counts of ten seconds each, and what is read from them.

What counts, wherever a number of these is shown:

* A *request* is one to a River, OpenAI or Tinker route; pages of the dashboard, health checks and unknown paths are
  none. It is told apart by the base model that answers it, or by its API where that is not known.
* It *failed* if it is ours to mend: a status from 500 on (but for 501, of what is not offered), or a stream that ended
  in an error event. What was refused for the client's own fault, limited, or left by its client has not failed.
* The *time to the first token* is from a request's arrival at the gateway until the first event with a token of it
  leaves; of streams only, since only they have one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from enum import StrEnum
from http import HTTPStatus
from typing import TYPE_CHECKING

from msgspec import Struct, field

if TYPE_CHECKING:
    from collections.abc import Mapping

SLOT_S = 10
STREAM_BROKEN = 599
"""Stands where the status of a stream would that began with 200 and ended in an error event."""

_BOUND_FIRST_S = 0.001
_BOUND_GROWTH = 1.15
_BOUNDS = 90
BOUNDS_S = tuple(_BOUND_FIRST_S * _BOUND_GROWTH**number for number in range(_BOUNDS))
"""Upper bounds of a histogram's buckets, 1 ms to some four minutes; one more bucket has what took longer."""


class Outcome(StrEnum):
    """How a request ended, as a class of its status."""

    ANSWERED = "answered"
    REFUSED = "refused"
    LIMITED = "limited"
    LEFT = "left"
    FAILED = "failed"


_CLIENT_GONE = 499


def outcome_of(status: int) -> Outcome:
    """The class of a status; 0 is one that was never sent."""
    if status in (0, _CLIENT_GONE):
        return Outcome.LEFT
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return Outcome.LIMITED
    if status == HTTPStatus.NOT_IMPLEMENTED:
        return Outcome.REFUSED
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Outcome.FAILED
    return Outcome.REFUSED if status >= HTTPStatus.BAD_REQUEST else Outcome.ANSWERED


class Failure(Struct, frozen=True, kw_only=True):
    """A request that failed; `at` is Unix time in seconds, `name` as in `Series`."""

    at: float
    name: str
    route: str
    status: int
    message: str
    request_id: str


class Series(Struct, frozen=True, kw_only=True):
    """Requests of one base model or API: how many had each status, and how many of which times fell into each bucket.

    `first` are times to the first token, `whole` those of whole answers.
    """

    statuses: dict[int, int] = field(default_factory=dict[int, int])
    first: dict[int, int] = field(default_factory=dict[int, int])
    whole: dict[int, int] = field(default_factory=dict[int, int])


class Slot(Struct, frozen=True, kw_only=True):
    """What one gateway saw in the ten seconds from `number * SLOT_S` on, Unix time.

    `failing` are the engines that it left alone at their end.
    """

    gateway_id: str
    number: int
    series: dict[str, Series] = field(default_factory=dict[str, Series])
    failures: list[Failure] = field(default_factory=list[Failure])
    failing: list[str] = field(default_factory=list[str])


def bucket_of(seconds: float) -> int:
    """The histogram's bucket of a time."""
    return bisect_left(BOUNDS_S, seconds)


def quantile_s(buckets: Mapping[int, int], share: float) -> float | None:
    """The time that `share` of those in a histogram do not exceed, to some 7 %; None if it is empty."""
    total = sum(buckets.values())
    if not total:
        return None
    left = share * total
    for bucket in sorted(buckets):
        left -= buckets[bucket]
        if left <= 0:
            break
    else:
        bucket = max(buckets)
    upper = BOUNDS_S[min(bucket, _BOUNDS - 1)]
    return upper / _BOUND_GROWTH**0.5 if bucket else upper / 2


def outcomes(statuses: Mapping[int, int]) -> Counter[Outcome]:
    """Requests by how they ended."""
    found: Counter[Outcome] = Counter()
    for status, count in statuses.items():
        found[outcome_of(status)] += count
    return found


def failed_share(statuses: Mapping[int, int]) -> float | None:
    """Of the requests that got an answer, the share that failed; None without any."""
    by_outcome = outcomes(statuses)
    total = by_outcome.total() - by_outcome[Outcome.LEFT]
    return by_outcome[Outcome.FAILED] / total if total else None
