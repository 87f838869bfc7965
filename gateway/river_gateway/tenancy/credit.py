"""Whether a key can pay for what it asks: the worst case is held before any work is done, what it did cost is settled.

Most requests are decided here in memory, out of a lease on a slice of what the key may use; `river_billing.leases`
says how leases work and why they never admit more than there is. Keys that nothing bounds, neither a prepaid tenant's
credit nor a monthly budget, share one hold that holds nothing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from river_billing.amounts import (
    UnitPrices,
    amount_nano_usd,
    discounted_unit_prices,
    unit_prices,
)
from river_billing.budgets import next_month, report_warning, warn_of_refusal
from river_billing.events import UsageKind, operation_id, training_event_id
from river_billing.leases import Lease, Tightest, place_hold, renew
from river_billing.limits import LEASE_USABLE_S
from river_client.wire import NANO_USD_PER_USD
from river_gateway.database import POSTGRES_AWAY, POSTGRES_FAILED
from river_gateway.errors import OutOfCreditError, UnavailableError
from river_gateway.limits import (
    LEASE_IDLE_S,
    LEASE_RENEWAL_INTERVAL_S,
    LEASE_RETRY_S,
    PRICES_FRESH_S,
    PRICES_STALE_MAX_S,
    REFUSAL_FRESH_S,
    RENEWALS_CONCURRENT_MAX,
)

if TYPE_CHECKING:
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.database import Pool
    from river_gateway.tenancy.auth import Principal

logger = logging.getLogger("river.gateway")

Quantities = Mapping[UsageKind, int]


class Hold:
    """What one request may cost. Once settled, `lease_id` and `reserved_nano_usd` go with its usage event.

    As a context manager it gives back, at the end of the block, what has not been settled in it.
    """

    __slots__ = ("_held_nano_usd", "_lessee", "_prices", "lease_id", "reserved_nano_usd")

    def __init__(self, lessee: _Lessee | None, prices: UnitPrices, held_nano_usd: int) -> None:
        self._lessee = lessee
        self._prices = prices
        self._held_nano_usd = held_nano_usd
        self.lease_id: str | None = None
        self.reserved_nano_usd = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle({})

    def settle(self, quantities: Quantities) -> None:
        """Ends the hold: what was used stays taken until it is recorded, the rest is free. Only the first call counts.

        What is settled must be what the usage event says; without an event settle nothing: `{}`.
        """
        lessee, self._lessee = self._lessee, None
        if lessee is None:
            return
        used_nano_usd = amount_nano_usd(quantities, self._prices)
        lessee.lease.settle(self._held_nano_usd, used_nano_usd)
        if used_nano_usd:
            self.lease_id = str(lessee.lease.lease_id)
            self.reserved_nano_usd = used_nano_usd
        if lessee.lease.is_high():
            lessee.ask_renewal()


UNBOUNDED = Hold(None, {}, 0)
"""The hold of whoever may use as much as it likes."""


@dataclass(slots=True, eq=False)
class _Lessee:
    """A key's lease and who waits for more of it. Moments are of the monotonic clock, in seconds."""

    lease: Lease
    due: set[_Lessee]
    wake: asyncio.Event
    usable_until: float = 0.0
    used_at: float = field(default_factory=time.monotonic)
    refused_at: float = float("-inf")
    waiting_nano_usd: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def ask_renewal(self) -> None:
        """Has the lease renewed in the background."""
        if self not in self.due:
            self.due.add(self)
            self.wake.set()


@dataclass(frozen=True, slots=True)
class _Prices:
    """Prices of a model at a tier, and when they were read, by the monotonic clock."""

    units: UnitPrices
    discounted: Mapping[str, UnitPrices]  # of the tenants that pay less
    read_at: float


class Credit:
    """The leases of this gateway, and the prices by which it reckons."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lessees: dict[str, _Lessee] = {}
        self._prices: dict[tuple[str, int], _Prices] = {}
        self._due: set[_Lessee] = set()
        self._wake = asyncio.Event()

    # ---- Requests ----------------------------------------------------------------------------------------------------

    def try_hold(
        self, principal: Principal, base_model: str, context_length: int, quantities: Quantities
    ) -> Hold | None:
        """A hold where memory can tell, which is nearly always; else None, and `hold` can.

        `quantities` are the most that the request may use.
        """
        if not principal.bounded:
            return UNBOUNDED
        lessee = self._lessees.get(principal.key_id)
        prices = self._prices.get((base_model, context_length))
        if lessee is None or prices is None:
            return None
        now = time.monotonic()
        if now > lessee.usable_until or now - prices.read_at > PRICES_STALE_MAX_S:
            return None
        lessee.used_at = now
        units = prices.discounted.get(principal.tenant_id, prices.units)
        return self._take(lessee, units, amount_nano_usd(quantities, units))

    async def hold(
        self, principal: Principal, base_model: str, context_length: int, quantities: Quantities
    ) -> Hold:
        """The same, asking Postgres if need be.

        Raises:
            OutOfCreditError: a bound has too little room left.
            UnavailableError: Postgres is away.
        """
        if not principal.bounded:
            return UNBOUNDED
        try:
            prices = await self._prices_of(principal.tenant_id, base_model, context_length)
            lessee = self._lessee_of(principal)
            amount = amount_nano_usd(quantities, prices)
            lessee.waiting_nano_usd += amount
            try:
                return await self._hold_next(lessee, prices, amount)
            finally:
                lessee.waiting_nano_usd -= amount
        except POSTGRES_AWAY as error:
            raise UnavailableError("credit cannot be checked at the moment; try again") from error

    async def hold_operation(
        self, principal: Principal, run: RunRow, seq: int, training_tokens: int
    ) -> None:
        """Holds what an operation costs, in Postgres, since it outlives gateways; its recorded usage ends the hold.

        Raises:
            OutOfCreditError: a bound has too little room left.
            UnavailableError: Postgres is away.
        """
        if not principal.bounded or not training_tokens:
            return
        try:
            prices = await self._prices_of(principal.tenant_id, run.base_model, run.context_length)
            amount = amount_nano_usd({UsageKind.TRAINING: training_tokens}, prices)
            if not amount:
                return
            async with self._pool.acquire() as connection:
                refused = await place_hold(
                    connection,
                    event_id=training_event_id(operation_id(run.run_id, seq)),
                    tenant_id=principal.tenant_id,
                    key_id=principal.key_id,
                    amount_nano_usd=amount,
                    run_id=run.run_id,
                    seq=seq,
                )
        except POSTGRES_AWAY as error:
            raise UnavailableError("credit cannot be checked at the moment; try again") from error
        if refused is not None:
            raise await self._refusal(principal.tenant_id, principal.key_id, refused, amount)

    async def _hold_next(self, lessee: _Lessee, prices: UnitPrices, amount: int) -> Hold:
        """Waits for its turn. Whoever is first asks for what all need that wait with it."""
        async with lessee.lock:
            lease = lessee.lease
            if not self._can_take(lessee, amount) and not self._refused_just_now(lessee, amount):
                await self._renew(lessee)
                if not self._can_take(lessee, amount):
                    lessee.refused_at = time.monotonic()
            hold = self._take(lessee, prices, amount)
            if hold is not None:
                return hold
            if (
                lease.is_high()
            ):  # It got all there was, which is of no use here, and may be to others.
                lessee.ask_renewal()
            tightest = lease.tightest
            assert tightest is not None
            free = max(lease.free_nano_usd, 0)
        left = Tightest(tightest.bound, tightest.limit_nano_usd, tightest.room_nano_usd + free)
        raise await self._refusal(lease.tenant_id, lease.key_id, left, amount)

    def _can_take(self, lessee: _Lessee, amount: int) -> bool:
        """Whether memory can tell, and there is enough."""
        lease = lessee.lease
        if time.monotonic() > lessee.usable_until:
            return False
        return lease.tightest is None or amount <= lease.free_nano_usd

    def _refused_just_now(self, lessee: _Lessee, amount: int) -> bool:
        """Whether Postgres said so a moment ago: a client that goes on asking must not keep it busy."""
        now, tightest = time.monotonic(), lessee.lease.tightest
        return (
            tightest is not None
            and now <= lessee.usable_until
            and now - lessee.refused_at < REFUSAL_FRESH_S
            and amount > lessee.lease.free_nano_usd + max(tightest.room_nano_usd, 0)
        )

    def _take(self, lessee: _Lessee, prices: UnitPrices, amount: int) -> Hold | None:
        lease = lessee.lease
        if lease.tightest is None:
            return UNBOUNDED
        if not lease.hold(amount):
            return None
        if lease.is_low():
            lessee.ask_renewal()
        return Hold(lessee, prices, amount)

    async def _refusal(
        self, tenant_id: str, key_id: str, tightest: Tightest, amount: int
    ) -> OutOfCreditError:
        """The error to raise. That a budget has run out is written down, once a month."""
        of_key = tightest.bound == "key_budget"
        if tightest.bound != "credit":
            async with self._pool.acquire() as connection:
                warning = await warn_of_refusal(connection, tenant_id, key_id if of_key else None)
            if warning is not None:
                report_warning(warning)
        return OutOfCreditError(refusal_message(tightest, amount))

    # ---- Background --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Renews leases before they run low and before they expire, and reads prices anew; until cancelled."""
        renewed_all_at = time.monotonic()
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LEASE_RENEWAL_INTERVAL_S)
            self._wake.clear()
            due = set(self._due)
            self._due.clear()
            try:
                if time.monotonic() - renewed_all_at >= LEASE_RENEWAL_INTERVAL_S:
                    renewed_all_at = time.monotonic()
                    due.update(self._lessees.values())
                    await self._refresh_prices()
                await self._renew_all(due)
            except POSTGRES_FAILED as error:
                logger.warning("credit cannot be renewed: %r", error)
                await asyncio.sleep(LEASE_RETRY_S)

    async def close(self) -> None:
        """Gives back what the leases have left. Without Postgres they expire by themselves."""
        try:
            for lessee in list(self._lessees.values()):
                async with lessee.lock:
                    await self._close(lessee)
        except POSTGRES_AWAY as error:
            logger.warning("leases are left to expire: %r", error)

    async def _renew_all(self, due: set[_Lessee]) -> None:
        enough = asyncio.Semaphore(RENEWALS_CONCURRENT_MAX)

        async def renew_one(lessee: _Lessee) -> None:
            async with enough, lessee.lock:
                idle = time.monotonic() - lessee.used_at > LEASE_IDLE_S
                if idle and not lessee.lease.held_nano_usd:
                    await self._close(lessee)
                else:
                    await self._renew(lessee)

        outcomes = await asyncio.gather(*map(renew_one, due), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _renew(self, lessee: _Lessee) -> None:
        """One renewal; the caller has the lock."""
        asked_at = time.monotonic()
        async with self._pool.acquire() as connection:
            await renew(connection, lessee.lease, needed_nano_usd=lessee.waiting_nano_usd)
        lessee.usable_until = asked_at + LEASE_USABLE_S

    async def _close(self, lessee: _Lessee) -> None:
        """Gives back what is free and forgets the lease, which expires; the caller has the lock."""
        lessee.usable_until = 0.0
        if self._lessees.get(lessee.lease.key_id) is lessee:
            del self._lessees[lessee.lease.key_id]
        async with self._pool.acquire() as connection:
            await renew(connection, lessee.lease, close=True)

    def _lessee_of(self, principal: Principal) -> _Lessee:
        lessee = self._lessees.get(principal.key_id)
        if lessee is None:
            lease = Lease(tenant_id=principal.tenant_id, key_id=principal.key_id)
            lessee = _Lessee(lease, self._due, self._wake)
            self._lessees[principal.key_id] = lessee
        lessee.used_at = time.monotonic()
        return lessee

    # ---- Prices ------------------------------------------------------------------------------------------------------

    async def _prices_of(self, tenant_id: str, base_model: str, context_length: int) -> UnitPrices:
        known = self._prices.get((base_model, context_length))
        if known is None or time.monotonic() - known.read_at > PRICES_STALE_MAX_S:
            known = await self._read_prices(base_model, context_length)
        return known.discounted.get(tenant_id, known.units)

    async def _refresh_prices(self) -> None:
        now = time.monotonic()
        for (base_model, context_length), known in list(self._prices.items()):
            if now - known.read_at >= PRICES_FRESH_S:
                await self._read_prices(base_model, context_length)

    async def _read_prices(self, base_model: str, context_length: int) -> _Prices:
        async with self._pool.acquire() as connection:
            units = await unit_prices(connection, base_model, context_length)
            discounted = await discounted_unit_prices(connection, base_model, context_length)
        read = _Prices(units, discounted, time.monotonic())
        self._prices[base_model, context_length] = read
        return read


def refusal_message(tightest: Tightest, amount_nano_usd_: int) -> str:
    """What a client is told that asked for more than there is."""
    left, worst = dollars(max(tightest.room_nano_usd, 0)), dollars(amount_nano_usd_)
    if tightest.bound == "credit":
        return f"out of credit: this may cost up to {worst}, and {left} are left"
    whose = "this API key's" if tightest.bound == "key_budget" else "the tenant's"
    resets_at = next_month(dt.datetime.now(dt.UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (
        f"{whose} monthly budget of {dollars(tightest.limit_nano_usd)} is used up: this may cost up to {worst}, "
        f"and {left} are left until it resets at {resets_at}"
    )


def dollars(amount: int) -> str:
    """Nano-dollars as dollars, exactly and with at least two places."""
    whole, nano = divmod(amount, NANO_USD_PER_USD)
    places = f"{nano:09d}".rstrip("0").ljust(2, "0")
    return f"${whole}.{places}"
