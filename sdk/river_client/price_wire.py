"""The structs of prices and discounts under `/river/v1` that admins set. Numbers of money are decimal strings."""

from __future__ import annotations

from typing import Literal

from river_client.wire import Wire

PricedKind = Literal["prompt", "cached_prompt", "completion", "training", "storage"]


class SetPrice(Wire, frozen=True):
    """`usd_per_million` is of tokens, for storage of a GB and month; `model` may be `*`.

    It holds for contexts of up to `context_length` tokens, from `valid_from` (ISO 8601; None: now) on.
    """

    model: str
    context_length: int
    kind: PricedKind
    usd_per_million: str
    valid_from: str | None = None


class SetDiscount(Wire, frozen=True):
    """`percent` of the price is taken off, from `valid_from` (None: now) on; 0 ends what there was.

    Of one `model` or (`*`) all, and of one kind or all.
    """

    tenant: str
    percent: str
    model: str = "*"
    kind: PricedKind | Literal["*"] = "*"
    valid_from: str | None = None


class Discount(Wire, frozen=True):
    tenant: str
    model: str
    kind: str
    percent: str
    valid_from: str
    valid_to: str | None = None


class Discounts(Wire, frozen=True):
    discounts: list[Discount]
