"""What engines and trainers say they have produced: kept by process and hour, for the audit."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from river_billing.database import Connection
from river_billing.events import TokensCounted

# Counters only grow: what is repeated, or comes late, changes nothing.
_NOTE = """
insert into token_count as c (producer_id, started_at, kind, hour, base_model, tokens, counted_at, final)
select producer_id, started_at, kind, date_trunc('hour', counted_at, 'UTC'), base_model, max(tokens), max(counted_at),
       bool_or(final)
from unnest($1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::bigint[], $6::timestamptz[], $7::boolean[])
  as t (producer_id, started_at, kind, base_model, tokens, counted_at, final)
group by 1, 2, 3, 4, 5 order by 1, 2, 3, 4
on conflict (producer_id, started_at, kind, hour) do update set
  tokens     = greatest(c.tokens, excluded.tokens),
  counted_at = greatest(c.counted_at, excluded.counted_at),
  final      = c.final or excluded.final
"""


async def note_counts(connection: Connection, events: Sequence[TokensCounted]) -> None:
    """Writes down the counts; doing it twice, and in any order, changes nothing."""
    rows = [
        (
            event.producer_id,
            _moment(event.started_at),
            kind.value,
            event.base_model,
            tokens,
            _moment(event.counted_at),
            event.final,
        )
        for event in events
        for kind, tokens in event.tokens.items()
    ]
    if rows:
        await connection.execute(_NOTE, *(list(column) for column in zip(*rows, strict=True)))


def _moment(unix_time_s: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(unix_time_s, dt.UTC)
