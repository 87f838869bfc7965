-- What was used and what it costs. Money is nano-dollars (1e-9 USD) in bigint, quantities are bigint, and the only
-- rounding is one half-even step per event line, stored with the line.

create function refuse_change() returns trigger language plpgsql as $$
begin
  raise exception '% on % is refused: its rows are final', tg_op, tg_table_name using errcode = 'restrict_violation';
end $$;

create function round_half_even(x numeric) returns numeric language sql immutable strict parallel safe as $$
  select case when abs(x - trunc(x)) = 0.5 and mod(trunc(x), 2) = 0 then trunc(x) else round(x) end
$$;

-- ---- Prices ---------------------------------------------------------------------------------------------------------

create table price (
  price_id          bigint generated always as identity primary key,
  model             text not null,                       -- '*' is every model
  context_length    integer not null check (context_length > 0),   -- the tier: holds up to this length
  kind              text not null check (kind in ('prompt', 'cached_prompt', 'completion', 'training', 'storage')),
  nano_usd_per_unit numeric(20,9) not null check (nano_usd_per_unit between 0 and 1000000),
  valid_from        timestamptz not null,
  valid_to          timestamptz check (valid_to > valid_from)
);
create unique index price_start on price (model, context_length, kind, valid_from);

create function price_guard() returns trigger language plpgsql as $$
begin
  if tg_op = 'UPDATE' then
    if old.valid_to is not null or new.valid_to is null or new.valid_to < now()
       or (new.price_id, new.model, new.context_length, new.kind, new.nano_usd_per_unit, new.valid_from)
          is distinct from
          (old.price_id, old.model, old.context_length, old.kind, old.nano_usd_per_unit, old.valid_from) then
      raise exception 'a price is final; only an open one may be closed, from now on'
        using errcode = 'restrict_violation';
    end if;
    return new;
  end if;
  -- Two writers of the same price wait for each other here, so that neither misses the other's row.
  perform pg_advisory_xact_lock(hashtextextended(concat_ws(' ', new.model, new.context_length, new.kind), 0));
  if exists (
    select from price p
    where p.model = new.model and p.context_length = new.context_length and p.kind = new.kind
      and tstzrange(p.valid_from, p.valid_to) && tstzrange(new.valid_from, new.valid_to)
  ) then
    raise exception 'a price of % (%) for % is in force in that time already', new.model, new.context_length, new.kind
      using errcode = 'exclusion_violation';
  end if;
  return new;
end $$;

create trigger price_guard before insert or update on price for each row execute function price_guard();
create trigger price_final before delete on price for each row execute function refuse_change();
create trigger price_untruncated before truncate on price execute function refuse_change();

-- The price of a unit: of the model by its own name, by its name without the organisation, or of every model; of the
-- smallest tier that holds the context, or the largest there is.
create function price_in_force(base_model text, event_context_length integer, event_kind text, at timestamptz)
returns table (price_id bigint, nano_usd_per_unit numeric) language sql stable as $$
  select p.price_id, p.nano_usd_per_unit
  from price p
  where p.model = any (array[base_model, regexp_replace(base_model, '^.*/', ''), '*'])
    and p.kind = event_kind and p.valid_from <= at and (p.valid_to is null or at < p.valid_to)
  order by p.model = base_model desc,
           p.model = '*',
           p.context_length < event_context_length,
           abs(p.context_length - event_context_length)
  limit 1
$$;

-- ---- Usage ----------------------------------------------------------------------------------------------------------

-- A line per event and kind. Tenants, keys and runs are not references: usage counts whatever became of them. The key
-- of a partitioned table must hold what it is partitioned by; an event has the same occurred_at however often it comes.
create table usage_event (
  event_id        uuid not null,
  kind            text not null,
  occurred_at     timestamptz not null,
  tenant_id       text not null,
  key_id          text not null,
  run_id          text,
  session_id      text,
  end_user        text,
  base_model      text not null,
  policy_version  text,
  context_length  integer not null check (context_length > 0),
  quantity        bigint not null check (quantity > 0),
  price_id        bigint,                               -- of `price`, whose rows never go
  amount_nano_usd bigint not null check (amount_nano_usd >= 0),
  recorded_at     timestamptz not null default now(),
  primary key (event_id, kind, occurred_at)
) partition by range (occurred_at);
create index on usage_event (tenant_id, occurred_at);

create trigger usage_event_final before update or delete on usage_event
  for each row execute function refuse_change();
create trigger usage_event_untruncated before truncate on usage_event execute function refuse_change();

create function create_usage_partition(month date) returns void language plpgsql as $$
declare
  partition text := 'usage_event_' || to_char(month, 'YYYY_MM');
begin
  assert extract(day from month) = 1, 'a partition starts on the first';
  if to_regclass(partition) is not null then
    return;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('usage_event', 0));
  if to_regclass(partition) is not null then
    return;
  end if;
  execute format(
    'create table %I partition of usage_event for values from (%L) to (%L)',
    partition,
    month::timestamp at time zone 'UTC',
    (month + interval '1 month') at time zone 'UTC'
  );
  -- Row triggers come with the parent's; this kind does not.
  execute format(
    'create trigger untruncated before truncate on %I execute function refuse_change()', partition
  );
end $$;

create table usage_hour (
  tenant_id       text not null,
  hour            timestamptz not null,
  base_model      text not null,
  context_length  integer not null,
  kind            text not null,
  key_id          text not null,
  quantity        bigint not null,
  amount_nano_usd bigint not null,
  events          bigint not null,
  primary key (tenant_id, hour, base_model, context_length, kind, key_id)
);

-- ---- Metrics of runs ------------------------------------------------------------------------------------------------

-- The operation that a row comes from; none for what a user logs. It makes writing a row twice a no-op.
alter table run_metric add column seq bigint;
create unique index run_metric_seq on run_metric (run_id, seq) where seq is not null;
