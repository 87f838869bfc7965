-- Months of usage that are set aside. A detached one is a table of its own, out of the way of everything that reads
-- `usage_event`; its hours stay in `usage_hour`. It is attached again when an event of that month comes late after all,
-- so that no event is ever counted twice. One that was dropped is gone for good, and takes no events any more.

create table usage_dropped (
  month           date primary key,
  lines           bigint not null,
  amount_nano_usd bigint not null,
  dropped_at      timestamptz not null default now()
);
create trigger usage_dropped_final before update or delete on usage_dropped
  for each row execute function refuse_change();

create function usage_partition(month date) returns text language sql immutable as $$
  select 'usage_event_' || to_char(month, 'YYYY_MM')
$$;

-- All that are tables, attached or not; `leaving` is one whose detaching was cut off.
create view usage_partitions as
  select to_date(right(c.relname, 7), 'YYYY_MM') as month, c.relname::text as name,
         coalesce(not i.inhdetachpending, false) as attached, coalesce(i.inhdetachpending, false) as leaving
  from pg_class c
  join pg_class parent on parent.oid = 'usage_event'::regclass and parent.relnamespace = c.relnamespace
  left join pg_inherits i on i.inhrelid = c.oid
  where c.relkind = 'r' and c.relname ~ '^usage_event_\d{4}_\d{2}$';

-- A partition has triggers of its own, since those of the whole table leave it when it is detached.
do $$
declare
  partition text;
begin
  for partition in select name from usage_partitions loop
    execute format(
      'create trigger final before update or delete on %I for each row execute function refuse_change()', partition
    );
  end loop;
end $$;

-- Sees to it that events of a month have a place. Two recorders take turns, and the second then finds it done.
create or replace function create_usage_partition(month date) returns void language plpgsql as $$
declare
  partition text := usage_partition(month);
  bounds    text := format(
    'for values from (%L) to (%L)',
    month::timestamp at time zone 'UTC',
    (month + interval '1 month') at time zone 'UTC'
  );
begin
  assert extract(day from month) = 1, 'a partition starts on the first';
  if exists (select from pg_inherits where inhrelid = to_regclass(partition) and not inhdetachpending) then
    return;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('usage_event', 0));
  if exists (select from usage_partitions p where p.name = partition and p.attached) then
    return;
  end if;
  if exists (select from usage_partitions p where p.name = partition and p.leaving) then
    raise exception '% is being detached; try again', partition using errcode = 'lock_not_available';
  end if;
  if exists (select from usage_dropped d where d.month = create_usage_partition.month) then
    raise exception 'the usage of % was dropped, nothing can be added to it', to_char(month, 'YYYY-MM')
      using errcode = 'restrict_violation';
  end if;
  -- A table that is attached waits for no reader and no writer, unlike one that is created in its place.
  if to_regclass(partition) is null then
    execute format(
      'create table %I (like usage_event including defaults including constraints including indexes)', partition
    );
    execute format('create trigger untruncated before truncate on %I execute function refuse_change()', partition);
    execute format(
      'create trigger final before update or delete on %I for each row execute function refuse_change()', partition
    );
  end if;
  execute format('alter table usage_event attach partition %I %s', partition, bounds);
exception when duplicate_table then
  -- The lock lets recorders take turns, and yet the second may not see at first what the other has made.
  return;
end $$;

-- Removes a detached month for good, if its hours say the same as its events.
create function drop_usage_partition(month date) returns void language plpgsql as $$
declare
  partition text := usage_partition(month);
  found     record;
  hours     record;
begin
  perform pg_advisory_xact_lock(hashtextextended('usage_event', 0));
  if not exists (select from usage_partitions p where p.name = partition and not p.attached and not p.leaving) then
    raise exception '% is no detached partition', partition using errcode = 'restrict_violation';
  end if;
  execute format('select count(*) as lines, coalesce(sum(amount_nano_usd), 0) as amount from %I', partition)
    into found;
  select coalesce(sum(events), 0) as lines, coalesce(sum(amount_nano_usd), 0) as amount into hours
  from usage_hour
  where hour >= month::timestamp at time zone 'UTC' and hour < (month + interval '1 month') at time zone 'UTC';
  if (found.lines, found.amount) is distinct from (hours.lines, hours.amount) then
    raise exception '% has % lines of % nano-dollars, its hours say % of %',
      partition, found.lines, found.amount, hours.lines, hours.amount using errcode = 'restrict_violation';
  end if;
  insert into usage_dropped (month, lines, amount_nano_usd) values (month, found.lines, found.amount);
  execute format('drop table %I', partition);
end $$;

-- What tenants were charged for usage: by its events, and for months that are set aside, by their hours.
create view usage_charged as
  select tenant_id, sum(amount_nano_usd) as amount_nano_usd
  from (
    select tenant_id, amount_nano_usd from usage_event
    union all
    select tenant_id, amount_nano_usd from usage_hour
    where date_trunc('month', hour at time zone 'UTC')::date
      not in (select month from usage_partitions where attached)
  ) as u
  group by 1;

create or replace function ledger_differences()
returns table (tenant_id text, account text, stored_nano_usd numeric, recomputed_nano_usd numeric)
language sql stable as $$
  select coalesce(b.tenant_id, e.tenant_id), coalesce(b.account, e.account),
         coalesce(b.balance_nano_usd, 0), coalesce(e.total, 0)
  from ledger_balance b
  full join (
    select tenant_id, account, sum(amount_nano_usd) as total from ledger_entry group by 1, 2
  ) e on (e.tenant_id, e.account) = (b.tenant_id, b.account)
  where coalesce(b.balance_nano_usd, 0) <> coalesce(e.total, 0)
  union all
  select tenant_id, 'transaction ' || transaction_id, sum(amount_nano_usd), 0
  from ledger_entry group by tenant_id, transaction_id having sum(amount_nano_usd) <> 0
  union all
  select coalesce(e.tenant_id, u.tenant_id), 'revenue of usage', coalesce(e.total, 0), coalesce(u.amount_nano_usd, 0)
  from (
    select t.tenant_id, sum(e.amount_nano_usd) as total
    from ledger_transaction t join ledger_entry e using (transaction_id)
    where t.kind = 'usage' and e.account = 'revenue' group by 1
  ) e
  full join usage_charged u on u.tenant_id = e.tenant_id
  where coalesce(e.total, 0) <> coalesce(u.amount_nano_usd, 0)
$$;
