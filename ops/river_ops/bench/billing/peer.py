"""A program that does what the recorder does the plain way, as most would write it: the peer of the benchmark.

It reads the same stream and writes the same events, hourly sums and balances, in one transaction and acknowledged after
it, with prices from memory: `insert_per_event` with a transaction for each event, `executemany` with one for each
message, which holds as many as its sender gathered.
It keeps no double entry and no holds, and a batch that comes twice would count twice in the sums.
"""

# nats-py and asyncpg leave much untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import nats

from river_billing.amounts import amount_nano_usd, unit_prices
from river_billing.events import EVENTS_STREAM, RECORDER_CONSUMER, UsageEvent
from river_billing.streams import decode
from river_ops.bench.billing.messages import PeerDone, PeerSettings
from river_ops.bench.programs import answer_with, program_settings

MESSAGES_FETCHED = 25
SILENCE_S = 1.0

_INSERT = """
insert into usage_event (event_id, kind, occurred_at, tenant_id, key_id, run_id, end_user, base_model,
                         policy_version, context_length, quantity, amount_nano_usd)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) on conflict do nothing
"""
_SUM = """
insert into usage_hour as h (tenant_id, hour, base_model, context_length, kind, key_id,
                             quantity, amount_nano_usd, events)
values ($1, $2, $3, $4, $5, $6, $7, $8, 1)
on conflict (tenant_id, hour, base_model, context_length, kind, key_id) do update set
  quantity = h.quantity + excluded.quantity, amount_nano_usd = h.amount_nano_usd + excluded.amount_nano_usd,
  events = h.events + 1
"""
_CHARGE = """
insert into ledger_balance as b (tenant_id, account, balance_nano_usd) values ($1, 'receivable', $2)
on conflict (tenant_id, account) do update set balance_nano_usd = b.balance_nano_usd + excluded.balance_nano_usd
"""


def main() -> None:
    """Works until the stream is empty."""
    answer_with(asyncio.run(_main(program_settings(PeerSettings))))


async def _main(settings: PeerSettings) -> PeerDone:
    client = await nats.connect(settings.nats_url)
    connection: Any = await asyncpg.connect(settings.postgres_url)
    writer = _Writer(connection)
    subscription = await client.jetstream().pull_subscribe_bind(
        RECORDER_CONSUMER, stream=EVENTS_STREAM
    )
    written = 0
    try:
        while True:
            messages = await subscription.fetch(MESSAGES_FETCHED, timeout=SILENCE_S)
            for message in messages:
                events = [event for event in decode(message.data) if isinstance(event, UsageEvent)]
                if settings.way == "executemany":
                    await writer.write_together(events)
                else:
                    await writer.write_one_by_one(events)
                await message.ack()
                written += len(events)
    except TimeoutError:
        return PeerDone(events=written)
    finally:
        await connection.close()
        await client.close()


class _Writer:
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._prices: dict[tuple[str, int], Any] = {}

    async def write_one_by_one(self, events: Sequence[UsageEvent]) -> None:
        """A transaction for each event."""
        for event in events:
            lines = await self._lines(event)
            async with self._connection.transaction():
                for line in lines:
                    await self._connection.execute(_INSERT, *line)
                    await self._connection.execute(_SUM, *_hour(line))
                await self._connection.execute(
                    _CHARGE, event.tenant_id, -sum(line[-1] for line in lines)
                )

    async def write_together(self, events: Sequence[UsageEvent]) -> None:
        """A transaction for all."""
        lines = [line for event in events for line in await self._lines(event)]
        charges: Counter[str] = Counter()
        for line in lines:
            charges[line[3]] += line[-1]
        async with self._connection.transaction():
            await self._connection.executemany(_INSERT, lines)
            # In a fixed order, so that writers side by side do not deadlock.
            await self._connection.executemany(_SUM, sorted(map(_hour, lines)))
            await self._connection.executemany(
                _CHARGE, [(tenant, -amount) for tenant, amount in sorted(charges.items())]
            )

    async def _lines(self, event: UsageEvent) -> list[tuple[Any, ...]]:
        tier = (event.base_model, event.context_length)
        if tier not in self._prices:
            self._prices[tier] = await unit_prices(self._connection, *tier)
        return [
            (
                event.event_id,
                kind.value,
                datetime.fromtimestamp(event.occurred_at, UTC),
                event.tenant_id,
                event.key_id,
                event.run_id,
                event.user,
                event.base_model,
                event.policy_version,
                event.context_length,
                quantity,
                amount_nano_usd({kind: quantity}, self._prices[tier]),
            )
            for kind, quantity in event.quantities.items()
        ]


def _hour(line: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a line adds to which hour."""
    (
        _,
        kind,
        occurred_at,
        tenant_id,
        key_id,
        _,
        _,
        base_model,
        _,
        context_length,
        quantity,
        amount,
    ) = line
    hour = occurred_at.replace(minute=0, second=0, microsecond=0)
    return tenant_id, hour, base_model, context_length, kind, key_id, quantity, amount


if __name__ == "__main__":
    main()
