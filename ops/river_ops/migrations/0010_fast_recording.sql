-- What recording usage asks of the database, made cheap enough for tens of thousands of events a second.

-- Not strict, which says the same here, since only then Postgres writes it into the statements that call it.
create or replace function round_half_even(x numeric) returns numeric language sql immutable parallel safe as $$
  select case when abs(x - trunc(x)) = 0.5 and mod(trunc(x), 2) = 0 then trunc(x) else round(x) end
$$;

-- The moments at which a price begins or ends, in their order; between two of them all prices stay the same.
create function price_moments() returns timestamptz[] language sql stable as $$
  select coalesce(array_agg(moment order by moment), '{}')
  from (
    select valid_from as moment from price union select valid_to from price where valid_to is not null
  ) as m
$$;

-- Rows that are updated by every batch: with room on their page, an update touches no index.
alter table usage_hour set (fillfactor = 50);
alter table usage_month set (fillfactor = 50);
alter table ledger_balance set (fillfactor = 50);

-- Events come nearly in their order of time, so that this index, which costs next to nothing to keep, finds an hour.
-- What tenants are shown comes from `usage_hour`.
drop index usage_event_tenant_id_occurred_at_idx;
create index usage_event_occurred_at on usage_event using brin (occurred_at)
  with (pages_per_range = 32, autosummarize = on);
