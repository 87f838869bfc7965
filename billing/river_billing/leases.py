"""Setting money aside before work begins, so that nobody uses more than there is.

A bound is a prepaid tenant's credit, a tenant's monthly budget, or a key's. What a request may cost at most is held
before it begins; what it did cost is settled at its end. A training operation, which outlives gateways, is held by a
row in Postgres. Requests are held in the memory of a gateway, which has leased a slice of what the key may use:

    Postgres     room    = balance, or budget less this month's usage  -  sum of (granted - posted) of leases  -  holds
    gateway      free    = granted - settled - held

Why no more is admitted than there is, whoever dies when:

* **Granting.** A renewal adds to `granted` no more than the room, under the lock of the tenant's row, so that room
  stays at or above zero. A gateway admits a request only if it is free, so that settled + held <= granted.
* **Between settling and recording.** A settled request's event names its lease and what was settled. The recorder
  lowers the balance by what the event costs and raises `posted` by what was settled in one transaction, once for each
  event, and does both or neither. Until then the amount is part of `granted - posted`. So the room that others see
  does not move when an event is recorded, and at no moment is a request's money counted neither as held nor as
  charged.
* **Giving back.** A gateway first takes what it gives back out of its memory, then tells Postgres. If the answer to a
  renewal is lost, what was added is unknown to the gateway and unused; the next renewal tells what the gateway knows
  and so takes it back. Renewals are numbered; one that arrives late changes nothing.
* **Dying.** A lease that is not renewed expires. A gateway admits requests only for `LEASE_USABLE_S` after it last
  asked for a renewal with success, so what it admitted has time to end before `LEASE_LIFE_S` is over. An expired
  lease, and an expired hold, counts on until the recorder says that everything which reached the event stream before
  that moment is recorded (`recorder_progress`): what a dead gateway had published is charged before its lease is free
  for others.

What remains: a price that changes between hold and recording makes an event cost more than was settled for it, and
events that a gateway holds back in memory, because NATS is away for longer than a lease lives while Postgres is too,
are charged after their lease is free. Both lower the balance below zero by that much; they never bill wrongly.

The slice is a small share of the room (`LEASE_SHARE`, `LEASE_SLICE_MAX_NANO_USD`) and shrinks with it. Where the
share is below `LEASE_SLICE_MIN_NANO_USD` there is no slice: the gateway asks for exactly what the waiting requests
need, all of them in one renewal, and gives back what they leave.
"""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass, field
from typing import Literal

from river_billing import limits
from river_billing.database import Connection

Bound = Literal["credit", "tenant_budget", "key_budget"]

_RENEW = "select * from renew_lease($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"
_PLACE_HOLD = "select * from place_hold($1, $2, $3, $4, $5, $6, $7)"
# One that somebody else has locked is being deleted with its usage.
_END_HOLDS = """
update credit_hold set expires_at = now()
where event_id in (select event_id from credit_hold where event_id = any ($1) for update skip locked)
"""
_NOTE_PROGRESS = """
update recorder_progress set recorded_until = greatest(recorded_until, least($1, now()) - $2::interval)
"""
_PURGE = """
with leases as (delete from credit_lease where expires_at < $1)
delete from credit_hold where expires_at < $1
"""


@dataclass(frozen=True, slots=True)
class Tightest:
    """The bound with the least room, its limit (a budget, or the credit) and that room in nano-dollars."""

    bound: Bound
    limit_nano_usd: int
    room_nano_usd: int


@dataclass(slots=True, eq=False)
class Lease:
    """A gateway's slice of what one key may use, as the gateway knows it: all amounts in nano-dollars.

    `granted` and `settled` only count up, but for what is given back; `held` is of requests in progress. `slice` is the
    fair share at the last renewal, and `tightest` what bounded it: None means that nothing does.
    """

    tenant_id: str
    key_id: str
    lease_id: uuid.UUID = field(default_factory=uuid.uuid4)
    renewal: int = 0
    granted_nano_usd: int = 0
    settled_nano_usd: int = 0
    held_nano_usd: int = 0
    slice_nano_usd: int = 0
    tightest: Tightest | None = None

    @property
    def free_nano_usd(self) -> int:
        """What may still be held."""
        return self.granted_nano_usd - self.settled_nano_usd - self.held_nano_usd

    def hold(self, amount_nano_usd: int) -> bool:
        """Holds an amount if it is free."""
        assert amount_nano_usd >= 0
        if amount_nano_usd > self.granted_nano_usd - self.settled_nano_usd - self.held_nano_usd:
            return False
        self.held_nano_usd += amount_nano_usd
        return True

    def settle(self, held_nano_usd: int, used_nano_usd: int) -> None:
        """Ends a hold; what was used stays taken until it is recorded."""
        assert 0 <= held_nano_usd <= self.held_nano_usd
        assert used_nano_usd >= 0
        self.held_nano_usd -= held_nano_usd
        self.settled_nano_usd += used_nano_usd

    def is_low(self) -> bool:
        """Whether it is time for a renewal, before anybody has to wait for one."""
        return 2 * self.free_nano_usd < self.slice_nano_usd

    def is_high(self, needed_nano_usd: int = 0) -> bool:
        """Whether there is much more than the fair share, or than what somebody waits for."""
        return self.free_nano_usd > 2 * max(self.slice_nano_usd, needed_nano_usd)


async def renew(
    connection: Connection, lease: Lease, *, needed_nano_usd: int = 0, close: bool = False
) -> None:
    """Gives back what is too much, and gets what is `needed` or the fair share, as far as there is room.

    With `close` everything free is given back. Requests go on being held and settled meanwhile; only one renewal of a
    lease may be on its way at a time.

    Raises:
        OUTAGES: nobody knows whether it was renewed. The lease stays right; renew it again.
    """
    if close or lease.is_high(needed_nano_usd):
        keep = 0 if close else max(lease.slice_nano_usd, needed_nano_usd)
        lease.granted_nano_usd -= max(lease.free_nano_usd - keep, 0)
    unspent = max(lease.free_nano_usd, 0)
    lease.renewal += 1
    row = await connection.fetchrow(
        _RENEW,
        lease.lease_id,
        lease.renewal,
        lease.tenant_id,
        lease.key_id,
        lease.granted_nano_usd,
        unspent,
        max(needed_nano_usd - lease.free_nano_usd, 0),
        dt.timedelta(seconds=limits.LEASE_LIFE_S),
        0 if close else limits.LEASE_SHARE,
        limits.LEASE_SLICE_MAX_NANO_USD,
        limits.LEASE_SLICE_MIN_NANO_USD,
    )
    assert row is not None, "a lease has one owner, who renews it once at a time"
    lease.granted_nano_usd += row["added_nano_usd"]
    lease.slice_nano_usd = row["slice_nano_usd"]
    lease.tightest = _tightest(row["bound"], row["limit_nano_usd"], row["room_nano_usd"])


async def place_hold(
    connection: Connection,
    *,
    event_id: str,
    tenant_id: str,
    key_id: str,
    amount_nano_usd: int,
    run_id: str,
    seq: int,
) -> Tightest | None:
    """Holds what operation `seq` of a run may cost, until the event of that id is recorded; None when that is done.

    Doing it twice holds once. What there is no room for is told by the bound that has too little.
    """
    row = await connection.fetchrow(
        _PLACE_HOLD,
        uuid.UUID(event_id),
        tenant_id,
        key_id,
        amount_nano_usd,
        dt.timedelta(seconds=limits.OPERATION_HOLD_LIFE_S),
        run_id,
        seq,
    )
    assert row is not None
    if row["placed"]:
        return None
    return _tightest(row["bound"], row["limit_nano_usd"], row["room_nano_usd"])


async def end_holds(connection: Connection, event_ids: list[str]) -> None:
    """Lets holds of operations that are done expire: they count until their usage, published already, is recorded."""
    if event_ids:
        await connection.execute(_END_HOLDS, [uuid.UUID(event_id) for event_id in event_ids])


async def note_progress(connection: Connection, recorded_until: dt.datetime) -> None:
    """Says that all that reached the event stream before that moment is recorded; clears what is long over."""
    tolerance = dt.timedelta(seconds=limits.CLOCK_DIFFERENCE_MAX_S)
    await connection.execute(_NOTE_PROGRESS, recorded_until, tolerance)
    kept = dt.timedelta(seconds=limits.LEASES_KEPT_S)
    await connection.execute(_PURGE, recorded_until - kept)


def _tightest(bound: Bound | None, limit: int | None, room: int | None) -> Tightest | None:
    if bound is None:
        return None
    assert limit is not None
    assert room is not None
    return Tightest(bound, limit, room)
