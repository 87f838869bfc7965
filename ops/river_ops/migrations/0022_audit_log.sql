-- Who changed what, for ever: a line for each action, written in the transaction that does it.

-- Keys and tenants are not references, and are named as they were: the log outlives them.
create table audit_log (
  entry_id        bigint generated always as identity primary key,
  occurred_at     timestamptz not null default now(),
  action          text not null check (action ~ '^[a-z_]+\.[a-z_]+$'),
  through         text not null,                        -- 'api', 'dashboard', or a dialect
  actor_key_id    text not null,
  actor_key_name  text not null,
  actor_tenant_id text not null,
  tenant_id       text,                                 -- whom it concerns; null is everybody
  subject         text not null,                        -- the key, tenant, model, alias, path, … that was changed
  details         jsonb not null default '{}',
  request_id      text not null
);
create index audit_log_by_time on audit_log (occurred_at, entry_id);
create index audit_log_by_tenant on audit_log (tenant_id, occurred_at, entry_id);
create index audit_log_by_action on audit_log (action, occurred_at, entry_id);

create trigger audit_log_final before update or delete on audit_log for each row execute function refuse_change();
create trigger audit_log_untruncated before truncate on audit_log execute function refuse_change();

-- A key may have two secrets for a while: the one that replaced another, and that one until its grace is over.
alter table api_key
  add column previous_hash  bytea unique,
  add column previous_until timestamptz,
  add column rotated_at     timestamptz,
  add column rotation_key   text,                       -- the idempotency key of the request that rotated it
  add column last_used_at   timestamptz,                -- to within a minute or so
  add check ((previous_hash is null) = (previous_until is null));

-- Invoices name the discount on their lines. Those closed before this do not tell discounts apart, and what is late of
-- their months is not told apart either: it is a difference of sums that must be of one kind.
alter table invoice_line
  add column tells_discount boolean not null default false,
  add column discount_id    bigint,
  add column discount_share numeric(9,8);
alter table invoice_line
  alter column tells_discount set default true,
  add check ((discount_id is null) = (discount_share is null)),
  add check (tells_discount or discount_id is null);

drop function usage_to_invoice(text, date);
create function usage_to_invoice(tenant text, of_month date)
returns table (base_model text, kind text, price_id bigint, discount_id bigint, tells_discount boolean, quantity bigint,
               events bigint, amount_nano_usd bigint, credit_used_nano_usd bigint) language sql stable as $$
  with of_old as (
    select exists (
      select from invoice i join invoice_line l using (number)
      where i.tenant_id = tenant and l.month = of_month and not l.tells_discount
    ) as is_old
  ), batch as (
    -- Of all that was recorded at one moment, one account was charged.
    select e.base_model, e.kind, e.price_id, case when not o.is_old then e.discount_id end as discount_id,
           e.recorded_at, sum(e.quantity) as quantity, count(*) as events, sum(e.amount_nano_usd) as amount
    from usage_event e cross join of_old o
    where e.tenant_id = tenant
      and e.occurred_at >= of_month::timestamp at time zone 'UTC'
      and e.occurred_at < (of_month + interval '1 month') at time zone 'UTC'
    group by 1, 2, 3, 4, 5
  ), credited as (
    select distinct t.created_at
    from ledger_transaction t join ledger_entry e using (transaction_id)
    where t.tenant_id = tenant and t.kind = 'usage' and e.account = 'credit' and e.amount_nano_usd < 0
      and t.created_at in (select recorded_at from batch)
  )
  select base_model, kind, price_id, discount_id, not (select is_old from of_old), sum(quantity)::bigint,
         sum(events)::bigint, sum(amount)::bigint, sum(credit_used)::bigint
  from (
    select b.base_model, b.kind, b.price_id, b.discount_id, b.quantity, b.events, b.amount,
           case when c.created_at is null then 0 else b.amount end as credit_used
    from batch b left join credited c on c.created_at = b.recorded_at
    union all
    select l.base_model, l.kind, l.price_id, l.discount_id, -l.quantity, -l.events, -l.amount_nano_usd,
           -l.credit_used_nano_usd
    from invoice i join invoice_line l using (number)
    where i.tenant_id = tenant and l.month = of_month
  ) together
  group by 1, 2, 3, 4
  having sum(quantity) <> 0 or sum(events) <> 0 or sum(amount) <> 0 or sum(credit_used) <> 0
$$;
