-- What tenants pay less than the price, by model, kind and period. Rows are final, as those of prices are.

create table discount (
  discount_id bigint generated always as identity primary key,
  tenant_id   text not null,
  model       text not null,                            -- '*' is every model
  kind        text not null check (kind in ('*', 'prompt', 'cached_prompt', 'completion', 'training', 'storage')),
  share       numeric(9,8) not null check (share between 0 and 1),   -- of the price, that is taken off
  valid_from  timestamptz not null,
  valid_to    timestamptz check (valid_to > valid_from)
);
create unique index discount_start on discount (tenant_id, model, kind, valid_from);

create function discount_guard() returns trigger language plpgsql as $$
begin
  if tg_op = 'UPDATE' then
    if old.valid_to is not null or new.valid_to is null or new.valid_to < now()
       or (new.discount_id, new.tenant_id, new.model, new.kind, new.share, new.valid_from)
          is distinct from (old.discount_id, old.tenant_id, old.model, old.kind, old.share, old.valid_from) then
      raise exception 'a discount is final; only an open one may be closed, from now on'
        using errcode = 'restrict_violation';
    end if;
    return new;
  end if;
  perform pg_advisory_xact_lock(hashtextextended(concat_ws(' ', 'discount', new.tenant_id, new.model, new.kind), 0));
  if exists (
    select from discount d
    where d.tenant_id = new.tenant_id and d.model = new.model and d.kind = new.kind
      and tstzrange(d.valid_from, d.valid_to) && tstzrange(new.valid_from, new.valid_to)
  ) then
    raise exception 'a discount of % on % for % is in force in that time already', new.tenant_id, new.kind, new.model
      using errcode = 'exclusion_violation';
  end if;
  return new;
end $$;

create trigger discount_guard before insert or update on discount for each row execute function discount_guard();
create trigger discount_final before delete on discount for each row execute function refuse_change();
create trigger discount_untruncated before truncate on discount execute function refuse_change();

-- The discount on a unit; one at most: of the model by its own name, without its organisation, or of every model, and
-- of these the one of the kind before the one of every kind.
create function discount_in_force(tenant text, base_model text, event_kind text, at timestamptz)
returns table (discount_id bigint, share numeric) language sql stable as $$
  select d.discount_id, d.share
  from discount d
  where d.tenant_id = tenant and d.kind in (event_kind, '*')
    and d.model = any (array[base_model, regexp_replace(base_model, '^.*/', ''), '*'])
    and d.valid_from <= at and (d.valid_to is null or at < d.valid_to)
  order by d.model = base_model desc, d.model = '*', d.kind = '*'
  limit 1
$$;

create or replace function price_moments() returns timestamptz[] language sql stable as $$
  select coalesce(array_agg(moment order by moment), '{}')
  from (
    select valid_from as moment from price union select valid_to from price where valid_to is not null
    union
    select valid_from from discount union select valid_to from discount where valid_to is not null
  ) as m
$$;

-- A month whose detaching was cut off is neither the table's nor its own, and takes no column: its detaching is ended.
do $$
declare
  partition text;
begin
  for partition in select name from usage_partitions where leaving loop
    execute format('alter table usage_event detach partition %I finalize', partition);
  end loop;
end $$;

-- The discount that an event was charged with, for ever, as its price.
alter table usage_event add column discount_id bigint;
do $$
declare
  partition text;
begin
  for partition in select name from usage_partitions where not attached loop
    execute format('alter table %I add column if not exists discount_id bigint', partition);
  end loop;
end $$;
