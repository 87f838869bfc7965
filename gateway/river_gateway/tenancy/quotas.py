"""Limits of keys and tenants: requests and tokens per minute, and requests at once.

`Quotas.admit` is called before the work and costs microseconds, whatever other gateways do: it spends what this gateway
holds of each limit (`shares.py` says how that is got). Tokens are reserved by estimate and settled by fact; what was
too little is owed and missing afterwards. A refused request costs nothing. A limit is a bucket of one minute's
allowance: all of it can be used at once, and then as it flows in.

Headers are OpenAI's, for the limits that there are: of a key's and its tenant's, the one that has less left. Without
limits there are none: a number would have to be made up.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from river_gateway.errors import RateLimitedError
from river_gateway.ids import new_id
from river_gateway.limits import (
    BYTES_PER_TOKEN,
    QUOTA_OWNERS_MAX,
    QUOTA_PARTS_MAX,
    QUOTA_ROUND_S,
    QUOTA_SWEEP_MAX,
)
from river_gateway.tenancy.messages import Announcement, Part
from river_gateway.tenancy.replicas import Replicas
from river_gateway.tenancy.shares import RateShare, SlotShare

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from river_client.wire import Limits
    from river_gateway.tenancy.auth import Principal
    from river_gateway.tenancy.messages import LimitKind

Headers = list[tuple[bytes, bytes]]

_UNITS: dict[LimitKind, str] = {
    "requests": "requests per minute",
    "tokens": "tokens per minute",
    "slots": "concurrent requests",
}

_HEADERS: dict[LimitKind, tuple[bytes, bytes, bytes]] = {
    "requests": (
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-reset-requests",
    ),
    "tokens": (
        b"x-ratelimit-limit-tokens",
        b"x-ratelimit-remaining-tokens",
        b"x-ratelimit-reset-tokens",
    ),
}


class Owner:
    """What is kept of a key or a tenant with limits; `limits` is None as long as only others have spoken of it."""

    __slots__ = ("limits", "name", "requests", "slots", "tickets", "tokens")

    def __init__(self, name: str) -> None:
        self.name = name
        self.limits: Limits | None = None
        self.requests: RateShare | None = None
        self.tokens: RateShare | None = None
        self.slots: SlotShare | None = None
        self.tickets = 0

    def fit(self, limits: Limits, replicas: Replicas, now: float) -> None:
        """Makes the shares those of `limits`."""
        self.limits = limits
        self.requests = self._rate("requests", limits.requests_per_minute, replicas, now)
        self.tokens = self._rate("tokens", limits.tokens_per_minute, replicas, now)
        if limits.concurrent_requests is None:
            self.slots = None
        elif self.slots is None:
            self.slots = SlotShare(self.name, limits.concurrent_requests, replicas)
        else:
            self.slots.limit = limits.concurrent_requests

    def rates(self) -> list[RateShare]:
        """The shares of limits per minute."""
        return [share for share in (self.requests, self.tokens) if share is not None]

    def shares(self) -> list[RateShare | SlotShare]:
        """All shares."""
        return [share for share in (self.slots, self.requests, self.tokens) if share is not None]

    def heard_of(self, part: Part, replicas: Replicas, now: float) -> RateShare | SlotShare:
        """The share that a part is about, made by what the part says if it is not there."""
        match part.kind:
            case "slots":
                self.slots = self.slots or SlotShare(self.name, part.limit, replicas)
                return self.slots
            case "requests":
                self.requests = self.requests or RateShare(
                    self.name, part.kind, part.limit, replicas, now
                )
                return self.requests
            case "tokens":
                self.tokens = self.tokens or RateShare(
                    self.name, part.kind, part.limit, replicas, now
                )
                return self.tokens

    def idle(self, now: float) -> bool:
        """Whether nothing would be lost with it."""
        return not self.tickets and all(share.idle(now) for share in self.shares())

    def _rate(
        self, kind: LimitKind, limit: int | None, replicas: Replicas, now: float
    ) -> RateShare | None:
        share = self.requests if kind == "requests" else self.tokens
        if limit is None:
            return None
        if share is None:
            return RateShare(self.name, kind, limit, replicas, now)
        if share.limit != limit:
            share.resize(now, limit)
        return share


@dataclass(slots=True)
class Reservation:
    """What a ticket has of one owner's limits. The shares are those of its admission, whatever they are by its end."""

    owner: Owner
    slots: SlotShare | None
    tokens: RateShare | None
    reserved: int

    def settle(self, now: float, tokens: int) -> None:
        """Gives back what was reserved beyond `tokens`, or owes what was not, and the slot."""
        self.owner.tickets -= 1
        if self.tokens is not None and tokens != self.reserved:
            self.tokens.spend(now, tokens - self.reserved)
        if self.slots is not None:
            self.slots.vacate()


class Ticket:
    """An admitted request, to be settled once at its end. As a context it is settled with 0 unless that was done."""

    __slots__ = ("_quotas", "_reservations", "_settled")

    def __init__(self, quotas: Quotas | None, reservations: list[Reservation]) -> None:
        self._quotas = quotas
        self._reservations = reservations
        self._settled = False

    @property
    def headers(self) -> Headers:
        """OpenAI's `x-ratelimit-…`, as things are now."""
        if self._quotas is None:
            return []
        owners = [reservation.owner for reservation in self._reservations]
        return rate_headers(owners, self._quotas.clock())

    def settle(self, tokens: int) -> None:
        """Ends the request, which used `tokens`; doing it again changes nothing."""
        assert tokens >= 0
        if self._settled or self._quotas is None:
            return
        self._settled = True
        now = self._quotas.clock()
        for reservation in self._reservations:
            reservation.settle(now, tokens)
            self._quotas.used(reservation.owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.settle(0)


UNLIMITED: Final = Ticket(None, [])
"""The ticket of everybody without limits."""


class Quotas:
    """The limits of all keys and tenants, as far as this gateway has met them."""

    def __init__(
        self, gateway_id: str | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.replicas = Replicas(gateway_id or new_id("gw"), clock())
        self._owners: OrderedDict[str, Owner] = OrderedDict()
        self._busy: dict[str, Owner] = {}
        """Those that a tick has something to do for."""
        self._sequence = 0

    def admit(self, principal: Principal, tokens: int) -> Ticket:
        """Lets a request in that may use up to about `tokens`; of more than a minute's allowance just that is reserved.

        Raises:
            RateLimitedError: it would be over a limit; says which, and when to come again.
        """
        assert tokens >= 0
        key, tenant = principal.limits, principal.tenant_limits
        if key is None and tenant is None:
            return UNLIMITED
        now = self.clock()
        owners: list[Owner] = []
        if key is not None:
            owners.append(self._owner(principal.key_id, key, now))
        if tenant is not None:
            owners.append(self._owner(principal.tenant_id, tenant, now))
        for owner in owners:
            self._busy[owner.name] = owner
            share = _refusing(owner, now, tokens)
            if share is not None:
                raise _refusal(share, owners, now, tokens)
        return Ticket(self, [_reserve(owner, now, tokens) for owner in owners])

    def used(self, owner: Owner) -> None:
        """Something of an owner's has been given back or spent besides."""
        self._busy[owner.name] = owner

    def _owner(self, name: str, limits: Limits, now: float) -> Owner:
        owner = self._owners.get(name) or self._add(name)
        if owner.limits is not limits:
            owner.fit(limits, self.replicas, now)
        self._owners.move_to_end(name)
        return owner

    def _add(self, name: str) -> Owner:
        self._owners[name] = owner = Owner(name)
        if len(self._owners) > QUOTA_OWNERS_MAX:
            self._owners.popitem(last=False)
        return owner

    # ---- With the other gateways -------------------------------------------------------------------------------------

    def tick(self, *, connected: bool) -> None:
        """To be called every `QUOTA_TICK_S`: puts back what is not needed, and notices who has come or gone."""
        now = self.clock()
        gone, turned = self.replicas.look(now, connected=connected)
        for peer in gone:
            self._forget_peer(peer)
        if turned:
            for owner in self._owners.values():
                for rate in owner.rates():
                    if self.replicas.cut_off:
                        rate.part(now)
                    else:
                        rate.rejoin(now)
        for name, owner in list(self._busy.items()):
            for share in owner.shares():
                share.tick(now)
            if not any(share.active(now) for share in owner.shares()):
                del self._busy[name]
        self._sweep(now)

    def announcements(self) -> list[Announcement]:
        """What the others are to be told now, at least that this gateway is there; in the order of being sent."""
        now = self.clock()
        news, self.replicas.news = self.replicas.news, {}
        answers, self.replicas.asking = list(self.replicas.asking), {}
        views: list[Part] = []
        if answers:
            for owner in self._owners.values():
                views += [rate.view(now) for rate in owner.rates()]
                if owner.slots is not None:
                    news[owner.slots] = None
        parts = [share.news(now) for share in news]
        return [
            self._announcement(
                parts=parts[start : start + QUOTA_PARTS_MAX],
                views=views[start : start + QUOTA_PARTS_MAX],
                answers=answers,
                asks=self.replicas.asks(now),
            )
            for start in range(0, max(len(parts), len(views), 1), QUOTA_PARTS_MAX)
        ]

    def farewell(self) -> Announcement:
        """That this gateway is going: its part is free at once."""
        return self._announcement(leaves=True)

    def hear(self, message: Announcement) -> None:
        """Takes in what a gateway has announced; its own words, too, for they show that it is heard."""
        now = self.clock()
        if not self.replicas.hear(message, now):
            return
        if message.leaves:
            self._forget_peer(message.gateway)
        # Whoever is answered gets the drawn amounts with the views.
        told_all = self.replicas.gateway_id in message.answers
        for part in message.parts:
            share = self._heard_of(part, now)
            if isinstance(share, SlotShare) or not told_all:
                share.hear(now, message.gateway, part)
        for part in message.views if told_all else ():
            share = self._heard_of(part, now)
            assert isinstance(share, RateShare)
            share.hear_view(now, message.gateway, part)

    def _announcement(self, **changes: Any) -> Announcement:
        self._sequence += 1
        return Announcement(gateway=self.replicas.gateway_id, sequence=self._sequence, **changes)

    def _heard_of(self, part: Part, now: float) -> RateShare | SlotShare:
        owner = self._owners.get(part.owner) or self._add(part.owner)
        return owner.heard_of(part, self.replicas, now)

    def _forget_peer(self, peer: str) -> None:
        for owner in self._owners.values():
            for share in owner.shares():
                share.forget(peer)

    def _sweep(self, now: float) -> None:
        """Looks at some of the owners, in turn, and lets go of those that nothing is to be remembered of."""
        for _ in range(min(QUOTA_SWEEP_MAX, len(self._owners))):
            name, owner = next(iter(self._owners.items()))
            if owner.idle(now):
                del self._owners[name]
            else:
                self._owners.move_to_end(name)


# ---- One owner -------------------------------------------------------------------------------------------------------


def _refusing(owner: Owner, now: float, tokens: int) -> RateShare | SlotShare | None:
    """The limit of an owner that a request would be over."""
    if owner.slots is not None and not owner.slots.offer(now, 1):
        return owner.slots
    if owner.requests is not None and not owner.requests.offer(now, 1):
        return owner.requests
    share = owner.tokens
    if share is not None and not share.offer(now, min(tokens, share.limit)):
        return share
    return None


def _reserve(owner: Owner, now: float, tokens: int) -> Reservation:
    """Spends what was offered."""
    owner.tickets += 1
    reserved = 0
    if owner.slots is not None:
        owner.slots.occupy()
    if owner.requests is not None:
        owner.requests.spend(now, 1)
    if owner.tokens is not None:
        reserved = min(tokens, owner.tokens.limit)
        owner.tokens.spend(now, reserved)
    return Reservation(owner, owner.slots, owner.tokens, reserved)


def _refusal(
    share: RateShare | SlotShare, owners: list[Owner], now: float, tokens: int
) -> RateLimitedError:
    need = min(tokens, share.limit) if share.kind == "tokens" else 1
    wait_s = max(share.wait_s(now, need), QUOTA_ROUND_S)
    whose = "API key" if share.owner.startswith("key_") else "tenant"
    asked = f" and {tokens} were asked for" if share.kind == "tokens" else ""
    return RateLimitedError(
        f"rate limit reached: the {whose} {share.owner} may use {share.limit} "
        f"{_UNITS[share.kind]}{asked}; try again in {duration(wait_s)}",
        openai_type="tokens" if share.kind == "tokens" else "requests",
        retry_after_s=wait_s,
        headers=rate_headers(owners, now),
    )


def tokens_guessed(characters: int) -> int:
    """About how many tokens a text has, when nobody has counted yet; what it was is settled later."""
    return math.ceil(characters / BYTES_PER_TOKEN)


# ---- Headers ---------------------------------------------------------------------------------------------------------


def rate_headers(owners: list[Owner], now: float) -> Headers:
    """OpenAI's headers for the limits per minute that there are."""
    tightest: dict[LimitKind, tuple[float, RateShare]] = {}
    for owner in owners:
        for share in owner.rates():
            remaining = share.remaining(now)
            if share.kind not in tightest or remaining < tightest[share.kind][0]:
                tightest[share.kind] = remaining, share
    headers: Headers = []
    for kind, (remaining, share) in tightest.items():
        limit_name, remaining_name, reset_name = _HEADERS[kind]
        headers += [
            (limit_name, b"%d" % share.limit),
            (remaining_name, b"%d" % remaining),
            (reset_name, duration(share.full_in_s(now)).encode()),
        ]
    return headers


def duration(seconds: float) -> str:
    """A time as OpenAI's headers have it, rounded up to milliseconds: `12ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:  # noqa: PLR2004 - a second
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    text = f"{milliseconds / 1000:g}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
    return text
