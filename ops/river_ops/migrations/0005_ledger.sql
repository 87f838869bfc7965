-- Where money is: a double-entry ledger that only grows, what is set aside for work in progress, and monthly budgets.

-- What a prepaid tenant may use is bounded by its credit; what a postpaid one used is written down as owed.
alter table tenant add column billing text not null default 'postpaid' check (billing in ('postpaid', 'prepaid'));
alter table tenant add column monthly_budget_nano_usd bigint check (monthly_budget_nano_usd >= 0);

-- ---- Ledger ---------------------------------------------------------------------------------------------------------

-- Tenants are not references: the books outlive them. `reference` is the caller's own name for a transaction, so that
-- asking for it again does nothing.
create table ledger_transaction (
  transaction_id bigint generated always as identity primary key,
  tenant_id      text not null,
  kind           text not null check (kind in ('usage', 'top_up', 'grant', 'adjustment')),
  reference      text,
  note           text,
  actor          text,                                  -- the key that asked for it; none for the recorder
  created_at     timestamptz not null default now(),
  unique (tenant_id, reference),
  unique (transaction_id, tenant_id)
);
create index on ledger_transaction (tenant_id, transaction_id);

-- Money flows from the accounts with negative amounts into those with positive ones. Each tenant has its own:
-- `credit` is what it may still use, `receivable` is below zero by what it owes, `revenue` is what it was charged,
-- `payments`, `promotions` and `adjustments` are where credit comes from.
create table ledger_entry (
  transaction_id  bigint not null,
  account         text not null
    check (account in ('credit', 'receivable', 'revenue', 'payments', 'promotions', 'adjustments')),
  tenant_id       text not null,
  amount_nano_usd bigint not null check (amount_nano_usd <> 0),
  primary key (transaction_id, account),
  foreign key (transaction_id, tenant_id) references ledger_transaction (transaction_id, tenant_id)
);

create trigger ledger_transaction_final before update or delete on ledger_transaction
  for each row execute function refuse_change();
create trigger ledger_transaction_untruncated before truncate on ledger_transaction execute function refuse_change();
create trigger ledger_entry_final before update or delete on ledger_entry
  for each row execute function refuse_change();
create trigger ledger_entry_untruncated before truncate on ledger_entry execute function refuse_change();

-- Looked at when a database transaction commits: what it began must be whole, and nothing may be added to older ones.
create function check_ledger_transaction() returns trigger language plpgsql as $$
declare
  begun_at timestamptz;
  entries  bigint;
  total    numeric;
begin
  select created_at into begun_at from ledger_transaction where transaction_id = new.transaction_id;
  select count(*), coalesce(sum(amount_nano_usd), 0) into entries, total
  from ledger_entry where transaction_id = new.transaction_id;
  if begun_at <> now() then
    raise exception 'ledger transaction % is complete since %', new.transaction_id, begun_at
      using errcode = 'restrict_violation';
  end if;
  if entries < 2 or total <> 0 then
    raise exception 'ledger transaction % has % entries with the sum %, not 0', new.transaction_id, entries, total
      using errcode = 'check_violation';
  end if;
  return null;
end $$;

create constraint trigger ledger_transaction_balanced after insert on ledger_transaction
  deferrable initially deferred for each row execute function check_ledger_transaction();
create constraint trigger ledger_entry_balanced after insert on ledger_entry
  deferrable initially deferred for each row execute function check_ledger_transaction();

-- The sums of the entries, kept with them. The row of a tenant's credit is also the lock on everything that decides
-- what the tenant may use: credit, leases, holds and budgets.
create table ledger_balance (
  tenant_id        text not null,
  account          text not null,
  balance_nano_usd bigint not null default 0,
  primary key (tenant_id, account)
);

create function add_to_balances() returns trigger language plpgsql as $$
begin
  insert into ledger_balance as b (tenant_id, account, balance_nano_usd)
  select tenant_id, account, sum(amount_nano_usd) from inserted group by 1, 2 order by 1, 2
  on conflict (tenant_id, account) do update set balance_nano_usd = b.balance_nano_usd + excluded.balance_nano_usd;
  return null;
end $$;
create trigger ledger_entry_summed after insert on ledger_entry referencing new table as inserted
  for each statement execute function add_to_balances();

-- Several tenants are always locked in the same order, so that nobody waits in a circle.
create function lock_tenants(tenants text[]) returns void language plpgsql as $$
begin
  insert into ledger_balance (tenant_id, account)
  select distinct tenant, 'credit' from unnest(tenants) as t (tenant) order by tenant
  on conflict do nothing;
  perform from ledger_balance
  where account = 'credit' and tenant_id = any (tenants) order by tenant_id for no key update;
end $$;

-- Every difference between the books and what is derived from them, and between the books and the usage they charge.
create function ledger_differences()
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
  select coalesce(e.tenant_id, u.tenant_id), 'revenue of usage', coalesce(e.total, 0), coalesce(u.total, 0)
  from (
    select t.tenant_id, sum(e.amount_nano_usd) as total
    from ledger_transaction t join ledger_entry e using (transaction_id)
    where t.kind = 'usage' and e.account = 'revenue' group by 1
  ) e
  full join (select tenant_id, sum(amount_nano_usd) as total from usage_event group by 1) u
    on u.tenant_id = e.tenant_id
  where coalesce(e.total, 0) <> coalesce(u.total, 0)
$$;

create function rebuild_ledger_balances() returns void language plpgsql as $$
begin
  lock table ledger_balance in share row exclusive mode;
  insert into ledger_balance as b (tenant_id, account, balance_nano_usd)
  select d.tenant_id, d.account, coalesce(sum(e.amount_nano_usd), 0)
  from ledger_differences() d left join ledger_entry e on (e.tenant_id, e.account) = (d.tenant_id, d.account)
  where d.account in ('credit', 'receivable', 'revenue', 'payments', 'promotions', 'adjustments')
  group by 1, 2
  on conflict (tenant_id, account) do update set balance_nano_usd = excluded.balance_nano_usd;
end $$;

-- What was used before there was a ledger is owed.
with charged as (
  select tenant_id, sum(amount_nano_usd)::bigint as amount from usage_hour group by 1 having sum(amount_nano_usd) > 0
), begun as (
  insert into ledger_transaction (tenant_id, kind, note)
  select tenant_id, 'usage', 'usage before the ledger began' from charged order by 1
  returning transaction_id, tenant_id
)
insert into ledger_entry (transaction_id, account, tenant_id, amount_nano_usd)
select transaction_id, account, tenant_id, case account when 'revenue' then amount else -amount end
from begun join charged using (tenant_id) cross join (values ('receivable'), ('revenue')) as a (account);

-- ---- Budgets --------------------------------------------------------------------------------------------------------

-- What each key used in a calendar month (UTC).
create table usage_month (
  tenant_id       text not null,
  month           date not null,
  key_id          text not null,
  amount_nano_usd bigint not null,
  primary key (tenant_id, month, key_id)
);
insert into usage_month (tenant_id, month, key_id, amount_nano_usd)
select tenant_id, date_trunc('month', hour at time zone 'UTC')::date, key_id, sum(amount_nano_usd)
from usage_hour group by 1, 2, 3;

create function current_month() returns date language sql stable as $$
  select date_trunc('month', now() at time zone 'UTC')::date
$$;

-- Once a month for each budget and threshold; `key_id` is empty where the budget is the tenant's.
create table budget_warning (
  tenant_id       text not null,
  key_id          text not null default '',
  month           date not null,
  percent         smallint not null check (percent in (80, 100)),
  budget_nano_usd bigint not null,
  spent_nano_usd  bigint not null,
  warned_at       timestamptz not null default now(),
  primary key (tenant_id, key_id, month, percent)
);

-- All budgets, with what this month has cost so far.
create view budget as
  select t.tenant_id, '' as key_id, t.monthly_budget_nano_usd as budget_nano_usd,
         coalesce((select sum(u.amount_nano_usd) from usage_month u
                   where u.tenant_id = t.tenant_id and u.month = current_month()), 0)::bigint as spent_nano_usd
  from tenant t where t.monthly_budget_nano_usd is not null
  union all
  select k.tenant_id, k.key_id, k.monthly_budget_nano_usd,
         coalesce((select u.amount_nano_usd from usage_month u
                   where u.tenant_id = k.tenant_id and u.month = current_month() and u.key_id = k.key_id), 0)
  from api_key k where k.monthly_budget_nano_usd is not null;

-- ---- Work in progress -----------------------------------------------------------------------------------------------

-- Up to when everything that reached the event stream is in these tables, by the recorder's own account.
create table recorder_progress (
  only_row       boolean primary key default true check (only_row),
  recorded_until timestamptz not null
);
insert into recorder_progress (recorded_until) values (now());

-- A gateway's share of what a key may use. `granted` is all it was ever given, `posted` the part of it that recorded
-- usage has used up; the difference is set aside.
create table credit_lease (
  lease_id         uuid primary key,
  tenant_id        text not null,
  key_id           text not null,
  renewal          bigint not null,                     -- renewals are numbered, so that a late one changes nothing
  granted_nano_usd bigint not null check (granted_nano_usd >= 0),
  posted_nano_usd  bigint not null default 0 check (posted_nano_usd >= 0),
  expires_at       timestamptz not null
);
create index on credit_lease (tenant_id);

-- What one operation may cost at most, until its usage, which has the same identity, is recorded.
create table credit_hold (
  event_id        uuid primary key,
  tenant_id       text not null,
  key_id          text not null,
  amount_nano_usd bigint not null check (amount_nano_usd > 0),
  created_at      timestamptz not null default now(),
  expires_at      timestamptz not null
);
create index on credit_hold (tenant_id);

-- What is set aside. It counts beyond its own end until the recorder has seen everything from before that.
create view reservation as
  select r.tenant_id, r.key_id, r.amount_nano_usd
  from (
    select tenant_id, key_id, greatest(granted_nano_usd - posted_nano_usd, 0) as amount_nano_usd, expires_at
    from credit_lease
    union all
    select tenant_id, key_id, amount_nano_usd, expires_at from credit_hold
  ) r
  where r.expires_at > (select recorded_until from recorder_progress);

-- What bounds a key's use, and how much each bound leaves; no row where nothing does.
create function spending_bounds(tenant text, key text)
returns table (bound text, limit_nano_usd bigint, room_nano_usd bigint) language sql stable as $$
  with reserved as (
    select coalesce(sum(amount_nano_usd), 0)::bigint as by_tenant,
           coalesce(sum(amount_nano_usd) filter (where key_id = key), 0)::bigint as by_key
    from reservation where tenant_id = tenant
  )
  select 'credit', coalesce(b.balance_nano_usd, 0), coalesce(b.balance_nano_usd, 0) - reserved.by_tenant
  from reserved, tenant t left join ledger_balance b on b.tenant_id = t.tenant_id and b.account = 'credit'
  where t.tenant_id = tenant and t.billing = 'prepaid'
  union all
  select case key_id when '' then 'tenant_budget' else 'key_budget' end, budget_nano_usd,
         budget_nano_usd - spent_nano_usd - case key_id when '' then reserved.by_tenant else reserved.by_key end
  from reserved, budget where tenant_id = tenant and key_id in ('', key)
$$;

-- Writes down what a gateway knows of its lease, then adds what it needs or what is a fair share, if there is room.
-- `unspent` is what the gateway has left of the lease. No row: a later renewal of the lease was here before.
create function renew_lease(
  lease uuid, number bigint, tenant text, key text, granted bigint, unspent bigint, needed bigint,
  life interval, share numeric, slice_max bigint, slice_min bigint
)
returns table (added_nano_usd bigint, slice_nano_usd bigint, bound text, limit_nano_usd bigint, room_nano_usd bigint)
language plpgsql as $$
declare
  tightest record;
  slice    bigint;
  added    bigint;
begin
  perform lock_tenants(array[tenant]);
  insert into credit_lease as l (lease_id, renewal, tenant_id, key_id, granted_nano_usd, expires_at)
  values (lease, number, tenant, key, granted, now() + life)
  on conflict (lease_id) do update
    set renewal = excluded.renewal, granted_nano_usd = excluded.granted_nano_usd, expires_at = excluded.expires_at
    where l.renewal < excluded.renewal;
  if not found then
    return;
  end if;
  select * into tightest from spending_bounds(tenant, key) b order by b.room_nano_usd limit 1;
  if not found then
    return query select 0::bigint, 0::bigint, null::text, null::bigint, null::bigint;
    return;
  end if;
  slice := least(trunc(greatest(tightest.room_nano_usd + unspent, 0) * share), slice_max);
  if slice < slice_min then
    slice := 0;
  end if;
  added := greatest(0, least(tightest.room_nano_usd, greatest(needed, slice - unspent)));
  update credit_lease set granted_nano_usd = granted_nano_usd + added where lease_id = lease;
  return query
    select added, slice, tightest.bound, tightest.limit_nano_usd, tightest.room_nano_usd - added;
end $$;

-- Sets an operation's worst case aside; `placed` is false, and the tightest bound told, where there is no room for it.
-- Nothing is set aside where nothing bounds the key, or for operation `seq` of a run that has been done before.
create function place_hold(
  event uuid, tenant text, key text, amount bigint, life interval, run text, seq bigint
)
returns table (placed boolean, bound text, limit_nano_usd bigint, room_nano_usd bigint) language plpgsql as $$
declare
  tightest record;
begin
  perform lock_tenants(array[tenant]);
  select * into tightest from spending_bounds(tenant, key) b order by b.room_nano_usd limit 1;
  if not found
     or exists (select from credit_hold where event_id = event)
     or exists (select from run r where r.run_id = run and r.last_seq >= seq) then
    return query select true, null::text, null::bigint, null::bigint;
    return;
  end if;
  if tightest.room_nano_usd < amount then
    return query select false, tightest.bound, tightest.limit_nano_usd, tightest.room_nano_usd;
    return;
  end if;
  insert into credit_hold (event_id, tenant_id, key_id, amount_nano_usd, expires_at)
  values (event, tenant, key, amount, now() + life);
  return query select true, tightest.bound, tightest.limit_nano_usd, tightest.room_nano_usd - amount;
end $$;

-- ---- Partitions -----------------------------------------------------------------------------------------------------

-- As before, but for recorders that make the same one at once: the lock lets them take turns, and yet the second may not
-- see at first what the other has made.
create or replace function create_usage_partition(month date) returns void language plpgsql as $$
declare
  partition text := 'usage_event_' || to_char(month, 'YYYY_MM');
begin
  assert extract(day from month) = 1, 'a partition starts on the first';
  if to_regclass(partition) is not null then
    return;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('usage_event', 0));
  execute format(
    'create table %I partition of usage_event for values from (%L) to (%L)',
    partition,
    month::timestamp at time zone 'UTC',
    (month + interval '1 month') at time zone 'UTC'
  );
  execute format('create trigger untruncated before truncate on %I execute function refuse_change()', partition);
exception when duplicate_table then
  return;
end $$;
